"""Pictures of any size to class names and probabilities, with the model of a run."""

import functools
import glob
from collections.abc import Iterable

import jax
import numpy as np
import PIL.Image
import PIL.ImageOps
import tabulate
from etils import epath
from jaxtyping import UInt8

from attn_cnn import paths
from attn_cnn.errors import UserError, first_line
from attn_cnn.training import augment, data
from attn_cnn.training.experiment import Run

SHOWN = 3  # of the most probable classes


def read_picture(path: epath.Path, shape: tuple[int, int, int]) -> UInt8[np.ndarray, "height width channels"]:
    """Returns a picture, resized to `shape`: in colour, or grey where there is one channel.

    Raises:
      UserError: the file is missing or no picture.
    """
    height, width, channels = shape
    try:
        with path.open("rb") as file, PIL.Image.open(file) as picture:
            picture = PIL.ImageOps.exif_transpose(picture)  # phones store the camera's turn beside the pixels
            picture = picture.convert("L" if channels == 1 else "RGB").resize((width, height), PIL.Image.BICUBIC)
            return np.asarray(picture).reshape(shape)
    except Exception as error:  # of the disk, or Pillow's, which has types for each kind of picture
        raise UserError(f"{path} is no picture that can be read: {first_line(error)}") from None


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


def predict(run: Run, pictures: UInt8[np.ndarray, "batch height width channels"]) -> np.ndarray:
    """Returns the probabilities of the classes, (batch, classes), for pictures of the size of the run's data."""
    images = augment.normalize(pictures, run.mean, run.std)
    variables = {"params": run.params, "batch_stats": run.batch_stats}
    with jax.default_matmul_precision(run.config.matmul_precision):
        logits = jax.jit(functools.partial(run.model.apply, train=False))(variables, images)
    return np.asarray(jax.nn.softmax(logits))


def describe(run: Run, files: list[epath.Path]) -> str:
    """Returns a table with the most probable classes of each file, to read."""
    pictures = np.stack([read_picture(file, tuple(run.config.model.image_shape)) for file in files])
    names, rows = data.SPECS[run.config.data.name].names, []
    for file, probabilities in zip(files, predict(run, pictures), strict=True):
        best = np.argsort(-probabilities)[:SHOWN]
        rows.append([file.name, *(f"{names[label]} {probabilities[label]:.1%}" for label in best)])
    return tabulate.tabulate(rows, headers=["picture", "most probable", "then", "then"][: len(rows[0])])
