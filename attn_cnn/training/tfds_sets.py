"""Data sets of TensorFlow Datasets: found where they are prepared, or downloaded; decoded once and cached."""

import logging
import os
import threading
import urllib.request
from types import ModuleType
from typing import Any

import numpy as np
from etils import epath

from attn_cnn import paths, schema
from attn_cnn.errors import UserError, first_line
from attn_cnn.training import quiet_tensorflow
from attn_cnn.training.dataset import Dataset, cache_key, cached, dataset_of

log = logging.getLogger("attn_cnn")

REACH_SECONDS = 8
FORMAT = "with its spec"  # of the cache; another name, and older files are not read


def load(name: str, root: epath.Path, splits: tuple[str, str]) -> Dataset:
    """Returns two splits of a data set, to train and to test on; `root` is tfds's directory.

    Raises:
      UserError: there is no such data set, it is not one of images of one size and their labels, it is neither on disk
        nor reachable, or it cannot be read.
    """
    prepared = _newest(root / name) or _prepare(name, root)
    files = sorted((f.name, f.stat().length) for f in prepared.iterdir())
    key = cache_key(FORMAT, os.fspath(prepared), files, splits)
    file_name = f"{name.replace('/', '-').replace(':', '-')}-{prepared.name}-{key}.npz"

    def decode():
        log.info("Decoding %s; the next start reads the arrays.", prepared)
        return _decode(prepared, splits)

    return cached([prepared.parent / file_name, paths.cache_folder() / file_name], decode)


def _newest(folder: epath.Path) -> epath.Path | None:
    """Returns the newest version of a data set that tfds has prepared in `folder`."""
    try:
        if not folder.is_dir():
            return None
        versions = [v for v in folder.iterdir() if (v / "dataset_info.json").exists()]
    except paths.file_errors() as error:
        raise UserError(f"{folder} cannot be read: {first_line(error)}") from None
    return max(versions, key=_version, default=None)


def _version(path: epath.Path) -> tuple[int, ...]:
    parts = path.name.split(".")
    return tuple(int(p) for p in parts) if all(p.isdigit() for p in parts) else ()


def _tfds() -> ModuleType:
    try:
        quiet_tensorflow.load()
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            f"data sets of TensorFlow Datasets need it and TensorFlow: pip install them. {error} Without them there "
            "are digits, npz:PATH and folder:PATH (config.data.name)."
        ) from None
    return tfds


def _prepare(name: str, root: epath.Path) -> epath.Path:
    """Returns where a data set is prepared, be it now; only tfds knows its default config and its version."""
    tfds = _tfds()
    try:
        builder = tfds.builder(name, data_dir=os.fspath(root), try_gcs=False)
    except Exception as error:  # tfds raises types of its own, one for each part of a name
        meant = schema.nearest(name, ["digits", *tfds.list_builders(with_community_datasets=False)])
        hint = f"did you mean {meant}?" if meant else first_line(error)
        raise UserError(f"config.data.name is {name!r}, which TensorFlow Datasets does not have; {hint}") from None
    folder = epath.Path(builder.data_dir)
    if not (folder / "dataset_info.json").exists():
        _keys(name, builder.info)
        _check_reachable(name, root, next(iter(builder.url_infos or {}), None))
        log.info("Downloading %s to %s", name, root)
        try:
            builder.download_and_prepare()
        except Exception as error:  # of the network, the disk or the archive, each with types of its own
            raise UserError(f"{name} cannot be downloaded to {root}: {first_line(error)}") from None
    return folder


def _check_reachable(name: str, root: epath.Path, url: str | None) -> None:
    """Asks the source for a few seconds, since tfds itself retries for minutes without a network."""
    answered = threading.Event()

    def ask():
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=REACH_SECONDS):
                answered.set()
        except urllib.error.HTTPError:  # it is there, and dislikes the question
            answered.set()
        except OSError:
            pass

    if url is None:
        return
    # A thread, since resolving the host's name has no time-out of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    if not answered.is_set():
        raise UserError(
            f"{name} was not found: no prepared data set in {root / name}, and {url} does not answer. "
            "Either connect to the network and run again, or set TFDS_DATA_DIR (or --config.data.dir) to a "
            f"folder where tfds has prepared {name}, or train on the data that needs no download: append "
            "':digits' to the config, as in --config=configs/quadratic.py:digits."
        )


def _keys(name: str, info: Any) -> tuple[str, str]:
    """Returns the names of a data set's images and labels.

    Raises:
      UserError: it has no images of one size, or none with a label each.
    """
    import tensorflow_datasets as tfds

    keys = info.supervised_keys if info.supervised_keys and len(info.supervised_keys) == 2 else ("image", "label")
    features = dict(info.features)
    image, label = (features.get(key) if isinstance(key, str) else None for key in keys)
    if not isinstance(image, tfds.features.Image) or not isinstance(label, tfds.features.ClassLabel):
        raise UserError(
            f"config.data.name is {name}, which has no images with one label each: {first_line(info.features)}"
        )
    if None in image.shape or image.np_dtype != np.uint8:
        raise UserError(
            f"config.data.name is {name}, whose images are {image.np_dtype} {image.shape}, not uint8 of one size; "
            "write them as files and use folder:PATH with config.data.image_size, which resizes them."
        )
    return keys


def _decode(prepared: epath.Path, splits: tuple[str, str]) -> Dataset:
    builder = _tfds().builder_from_directory(os.fspath(prepared))
    parts: list[np.ndarray] = []
    keys = _keys(builder.info.full_name, builder.info)
    for split in splits:
        try:
            examples = builder.info.splits[split].num_examples
        except (KeyError, ValueError):
            raise UserError(
                f"{builder.info.full_name} has no split {split!r} (config.data.train_split, test_split); it has "
                f"{', '.join(builder.info.splits)}."
            ) from None
        try:
            parts += _read(builder, split, keys)
        except Exception as error:  # each file format raises types of its own, one for each kind of damage
            raise UserError(f"the data set in {prepared} cannot be read: {first_line(error)} {ANEW}") from None
        if len(parts[-1]) != examples:
            found = f"{len(parts[-1]):,} {split} examples instead of {examples:,}"
            raise UserError(f"the data set in {prepared} cannot be read: it has {found}. {ANEW}")
        if parts[-1].min(initial=0) < 0:
            raise UserError(f"the split {split!r} of {builder.info.name} holds images without a label; choose another.")
    return dataset_of(tuple(builder.info.features[keys[1]].names), *parts)


ANEW = "If it is damaged, move the folder away and run again, and it is prepared anew."


def _read(builder: Any, split: str, keys: tuple[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns images and labels of a split, by whatever reads its files."""
    if builder.info.file_format in type(builder.info.file_format).with_tf_data():
        decoders = _tfds().decode.PartialDecoding(dict.fromkeys(keys, True))
        batch = builder.as_dataset(split=split, batch_size=-1, decoders=decoders)
        images, labels = (batch[key].numpy() for key in keys)
    else:
        source = builder.as_data_source(split=split)
        images, labels = (np.stack(part) for part in zip(*((e[keys[0]], e[keys[1]]) for e in source), strict=True))
    return images, labels.astype(np.int32)
