"""A data set as arrays on the host, what is known of it without them, and the cache that keeps them decoded."""

import contextlib
import hashlib
import json
import logging
import os
import uuid
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Int, UInt8

from attn_cnn import paths

log = logging.getLogger("attn_cnn")


@dataclass(frozen=True)
class Spec:
    """What a run knows of its data without loading it.

    Attributes:
      image_shape: height, width and channels of each image.
      mean: mean of each channel over the training images, of pixels scaled to [0, 1].
      std: standard deviation of each channel, likewise.
      train_size: number of images that are trained on.
      names: names of the classes, in the order of their labels.
    """

    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train_size: int
    names: tuple[str, ...]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.names)

    def to_json(self) -> str:
        """Returns the text that `from_json` reads."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Spec":
        """Returns what `to_json` wrote; raises ValueError, KeyError or TypeError for anything else."""
        values = json.loads(text)
        lists = {name: tuple(values[name]) for name in ("image_shape", "mean", "std", "names")}
        return cls(train_size=int(values["train_size"]), **lists)


class Dataset(NamedTuple):
    """The images to train on and those to evaluate on, on the host; `spec` is what is known of them.

    The test images are the held-out part of the training set where config.data.validation_fraction asks for one.
    """

    train_images: UInt8[np.ndarray, "train height width channels"]
    train_labels: Int[np.ndarray, "train"]
    test_images: UInt8[np.ndarray, "test height width channels"]
    test_labels: Int[np.ndarray, "test"]
    spec: Spec


def dataset_of(
    names: tuple[str, ...],
    train_images: UInt8[np.ndarray, "train height width channels"],
    train_labels: Int[np.ndarray, "train"],
    test_images: UInt8[np.ndarray, "test height width channels"],
    test_labels: Int[np.ndarray, "test"],
) -> Dataset:
    """Returns the data set of four arrays, with what is known of it measured."""
    mean, std = moments(train_images)
    spec = Spec(train_images.shape[1:], mean, std, len(train_images), names)
    return Dataset(train_images, train_labels, test_images, test_labels, spec)


def moments(
    images: UInt8[np.ndarray, "images height width channels"],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation of each channel, of pixels scaled to [0, 1]; 1 for a constant channel."""
    values, channels = np.arange(256) / 255, np.moveaxis(images, -1, 0)
    counts = np.array([sum(np.bincount(image.ravel(), minlength=256) for image in channel) for channel in channels])
    shares = counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ values
    std = np.sqrt((shares * (values - mean[:, None]) ** 2).sum(axis=1))
    return tuple(mean.round(6).tolist()), tuple(np.where(std > 0, std, 1.0).round(6).tolist())


def cache_key(*parts: Any) -> str:
    """Returns a short text that differs where the `parts` do."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def cached(places: list[epath.Path], decode: Callable[[], Dataset]) -> Dataset:
    """Returns the data set from the first of `places` that holds it; decodes it and writes one of them otherwise."""
    for place in places:
        if dataset := _read(place):
            return dataset
    dataset = decode()
    if not any(_write(place, dataset) for place in places):
        log.warning("%s cannot be written: every start decodes anew.", " and ".join(map(os.fspath, places)))
    return dataset


def _read(place: epath.Path) -> Dataset | None:
    if not place.exists():
        return None
    try:
        with place.open("rb") as file, np.load(file) as arrays:
            return Dataset(**dict(arrays) | {"spec": Spec.from_json(str(arrays["spec"]))})
    except paths.file_errors(ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        log.warning("The cache %s is damaged (%s): decoding again.", place, error)
        return None


def _write(place: epath.Path, dataset: Dataset) -> bool:
    temporary = place.with_name(f"{place.name}.{uuid.uuid4().hex}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(file, **dataset._asdict() | {"spec": dataset.spec.to_json()})
        temporary.replace(place)
    except paths.file_errors():
        with contextlib.suppress(*paths.file_errors()):
            temporary.unlink(missing_ok=True)
        return False
    return True
