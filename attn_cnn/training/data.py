"""Datasets as uint8 arrays on the host, and the order in which training visits them.

CIFAR comes from TensorFlow Datasets, decoded once and kept as arrays beside the data set; the digits ship with
scikit-learn. The order of examples is a function of (seed, epoch) alone, so that any run can be resumed at any
step, on any number of devices.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import threading
import urllib.request
import uuid
import zipfile
import zlib
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import ml_collections
import numpy as np
from etils import epath
from jaxtyping import Int, UInt8

from attn_cnn import paths, schema
from attn_cnn.errors import UserError, first_line
from attn_cnn.training import quiet_tensorflow

log = logging.getLogger("attn_cnn")

REACH_SECONDS = 8


@dataclass(frozen=True)
class Spec:
    """What is known of a data set before it is loaded; `mean` and `std` are of pixels scaled to [0, 1]."""

    image_shape: tuple[int, int, int]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train_size: int
    names: tuple[str, ...]
    url: str = ""


CIFAR100_NAMES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""

SPECS = {
    "cifar10": Spec(
        (32, 32, 3),
        10,
        (0.4914, 0.4822, 0.4465),
        (0.2023, 0.1994, 0.2010),
        50_000,
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    ),
    "cifar100": Spec(
        (32, 32, 3),
        100,
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
        50_000,
        tuple(CIFAR100_NAMES.split()),
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    ),
    "digits": Spec((8, 8, 1), 10, (0.3054,), (0.3760,), 1_437, tuple("0123456789")),
}


FIELDS = {
    "name": schema.choice(*SPECS),
    "dir": schema.text(),
    "crop_padding": schema.integer(0, 16),
    "flip": schema.boolean(),
}


def check(config: ml_collections.ConfigDict, spec: Spec | None = None) -> None:
    """Raises UserError unless the model of `config` takes the images and classes of its data set, or of `spec`."""
    name, spec = config.data.name, spec or SPECS[config.data.name]
    if tuple(config.model.image_shape) != spec.image_shape:
        raise UserError(
            f"config.model.image_shape is {config.model.image_shape}, but {name}'s images are {spec.image_shape}."
        )
    if config.model.classes != spec.classes:
        raise UserError(f"config.model.classes is {config.model.classes}, but {name} has {spec.classes} classes.")
    if config.batch_size > spec.train_size:
        raise UserError(
            f"config.batch_size is {config.batch_size:,}, more than the {spec.train_size:,} images {name} trains on."
        )


class Dataset(NamedTuple):
    """Both splits of a data set, on the host."""

    train_images: UInt8[np.ndarray, "train height width channels"]
    train_labels: Int[np.ndarray, "train"]
    test_images: UInt8[np.ndarray, "test height width channels"]
    test_labels: Int[np.ndarray, "test"]


def load(name: str, data_dir: str = "") -> Dataset:
    """Returns the whole data set. `data_dir` is tfds's directory; empty: `TFDS_DATA_DIR`, or tfds's default.

    Raises:
      UserError: the data is neither on disk nor reachable, or is damaged.
    """
    if name == "digits":
        return _digits()
    root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    root = paths.resolve(root, "the data's folder (config.data.dir, or TFDS_DATA_DIR)")
    prepared = _prepared(root, name)
    if prepared is None:
        _check_reachable(name, root)
        prepared = _download(name, root)
    return _cached(prepared)


@functools.lru_cache(maxsize=1)
def epoch_order(seed: int, epoch: int, examples: int) -> Int[np.ndarray, "{examples}"]:
    """Returns the permutation in which an epoch visits the training set; it is not to be written to."""
    order = np.random.default_rng((seed, epoch)).permutation(examples).astype(np.int32)
    order.flags.writeable = False
    return order


def _digits() -> Dataset:
    """Loads 1,797 images of 8x8, in a fixed stratified 80/20 split; 0..16 is scaled to 0..255."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    train, test, train_labels, test_labels = train_test_split(
        images, digits.target.astype(np.int32), test_size=0.2, stratify=digits.target, random_state=0
    )
    return Dataset(train, train_labels, test, test_labels)


def _prepared(root: epath.Path, name: str) -> epath.Path | None:
    """Finds the newest version of a data set that tfds has prepared under `root`."""
    folder = root / name
    try:
        versions = [v for v in folder.iterdir() if (v / "dataset_info.json").exists()]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error}") from None
    return max(versions, key=_version, default=None)


def _version(path: epath.Path) -> tuple[int, ...]:
    parts = path.name.split(".")
    return tuple(int(p) for p in parts) if all(p.isdigit() for p in parts) else ()


def _check_reachable(name: str, root: epath.Path) -> None:
    """Asks the source for a few seconds, since tfds itself retries for minutes without a network."""
    spec, answered = SPECS[name], threading.Event()

    def ask():
        try:
            request = urllib.request.Request(spec.url, method="HEAD")
            with urllib.request.urlopen(request, timeout=REACH_SECONDS):
                answered.set()
        except OSError:
            pass

    # A thread, since resolving the host's name has no time-out of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    if not answered.is_set():
        raise UserError(
            f"{name} was not found: no prepared data set in {root / name}, and {spec.url} does not answer. "
            "Either connect to the network and run again, or set TFDS_DATA_DIR (or --config.data.dir) to a "
            f"folder where tfds has prepared {name}, or train on the data that needs no download: append "
            "':digits' to the config, as in --config=configs/quadratic.py:digits."
        )


def _tfds() -> ModuleType:
    try:
        quiet_tensorflow.load()
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(f"reading CIFAR needs TensorFlow and TensorFlow Datasets: pip install them. {error}") from None

    return tfds


def _download(name: str, root: epath.Path) -> epath.Path:
    log.info("Downloading %s to %s", name, root)
    builder = _tfds().builder(name, data_dir=os.fspath(root), try_gcs=False)
    try:
        builder.download_and_prepare()
    except Exception as error:  # of the network, the disk or the archive, each with types of its own
        raise UserError(f"{name} cannot be downloaded to {root}: {error}") from None
    return epath.Path(builder.data_dir)


def _cached(prepared: epath.Path) -> Dataset:
    """Returns the decoded arrays, from the first cache that holds them; decodes and writes one otherwise."""
    files = sorted((f.name, f.stat().length) for f in prepared.iterdir())
    source = hashlib.sha256(json.dumps([os.fspath(prepared), files]).encode()).hexdigest()[:16]
    file_name = f"{prepared.parent.name}-{prepared.name}-{source}.npz"
    places = [prepared.parent / file_name, paths.cache_folder() / file_name]
    for place in places:
        if dataset := _read_cache(place):
            return dataset
    log.info("Decoding %s; the next start reads the arrays.", prepared)
    dataset = _decode(prepared)
    if not any(_write_cache(place, dataset) for place in places):
        log.warning("Neither %s nor %s can be written: every start decodes anew.", *places)
    return dataset


def _decode(prepared: epath.Path) -> Dataset:
    tfds = _tfds()
    builder = tfds.builder_from_directory(os.fspath(prepared))
    arrays = []
    for split in ("train", "test"):
        try:
            batch = builder.as_dataset(split=split, batch_size=-1)
        except Exception as error:  # TensorFlow raises its own types, one for each kind of damage
            raise UserError(
                f"the data set in {prepared} is damaged: {first_line(error)} Delete the folder and prepare it again."
            ) from None
        arrays += [batch["image"].numpy(), batch["label"].numpy().astype(np.int32)]
        if len(arrays[-1]) != builder.info.splits[split].num_examples:
            raise UserError(
                f"the data set in {prepared} is damaged: {len(arrays[-1]):,} {split} examples instead of "
                f"{builder.info.splits[split].num_examples:,}. Delete the folder and prepare it again."
            )
    return Dataset(*arrays)


def _read_cache(place: epath.Path) -> Dataset | None:
    if not place.exists():
        return None
    try:
        with place.open("rb") as file, np.load(file) as arrays:
            return Dataset(**arrays)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        log.warning("The cache %s is damaged (%s): decoding again.", place, error)
        return None


def _write_cache(place: epath.Path, dataset: Dataset) -> bool:
    temporary = place.with_name(f"{place.name}.{uuid.uuid4().hex}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(file, **dataset._asdict())
        temporary.replace(place)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        return False
    return True
