"""Images to logits, probabilities and class names, with the network of a run; pictures in files may have any size."""

import contextlib
import glob
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import tabulate
from etils import epath
from jaxtyping import Array, Float, Int, UInt8

from attn_cnn import paths
from attn_cnn.errors import UserError
from attn_cnn.training import augment, pictures
from attn_cnn.training.experiment import precision_of
from attn_cnn.training.runs import Run

SHOWN = 3  # of the most probable classes
Interceptor = Callable[..., Any]  # as flax.linen.intercept_methods takes it


def find_pictures(patterns: Iterable[str]) -> list[epath.Path]:
    """Returns the files that paths, or patterns as in pictures/*.png, name.

    Raises:
      UserError: one of them names no file, or there are none.
    """
    found = []
    for pattern in patterns:
        path = paths.resolve(pattern, "--images")
        names = [path] if path.exists() else [epath.Path(name) for name in sorted(glob.glob(str(path)))]
        if not names:
            raise UserError(f"--images names {pattern}, which is no file.")
        found += names
    if not found:
        raise UserError("--mode=predict needs pictures, as in --images=cat.png.")
    return found


def network(
    run: Run,
    variables: dict,
    images: UInt8[Array | np.ndarray, "batch height width channels"],
    interceptor: Interceptor | None = None,
) -> Float[Array, "batch classes"]:
    """Returns the logits of pictures, with calls to the network's modules going by `interceptor`."""
    with nn.intercept_methods(interceptor) if interceptor else contextlib.nullcontext():
        result: Any = run.model.apply(variables, augment.normalize(images, run.mean, run.std), train=False)
        return result


def batches(
    run: Run, images: UInt8[np.ndarray, "images height width channels"]
) -> Iterator[UInt8[np.ndarray, "batch height width channels"]]:
    """Yields the images, config.eval_batch_size of them at a time."""
    size = run.config.eval_batch_size
    for start in range(0, len(images), size):
        yield images[start : start + size]


def logits(
    run: Run, images: UInt8[np.ndarray, "images height width channels"], interceptor: Interceptor | None = None
) -> Float[np.ndarray, "images classes"]:
    """Returns the logits of all `images`, computed in batches of config.eval_batch_size."""
    with precision_of(run.config):
        of_batch = jax.jit(lambda variables, batch: network(run, variables, batch, interceptor))
        return np.concatenate([of_batch(run.variables, batch) for batch in batches(run, images)])


def predict(run: Run, images: UInt8[np.ndarray, "images height width channels"]) -> Float[np.ndarray, "images classes"]:
    """Returns the probabilities of the classes for pictures of the size of the run's data."""
    return np.asarray(jax.nn.softmax(logits(run, images)))


def accuracy(logits: Float[np.ndarray, "images classes"], labels: Int[np.ndarray, "images"]) -> float:
    """Returns the share of images whose largest logit is that of their label."""
    return float((logits.argmax(-1) == labels).mean())


def describe(run: Run, files: list[epath.Path]) -> str:
    """Returns a table with the most probable classes of each file, to read."""
    images = np.stack([pictures.read(file, run.spec.image_shape) for file in files])
    names, rows = run.spec.names, []
    for file, probabilities in zip(files, predict(run, images), strict=True):
        best = np.argsort(-probabilities)[:SHOWN]
        rows.append([file.name, *(f"{names[label]} {probabilities[label]:.1%}" for label in best)])
    return tabulate.tabulate(rows, headers=["picture", "most probable", "then", "then"][: len(rows[0])])
