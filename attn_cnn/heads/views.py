"""What the heads of a layer see from one query pixel: their scores between pixels, or else each pixel's probability."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from attn_cnn.attention import LayerHeads
from attn_cnn.encodings import Encoding
from attn_cnn.regions import Score

Head = Score | Float[np.ndarray, "H W"]  # its score by shift, or its probabilities


class LayerView(NamedTuple):
    """One layer, seen from a query pixel.

    Attributes:
      grid: its rows and columns.
      query: row and column of the query pixel.
      heads: of each head its score by shift, where that is defined between pixels, or probabilities (H, W).
    """

    grid: tuple[int, int]
    query: tuple[int, int]
    heads: Sequence[Head]


def middle(grid: tuple[int, int]) -> tuple[int, int]:
    """Returns the query pixel in the middle of a grid; of an even side, the later one."""
    return grid[0] // 2, grid[1] // 2


def gaussian(center: Float[np.ndarray, "2"], precision: Float[np.ndarray, "2 2"]) -> Score:
    """Returns the score -1/2 (d - center)^T precision (d - center)."""

    def score(rows, columns):
        row, column = rows - center[0], columns - center[1]
        diagonal = precision[0, 0] * row**2 + precision[1, 1] * column**2
        return -0.5 * diagonal - precision[0, 1] * row * column

    return score


def scores_of(encoding: Encoding) -> list[Score]:
    """Returns the score of each head of a continuous encoding."""
    one = [jax.tree.map(lambda array, head=head: array[head : head + 1], encoding) for head in range(_heads(encoding))]

    def score(rows, columns, head):
        return np.asarray(head.scores(*map(jnp.asarray, (rows, columns)))[0])

    return [functools.partial(score, head=head) for head in one]


def _heads(encoding: Encoding) -> int:
    return len(jax.tree.leaves(encoding)[0])


def of_layers(
    layers: Mapping[int, LayerHeads],
    queries: Mapping[int, tuple[int, int]],
    probabilities: Callable[[int], Float[np.ndarray, "heads H W"]],
) -> dict[int, LayerView]:
    """Returns the views of a model's layers, by their numbers.

    Args:
      layers: the heads of each layer.
      queries: the query pixel in each layer's grid.
      probabilities: given a layer's number, what its heads see from there; it is called where there is no score
        between pixels.
    """
    views = {}
    for number, layer in layers.items():
        continuous = layer.encoding.continuous
        heads: Sequence[Head] = scores_of(layer.encoding) if continuous else list(probabilities(number))
        views[number] = LayerView(layer.grid, queries[number], heads)
    return views


def of_numbers(numbers: Mapping[str, np.ndarray]) -> dict[int, LayerView]:
    """Returns the views of a run's layers from the middle of the grid, from the numbers of one epoch.

    `history` documents them; heads that are no Gaussians need `central`, too (see `measure`). A layer without heads has
    no view.
    """
    views = {}
    for number, grids in enumerate(numbers["grid"]):
        present = np.isfinite(grids[:, 0])
        if not present.any():
            continue
        height, width = map(int, grids[present][0])
        grid = height, width
        if "central" in numbers:
            heads: Sequence[Head] = [_middle_of(central, grid) for central in numbers["central"][number, present]]
        else:
            parameters = (numbers[name][number, present].astype(np.float64) for name in ("center", "precision"))
            heads = [gaussian(*of_head) for of_head in zip(*parameters, strict=True)]
        views[number] = LayerView(grid, middle(grid), heads)
    return views


def _middle_of(padded: Float[np.ndarray, "_ _"], grid: tuple[int, int]) -> Float[np.ndarray, "H W"]:
    """Returns the probabilities of a layer whose grid is smaller than another's, around which there is NaN."""
    starts = [(large - small) // 2 for large, small in zip(padded.shape, grid, strict=True)]
    rows, columns = (slice(start, start + side) for start, side in zip(starts, grid, strict=True))
    return padded[rows, columns].astype(np.float64)
