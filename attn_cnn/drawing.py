"""Arrays to figures, in one style; colours are told apart by the colour-blind, and in grey."""

import io
from collections.abc import Mapping, Sequence

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from etils import epath
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from attn_cnn.errors import UserError, first_line

# Okabe and Ito's colours without yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX"
SEQUENTIAL = "cividis"
STYLE = {
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "image.cmap": SEQUENTIAL,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS) + matplotlib.cycler(marker=list(MARKERS)),
}

Outline = tuple[float, float, float, float]  # top, left, height and width, in shifts


def by_shift(
    rows: Sequence[Sequence[Float[np.ndarray, "_ _"]]],
    titles: Sequence[Sequence[str]],
    labels: Sequence[str],
    outlines: Mapping[tuple[int, int], Sequence[Outline]] | None = None,
) -> Figure:
    """Draws images over shifts, each scaled by itself, with a cross at shift 0.

    Args:
      rows: rows of images, each with shift 0 in the middle.
      titles: what stands above each image.
      labels: what stands beside each row.
      outlines: windows of shifts to outline, by the row and column of the image.
    """
    columns = max(map(len, rows))
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, grid = plt.subplots(len(rows), columns, figsize=(1.25 * columns + 0.4, 1.5 * len(rows)), squeeze=False)
        for i, images in enumerate(rows):
            for j, axes in enumerate(grid[i]):
                if j >= len(images):
                    axes.set_axis_off()
                    continue
                _image(axes, images[j], titles[i][j])
                for top, left, height, width in (outlines or {}).get((i, j), ()):
                    corner = (left - 0.5, top - 0.5)
                    axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=COLOURS[1], linewidth=1))
            grid[i][0].set_ylabel(labels[i])
    return figure


def _image(axes: plt.Axes, image: np.ndarray, title: str) -> None:
    height, width = (length // 2 for length in image.shape)
    extent = (-width - 0.5, width + 0.5, height + 0.5, -height - 0.5)
    axes.imshow(image, extent=extent, vmin=0, interpolation="nearest")
    axes.plot(0, 0, marker="+", markersize=6, color=COLOURS[1])
    axes.set_title(title)
    axes.set_xticks([])
    axes.set_yticks([])


def lines(x: Sequence[float], series: Mapping[str, Sequence[float | None]], **axes: object) -> Figure:
    """Draws a line for each of the `series` over `x`; `axes` are set on the axes, as in xlabel="spread"."""
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(6, 3.6))
        for name, values in series.items():
            ax.plot(x, [np.nan if value is None else value for value in values], label=name)
        ax.set(**axes)
        ax.legend()
    return figure


def save(figure: Figure, path: epath.Path) -> None:
    """Writes a figure as PNG.

    Raises:
      UserError: it cannot be written.
    """
    content = io.BytesIO()
    figure.savefig(content, dpi=150, format="png")
    plt.close(figure)
    try:
        path.write_bytes(content.getvalue())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {first_line(error)}") from None
