"""Where the heads of a network of `ConvolutionalAttention` have gone since they were a convolution's window."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tabulate

from attn_cnn.encodings import window
from attn_cnn.errors import UserError
from attn_cnn.training.runs import Run


class Moves(NamedTuple):
    """How far the heads of one layer are from the pixels of the window that they started on.

    Attributes:
      name: the layer's path in the network.
      mean: mean distance from its pixel, in pixels.
      largest: the largest distance.
      strayed: how many heads are nearer to another pixel than to their own.
      heads: how many there are.
      squared_spreads: the smallest, the median and the largest s^2, in 1/pixels^2.
    """

    name: str
    mean: float
    largest: float
    strayed: int
    heads: int
    squared_spreads: tuple[float, float, float]


def moves_of_run(run: Run) -> list[Moves]:
    """Returns the moves of each layer of a ResNet of attention layers.

    Raises:
      UserError: the run is no such network's.
    """
    if not (run.config.model.name == "resnet18" and run.config.model.layer == "attention"):
        raise UserError("the run is no ResNet of attention layers; make one with express.")
    return list(moves(run.params))


def moves(params: dict, path: tuple[str, ...] = ()) -> Iterator[Moves]:
    """Yields the moves of each layer among the parameters, whose heads started on a square window without dilation."""
    if "centers" in params:
        centers, squares = np.asarray(params["centers"], np.float64), np.square(np.asarray(params["spreads"]))
        off = centers - window(math.isqrt(len(centers)))
        distances = np.linalg.norm(off, axis=-1)
        low, median, high = (float(f(squares)) for f in (np.min, np.median, np.max))
        strayed = int((np.abs(off).max(-1) > 0.5).sum())
        mean, largest = float(distances.mean()), float(distances.max())
        yield Moves("/".join(path), mean, largest, strayed, len(centers), (low, median, high))
        return
    for name, value in sorted(params.items()):
        if isinstance(value, dict):
            yield from moves(value, (*path, name))


def describe(layers: list[Moves]) -> str:
    """Returns the table of moves, to read."""
    rows = [
        [layer.name, f"{layer.mean:.3f}", f"{layer.largest:.3f}", f"{layer.strayed} of {layer.heads}"]
        + [f"{square:.2f}" for square in layer.squared_spreads]
        for layer in layers
    ]
    headers = ["layer", "mean move, pixels", "largest", "left their pixel", "smallest s^2", "median", "largest"]
    return tabulate.tabulate(rows, headers, disable_numparse=True, stralign="right")
