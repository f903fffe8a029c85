"""Pictures of any size to class names and probabilities, with the model of a run."""

import functools
import glob
from collections.abc import Iterable

import jax
import numpy as np
import tabulate
from etils import epath
from jaxtyping import UInt8

from attn_cnn import paths
from attn_cnn.errors import UserError
from attn_cnn.training import augment, pictures
from attn_cnn.training.runs import Run

SHOWN = 3  # of the most probable classes


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


def predict(run: Run, images: UInt8[np.ndarray, "batch height width channels"]) -> np.ndarray:
    """Returns the probabilities of the classes, (batch, classes), for pictures of the size of the run's data."""
    x = augment.normalize(images, run.mean, run.std)
    variables = {"params": run.params, "batch_stats": run.batch_stats}
    with jax.default_matmul_precision(run.config.matmul_precision):
        logits = jax.jit(functools.partial(run.model.apply, train=False))(variables, x)
    return np.asarray(jax.nn.softmax(logits))


def describe(run: Run, files: list[epath.Path]) -> str:
    """Returns a table with the most probable classes of each file, to read."""
    images = np.stack([pictures.read(file, run.spec.image_shape) for file in files])
    names, rows = run.spec.names, []
    for file, probabilities in zip(files, predict(run, images), strict=True):
        best = np.argsort(-probabilities)[:SHOWN]
        rows.append([file.name, *(f"{names[label]} {probabilities[label]:.1%}" for label in best)])
    return tabulate.tabulate(rows, headers=["picture", "most probable", "then", "then"][: len(rows[0])])
