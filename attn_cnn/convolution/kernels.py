"""What attention maps look like by shift: kernels of heads, windows that hold them, and what no kernel explains.

The kernel that a head has on a grid is the mean of what queries attend to at a shift, over those that can:

    K_h[d] = mean of A_h[q, q + d] over the images and the queries q for which q + d is inside the grid

With B_h[q, k] the mean of A_h[q, k] over images, the squares of A_h, summed over keys and queries and averaged over
images, are exactly the sum of the squares of three parts, since each is orthogonal to the others:

    K_h[k - q]                what a convolution does: the same for every query and image
    B_h[q, k] - K_h[k - q]    what depends on the place in the grid, near the border for one
    A_h[q, k] - B_h[q, k]     what depends on the image

Everything is NumPy in float64, and the maps may be anyone's.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

WINDOW_SHARES = (0.5, 0.9, 0.99)
TARGET_WINDOW = 3  # a head whose best window of this side holds half its mass has a target


class Average(NamedTuple):
    """Attention maps of one layer, averaged over images as far as `dependence` needs it.

    Attributes:
      images: number of images.
      mean: B_h[q, k], each probability A_h[q, k] averaged over images.
      squares: the sum of A_h[q, k]^2 over queries and keys, averaged over images.
    """

    images: int
    mean: Float[np.ndarray, "heads H W H W"]
    squares: Float[np.ndarray, "heads"]

    @classmethod
    def of(cls, maps: Shaped[np.ndarray, "images heads H W H W"]) -> "Average":
        """Returns the average of the maps of some images."""
        maps = np.asarray(maps, np.float64)
        return cls(len(maps), maps.mean(0), np.square(maps).sum((2, 3, 4, 5)).mean(0))

    def with_more(self, other: "Average") -> "Average":
        """Returns the average over the images of both."""
        images = self.images + other.images
        share = other.images / images
        mean = self.mean + share * (other.mean - self.mean)
        return Average(images, mean, self.squares + share * (other.squares - self.squares))


class Dependence(NamedTuple):
    """Shares of the squared probabilities; they sum to 1 for each head."""

    shift: Float[np.ndarray, "heads"]
    place: Float[np.ndarray, "heads"]
    content: Float[np.ndarray, "heads"]


class Window(NamedTuple):
    """A square window of shifts.

    Attributes:
      top: its first row shift, in pixels.
      left: its first column shift.
      side: number of its rows and columns.
    """

    top: int
    left: int
    side: int


def queries_by_shift(height: int, width: int) -> Int[np.ndarray, "2*{height}-1 2*{width}-1"]:
    """Returns how many queries of a grid have a key at each shift; shift 0 is in the middle."""
    rows, columns = (side - np.abs(np.arange(1 - side, side)) for side in (height, width))
    return rows[:, None] * columns


def kernels(mean: Float[np.ndarray, "heads H W H W"]) -> Float[np.ndarray, "heads rows columns"]:
    """Returns the kernel K_h[d] that each head has on the grid; shift 0 is in the middle.

    It is the mean probability at each of the (2H - 1) x (2W - 1) shifts, over the queries that have a key there.
    """
    heads, height, width, _, _ = mean.shape
    sums = np.zeros((heads, 2 * height - 1, 2 * width - 1))
    for i in range(height):
        for j in range(width):
            sums[:, height - 1 - i : 2 * height - 1 - i, width - 1 - j : 2 * width - 1 - j] += mean[:, i, j]
    return sums / queries_by_shift(height, width)


def dependence(average: Average) -> Dependence:
    """Returns how much of each head's squared probabilities depends on the shift, the place and the content."""
    _, height, width, _, _ = average.mean.shape
    by_shift = (np.square(kernels(average.mean)) * queries_by_shift(height, width)).sum((1, 2)) / average.squares
    by_mean = np.square(average.mean).sum((1, 2, 3, 4)) / average.squares
    return Dependence(by_shift, np.maximum(by_mean - by_shift, 0), np.maximum(1 - by_mean, 0))


def window_sums(values: Float[np.ndarray, "rows columns"], side: int) -> Float[np.ndarray, "tops lefts"]:
    """Returns the sum of `values` in each `side` x `side` window; one longer than the array is cut to it."""
    sides = [min(side, length) for length in values.shape]
    return np.lib.stride_tricks.sliding_window_view(values, sides).sum((2, 3))


def best_window(values: Float[np.ndarray, "rows columns"], side: int) -> tuple[Window, float]:
    """Returns the window with the largest sum, and that sum; among equals the one nearest to shift 0.

    Args:
      values: by shift, none of them negative; shift 0 is in the middle.
      side: rows and columns of the window, at most those of `values`.
    """
    sums = window_sums(values, side)
    rows, columns = (np.arange(n) - length // 2 for n, length in zip(sums.shape, values.shape, strict=True))
    middle = (side - 1) / 2
    distances = (rows[:, None] + middle) ** 2 + (columns + middle) ** 2
    top, left = np.unravel_index(np.where(sums >= sums.max() * (1 - 1e-9), distances, np.inf).argmin(), sums.shape)
    return Window(int(rows[top]), int(columns[left]), side), float(sums[top, left])


def smallest_window(mass: Float[np.ndarray, "rows columns"], share: float) -> int:
    """Returns the side of the smallest square window of shifts, anywhere, that holds a `share` of the mass."""
    wanted = share * mass.sum() * (1 - 1e-6)  # of what float32 makes of it
    sides = range(1, max(mass.shape) + 1)
    return next(side for side in sides if window_sums(mass, side).max() >= wanted)


class Shape(NamedTuple):
    """What one head's kernel looks like, all shifts in pixels.

    Attributes:
      peak_shift: where its largest probability is.
      peak: that probability.
      mean_shift: mean of the shift, weighted with the kernel.
      deviation: standard deviation of the shift along rows and along columns.
      windows: side of the smallest window that holds each of `WINDOW_SHARES` of its mass.
      target: the peak's shift, where the best `TARGET_WINDOW` window holds half the mass; else None.
    """

    peak_shift: tuple[int, int]
    peak: float
    mean_shift: tuple[float, float]
    deviation: tuple[float, float]
    windows: tuple[int, ...]
    target: tuple[int, int] | None


def shape(kernel: Float[np.ndarray, "rows columns"]) -> Shape:
    """Returns what a head's kernel looks like; shares of its mass are of its sum over shifts."""
    rows, columns = (np.arange(length) - length // 2 for length in kernel.shape)
    at = np.unravel_index(kernel.argmax(), kernel.shape)
    mass = kernel / kernel.sum()
    (row, row_deviation), (column, column_deviation) = moments(mass.sum(1), rows), moments(mass.sum(0), columns)
    windows = tuple(smallest_window(mass, share) for share in WINDOW_SHARES)
    peak_shift = (int(rows[at[0]]), int(columns[at[1]]))
    return Shape(
        peak_shift=peak_shift,
        peak=float(kernel[at]),
        mean_shift=(row, column),
        deviation=(row_deviation, column_deviation),
        windows=windows,
        target=peak_shift if windows[0] <= TARGET_WINDOW else None,
    )


def moments(mass: Float[np.ndarray, "shifts"], shifts: Int[np.ndarray, "shifts"]) -> tuple[float, float]:
    """Returns the mean of the shift along one axis and its standard deviation, weighted with `mass`, of sum 1."""
    mean = float(mass @ shifts)
    return mean, float(np.sqrt(mass @ (shifts - mean) ** 2))


def sharing(targets: list[tuple[int, int] | None]) -> list[list[int]]:
    """Returns the groups of heads that have the same target."""
    of_target: dict[tuple[int, int], list[int]] = {}
    for head, target in enumerate(targets):
        if target is not None:
            of_target.setdefault(target, []).append(head)
    return [heads for heads in of_target.values() if len(heads) > 1]


def mirrored(targets: list[tuple[int, int] | None]) -> list[tuple[int, int]]:
    """Returns the pairs of heads with opposite targets, other than the query itself."""

    def pairs() -> Iterator[tuple[int, int]]:
        for a, target in enumerate(targets):
            if target is not None and target != (0, 0):
                opposite = (-target[0], -target[1])
                yield from ((a, b) for b in range(a + 1, len(targets)) if targets[b] == opposite)

    return list(pairs())


def energy(
    kernels: Float[np.ndarray, "heads rows columns"], value: Float[np.ndarray, "heads inputs outputs"]
) -> Float[np.ndarray, "rows columns"]:
    """Returns the squares of the layer's kernel sum_h K_h[d] W_h at each shift d, summed over channels in and out."""
    flat = np.asarray(value, np.float64).reshape(len(value), -1)
    return np.maximum(np.einsum("hrc,hg,grc->rc", kernels, flat @ flat.T, kernels, optimize=True), 0)


def cut_kernel(
    kernels: Float[np.ndarray, "heads rows columns"], value: Float[np.ndarray, "heads inputs outputs"], window: Window
) -> Float[np.ndarray, "side side inputs outputs"]:
    """Returns the layer's kernel sum_h K_h[d] W_h in a window, HWIO."""
    top, left = window.top + kernels.shape[1] // 2, window.left + kernels.shape[2] // 2
    cut = kernels[:, top : top + window.side, left : left + window.side]
    return np.einsum("hrc,hio->rcio", cut, np.asarray(value, np.float64), optimize=True).astype(np.float32)
