"""The smallest regions that hold a share of a head's probability, between pixels or in whole pixels.

Where a head's score f is defined between pixels, its density on the grid's rectangle is exp(f) over the integral of
exp(f) there, and the region that holds a share p of it is {f >= t} for the t at which the integral over it is p. The
outline is smooth. Where there is a probability for each pixel alone, the region is the fewest pixels that reach p, and
holds more.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import contourpy
import numpy as np
from jaxtyping import Bool, Float

SHARES = (0.5, 0.9)  # the paper's percentiles

Score = Callable[[np.ndarray, np.ndarray], np.ndarray]  # of a row and a column shift, arrays that broadcast, in pixels
Polygon = Float[np.ndarray, "points 2"]  # row and column of each point; closed

_COARSE, _FINE = 96, 384  # samples along a side, to find where the density is, and to integrate it
_DEPTH = 14.0  # below its maximum, exp(score) is taken to be 0


class Rectangle(NamedTuple):
    """A rectangle of shifts, in pixels."""

    top: float
    bottom: float
    left: float
    right: float

    @classmethod
    def around(cls, query: tuple[int, int], grid: tuple[int, int]) -> "Rectangle":
        """Returns the shifts from a query pixel to everything that a grid's pixels cover."""
        (row, column), (height, width) = query, grid
        return cls(-row - 0.5, height - row - 0.5, -column - 0.5, width - column - 0.5)

    def samples(self, number: int) -> tuple[Float[np.ndarray, "{number}"], Float[np.ndarray, "{number}"]]:
        """Returns the middles of equal intervals along the rows and along the columns."""
        along = (np.arange(number) + 0.5) / number
        return self.top + along * (self.bottom - self.top), self.left + along * (self.right - self.left)


def outlines(score: Score, rectangle: Rectangle) -> list[list[Polygon]]:
    """Returns, for each of the `SHARES`, the outlines of the smallest region that holds it, within the rectangle."""
    window = _where_the_mass_is(score, rectangle)
    rows, columns = window.samples(_FINE)
    inside = np.sort(np.asarray(score(rows[:, None], columns), np.float64), axis=None)[::-1]
    held = np.cumsum(np.exp(inside - inside[0]))
    # The edges are sampled too, and beyond them there is nothing: an outline closes along the edge that it meets.
    rows, columns = np.r_[window.top, rows, window.bottom], np.r_[window.left, columns, window.right]
    values = np.pad(np.asarray(score(rows[:, None], columns), np.float64), 1, constant_values=-np.inf)
    values = np.maximum(values, inside[-1] - 1e9)
    rows, columns = (np.r_[side[0] - 1e-9, side, side[-1] + 1e-9] for side in (rows, columns))
    contour = contourpy.contour_generator(columns, rows, values)
    levels = [inside[np.searchsorted(held, share * held[-1])] for share in SHARES]
    return [[line[:, ::-1] for line in cast(list[Polygon], contour.lines(level))] for level in levels]


def _where_the_mass_is(score: Score, window: Rectangle) -> Rectangle:
    """Returns the part of a rectangle outside which exp(score) is as good as 0, found by looking ever closer."""
    for _ in range(40):
        rows, columns = window.samples(_COARSE)
        values = np.asarray(score(rows[:, None], columns), np.float64)
        present = values > values.max() - _DEPTH
        sides = []
        for along, (low, high) in zip((present.any(1), present.any(0)), (window[:2], window[2:]), strict=True):
            first, last = np.flatnonzero(along)[[0, -1]]
            step = (high - low) / _COARSE
            sides += [max(low, low + (first - 1) * step), min(high, low + (last + 2) * step)]
        found = Rectangle(*sides)
        if _area(found) > 0.7 * _area(window):
            break
        window = found
    return found


def _area(rectangle: Rectangle) -> float:
    return (rectangle.bottom - rectangle.top) * (rectangle.right - rectangle.left)


class Pixels(NamedTuple):
    """Pixels that hold a share of a head's probability.

    Attributes:
      held: which they are.
      mass: the probability that they have together.
    """

    held: Bool[np.ndarray, "H W"]
    mass: float


def fewest_pixels(probabilities: Float[np.ndarray, "H W"], share: float) -> Pixels:
    """Returns the smallest set of pixels that holds `share` of the probabilities."""
    order = np.argsort(-probabilities, axis=None, kind="stable")
    held = np.cumsum(probabilities.reshape(-1)[order], dtype=np.float64)
    number = min(int(np.searchsorted(held, share * held[-1])) + 1, len(order))
    mask = np.zeros(probabilities.size, bool)
    mask[order[:number]] = True
    return Pixels(mask.reshape(probabilities.shape), float(held[number - 1]))
