"""Data sets that need no TensorFlow: scikit-learn's digits, arrays in a file, folders of pictures."""

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
from etils import epath
from jaxtyping import Int, UInt8

from attn_cnn import paths
from attn_cnn.errors import UserError, first_line
from attn_cnn.training import pictures
from attn_cnn.training.dataset import Dataset, cache_key, cached, dataset_of

log = logging.getLogger("attn_cnn")


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns the arrays of 1,797 images of 8x8, in a fixed stratified 80/20 split; 0..16 is scaled to 0..255.

    Raises:
      UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise UserError(
            "the digits come with scikit-learn: pip install scikit-learn. Without it there are npz:PATH and "
            "folder:PATH (config.data.name)."
        ) from None

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    train, test, train_labels, test_labels = train_test_split(
        images, digits.target.astype(np.int32), test_size=0.2, stratify=digits.target, random_state=0
    )
    return train, train_labels, test, test_labels


def arrays(path: epath.Path, splits: tuple[str, str]) -> Dataset:
    """Returns the data set of an .npz file with <split>_images, uint8 (images, height, width[, channels]), and
    <split>_labels, whole numbers from 0, for the split to train on and the one to test on. Its classes' names are
    their numbers.

    Raises:
      UserError: the file is missing or no such file.
    """
    try:
        with path.open("rb") as file, np.load(file) as content:
            missing = [f"{s}_{part}" for s in splits for part in ("images", "labels") if f"{s}_{part}" not in content]
            if missing:
                held = ", ".join(content.files)
                raise UserError(
                    f"{path} has no {', '.join(missing)}; it has {held} (config.data.train_split, test_split)."
                )
            parts = [content[f"{split}_{part}"] for split in splits for part in ("images", "labels")]
    except UserError:
        raise
    except Exception as error:  # of the file system, the archive or its arrays
        raise UserError(f"{path} is no .npz file that can be read: {first_line(error)}") from None
    checked = [_checked(f"{path}, {split}", *parts[2 * i : 2 * i + 2]) for i, split in enumerate(splits)]
    (train, train_labels), (test, test_labels) = checked
    if train.shape[1:] != test.shape[1:]:
        raise UserError(f"{path} has images of {train.shape[1:]} in {splits[0]} and {test.shape[1:]} in {splits[1]}.")
    names = tuple(map(str, range(max(train_labels.max(), test_labels.max()) + 1)))
    return dataset_of(names, train, train_labels, test, test_labels)


def _checked(
    what: str, images: np.ndarray, labels: np.ndarray
) -> tuple[UInt8[np.ndarray, "images height width channels"], Int[np.ndarray, "images"]]:
    if images.ndim == 3:
        images = images[..., None]
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if images.dtype != np.uint8 or images.ndim != 4:
        raise UserError(f"{what}: images are {images.dtype} {images.shape}; they must be uint8, 0 to 255, in NHWC.")
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1] or not len(labels):
        raise UserError(
            f"{what}: labels are {labels.dtype} {labels.shape}; they must be whole numbers, one for each of the "
            f"{len(images):,} images."
        )
    if labels.min() < 0:
        raise UserError(f"{what}: a label is {labels.min()}; labels are numbers from 0.")
    return images, labels.astype(np.int32)


def folder(root: epath.Path, splits: tuple[str, str], image_size: int) -> Dataset:
    """Returns the data set of pictures in <root>/<split>/<class>/, decoded once and then read from a cache.

    They are resized to `image_size`, height and width, if that is not 0. They are grey if all are, else in colour.

    Raises:
      UserError: a folder is missing or empty, a file cannot be read, or the pictures are of several sizes.
    """
    names = tuple(_subfolders(root / splits[0]))
    files, labels = zip(*(_files(root / split, names) for split in splits), strict=True)
    listing = [(str(f.relative_to(root)), f.stat().length, f.stat().mtime) for part in files for f in part]
    place = paths.cache_folder() / f"{root.name}-{cache_key(str(root), splits, image_size, listing)}.npz"

    def decode():
        log.info("Decoding the pictures in %s; the next start reads the arrays.", root)
        train, test = _decode(files, image_size)
        return dataset_of(names, train, labels[0], test, labels[1])

    return cached([place], decode)


def _subfolders(path: epath.Path) -> list[str]:
    try:
        found = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError:
        found = []
    if not found:
        raise UserError(f"{path} is no folder with a folder of pictures for each class (config.data.name).")
    return found


def _files(path: epath.Path, names: tuple[str, ...]) -> tuple[list[epath.Path], Int[np.ndarray, "images"]]:
    """Returns the pictures in the classes' folders, and their labels."""
    if unknown := sorted(set(_subfolders(path)) - set(names)):
        raise UserError(f"{path} has classes that are not trained on: {', '.join(unknown)}.")
    files: list[epath.Path] = []
    labels: list[int] = []
    known, others = PIL.Image.registered_extensions(), 0
    for label, name in enumerate(names):
        visible = sorted(f for f in (path / name).glob("*") if not f.name.startswith("."))
        found = [f for f in visible if f.suffix.lower() in known]
        files, labels, others = files + found, labels + [label] * len(found), others + len(visible) - len(found)
    if not files:
        raise UserError(f"{path} holds no pictures.")
    if others:
        log.warning("%s holds %d files that are no pictures; they are left out.", path, others)
    return files, np.array(labels, np.int32)


def _decode(files: tuple[list[epath.Path], ...], image_size: int) -> list[np.ndarray]:
    size, flat = (image_size, image_size) if image_size else None, [f for part in files for f in part]
    with ThreadPoolExecutor() as threads:
        decoded = list(threads.map(lambda file: pictures.decode(file, size), flat))
    for file, picture in zip(flat, decoded, strict=True):
        if picture.size != decoded[0].size:
            raise UserError(
                f"{flat[0]} is {decoded[0].height}x{decoded[0].width} and {file} {picture.height}x{picture.width}; "
                "set config.data.image_size to the side to which pictures are to be resized."
            )
    if any(picture.mode == "RGB" for picture in decoded):
        decoded = [picture.convert("RGB") for picture in decoded]
    images = np.stack([np.asarray(picture) for picture in decoded])
    images = images[..., None] if images.ndim == 3 else images
    return np.split(images, [len(files[0])])
