"""Arrays to figures, in one style; colours are told apart by the colour-blind, and in grey.

Nothing here goes through pyplot, whose windows belong to the main thread: training draws beside it.
"""

import functools
import io
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from etils import epath
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.rcsetup import cycler

from attn_cnn import paths, regions
from attn_cnn.heads.views import LayerView
from attn_cnn.regions import SHARES

# Okabe and Ito's colours without yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX"
# Of heads: Tol's "muted", nine as the paper has; the tenth head has the first one's again.
HEADS = ("#332288", "#CC6677", "#117733", "#88CCEE", "#882255", "#999933", "#44AA99", "#AA4499", "#DDCC77")
LINES: tuple[dict[str, Any], ...] = (  # of regions.SHARES; a white edge makes the solid ones visible on the black query
    {"linestyle": "-", "linewidth": 1.6, "path_effects": [withStroke(linewidth=2.4, foreground="white")]},
    {"linestyle": (0, (1, 1.2)), "linewidth": 1.1},
)
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
    "axes.prop_cycle": cycler(color=COLOURS) + cycler(marker=list(MARKERS)),
    "svg.hashsalt": "attn_cnn",  # else the names of clip paths are drawn at random
    "svg.fonttype": "none",
}
SMALL = 7  # size of numbers above small panels

Outline = tuple[float, float, float, float]  # top, left, height and width, in shifts


def styled(draw: Callable) -> Callable:
    """Lets `draw` run with the project's style."""

    @functools.wraps(draw)
    def with_style(*args, **kwargs):
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return with_style


def panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """Returns a figure with a grid of axes, each `width` by `height` inches with what surrounds it."""
    figure = Figure(figsize=(width * columns, height * rows))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def note(figure: Figure, text: str) -> None:
    """Puts a text below all panels, in as many lines as the figure's width asks for."""
    figure.supxlabel(textwrap.fill(text, int(14 * figure.get_figwidth())), fontsize=8, color="0.3")


def rows_and_columns(number: int) -> tuple[int, int]:
    """Returns how so many panels of a figure's width stand: at most four side by side, as evenly as they can."""
    rows = -(-number // 4)
    return rows, -(-number // rows)


def bare(axes: Axes) -> None:
    """Leaves of `axes` a thin frame."""
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set(visible=True, linewidth=0.5, color="0.6")


def pixel_axes(axes: Axes, grid: tuple[int, int], lines: bool = True) -> None:
    """Makes `axes` show the pixels of a grid, rows downwards, with lines between them."""
    height, width = grid
    bare(axes)
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), aspect="equal")
    if lines:
        style: dict[str, Any] = {"color": "0.88", "linewidth": 0.5, "zorder": 0}
        axes.vlines(np.arange(width - 1) + 0.5, -0.5, height - 0.5, **style)
        axes.hlines(np.arange(height - 1) + 0.5, -0.5, width - 0.5, **style)


def mark_query(axes: Axes, query: tuple[int, int] = (0, 0), filled: bool = True) -> None:
    """Puts a black square on the query pixel; one that is not `filled` has a white edge and shows what is inside."""
    row, column = query
    place = ((column - 0.5, row - 0.5), 1, 1)
    if filled:
        axes.add_patch(Rectangle(*place, color="black", zorder=2))
        return
    axes.add_patch(Rectangle(*place, fill=False, edgecolor="white", linewidth=2, zorder=5))
    axes.add_patch(Rectangle(*place, fill=False, edgecolor="black", linewidth=1.1, zorder=6))


def head_colour(head: int) -> str:
    """Returns the colour of a head."""
    return HEADS[head % len(HEADS)]


def legend_of_heads(figure: Figure, heads: Iterable[int], lines: bool = True) -> None:
    """Puts what the colours mean below the panels; where there are `lines`, the dashes and the query, too."""
    style: dict[str, Any] = {"linewidth": 2} if lines else {"linestyle": "none", "marker": "o", "markersize": 5}
    handles = [Line2D([], [], color=head_colour(head), label=f"head {head}", **style) for head in heads]
    if lines:
        handles += [
            Line2D([], [], color="0.3", label=f"{share:.0%}", **line) for share, line in zip(SHARES, LINES, strict=True)
        ]
        handles.append(Line2D([], [], color="black", marker="s", linestyle="none", markersize=6, label="query"))
    columns = max(3, int(figure.get_figwidth() / 0.85))
    rows = -(-len(handles) // columns)
    figure.legend(
        borderpad=0,
        handles=handles,
        loc="outside lower center",
        ncols=-(-len(handles) // rows),
        fontsize=8,
        handlelength=1.8,
    )


# Attention from one query


@styled
def attention(views: Mapping[int, LayerView]) -> Figure:
    """Draws where each head of each layer looks from the query pixel, the paper's Figure 4.

    Heads with a score between pixels have the contours that hold 50% and 90% of their probability, all heads of a layer
    in one panel; of other heads the fewest pixels that do, each in a panel of its own.
    """
    if all(callable(head) for view in views.values() for head in view.heads):
        return _contours(views)
    return _pixel_sets(views)


def _contours(views: Mapping[int, LayerView]) -> Figure:
    rows, columns = rows_and_columns(len(views))
    figure, axes = panels(rows, columns, 2.4, 2.5 + 0.5 / rows)  # the legend is half an inch
    for panel in axes.flat[len(views) :]:
        panel.set_axis_off()
    for panel, (number, view) in zip(axes.flat, views.items(), strict=False):
        pixel_axes(panel, view.grid)
        panel.set_title(f"layer {number}")
        mark_query(panel, view.query)
        rectangle = regions.Rectangle.around(view.query, view.grid)
        for head, score in enumerate(view.heads):
            assert callable(score)
            for line, polygons in zip(LINES, regions.outlines(score, rectangle), strict=True):
                for polygon in polygons:
                    row, column = (polygon + view.query).T
                    panel.plot(column, row, color=head_colour(head), marker="", solid_capstyle="round", **line)
    legend_of_heads(figure, range(max(len(view.heads) for view in views.values())))
    return figure


def _pixel_sets(views: Mapping[int, LayerView]) -> Figure:
    columns = max(len(view.heads) for view in views.values())
    figure, axes = panels(len(views), columns, 0.95, 1.15)
    for row, (number, view) in zip(axes, views.items(), strict=True):
        for panel in row[len(view.heads) :]:
            panel.set_axis_off()
        for head, (panel, probabilities) in enumerate(zip(row, view.heads, strict=False)):
            assert not callable(probabilities)
            pixel_axes(panel, view.grid)
            few, many = (regions.fewest_pixels(probabilities, share) for share in SHARES)
            colour = np.array(to_rgb(head_colour(head)))
            image = np.ones((*view.grid, 4))
            image[..., 3] = many.held
            image[..., :3] = np.where(few.held[..., None], colour, 0.65 + 0.35 * colour)
            panel.imshow(image, extent=_extent(view.grid), interpolation="nearest", zorder=1)
            mark_query(panel, view.query, filled=False)
            panel.set_title(f"{few.mass:.0%}, {many.mass:.0%}", fontsize=SMALL, pad=2)
        row[0].set_ylabel(f"layer {number}")
    for head, panel in enumerate(axes[-1]):
        panel.set_xlabel(f"head {head}", fontsize=8)
    note(figure, "the fewest pixels that hold 50% (dark) and 90% (light) of the probability; above, what they hold")
    return figure


def _extent(grid: tuple[int, int]) -> tuple[float, float, float, float]:
    height, width = grid
    return (-0.5, width - 0.5, height - 0.5, -0.5)


def attention_map(
    axes: Axes,
    probabilities: Float[np.ndarray, "H W"],
    query: tuple[int, int],
    image: UInt8[np.ndarray, "height width channels"] | None = None,
) -> None:
    """Draws a head's probabilities from a query pixel, scaled by the largest, which stands above; an image underneath.

    The image is grey and pale, and the more a pixel is attended to the less it shows.
    """
    pixel_axes(axes, probabilities.shape, lines=False)
    largest = probabilities.max()
    scaled = probabilities / largest
    if image is None:
        axes.imshow(scaled, vmin=0, vmax=1, interpolation="nearest")
    else:
        grey = image.mean(-1) / 255
        axes.imshow(grey, cmap="gray", vmin=-1.5, vmax=1, extent=_extent(probabilities.shape), interpolation="nearest")
        layer = np.concatenate([np.broadcast_to(to_rgb(COLOURS[1]), (*scaled.shape, 3)), 0.8 * scaled[..., None]], -1)
        axes.imshow(layer, extent=_extent(probabilities.shape), interpolation="nearest")
    mark_query(axes, query, filled=False)
    axes.set_title(f"{largest:.2f}", fontsize=SMALL, pad=2)


def signed_map(axes: Axes, scores: Float[np.ndarray, "H W"], query: tuple[int, int]) -> None:
    """Draws scores before softmax around their mean, scaled by the largest deviation, which stands above."""
    pixel_axes(axes, scores.shape, lines=False)
    off = scores - scores.mean()
    largest = np.abs(off).max()
    axes.imshow(off, cmap="PuOr", vmin=-largest, vmax=largest, interpolation="nearest")
    mark_query(axes, query, filled=False)
    axes.set_title(f"±{largest:.2g}", fontsize=SMALL, pad=2)


# Numbers


@styled
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
    figure, grid = panels(len(rows), columns, 1.25 + 0.4 / columns, 1.5)
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


def _image(axes: Axes, image: np.ndarray, title: str) -> None:
    height, width = (length // 2 for length in image.shape)
    extent = (-width - 0.5, width + 0.5, height + 0.5, -height - 0.5)
    axes.imshow(image, extent=extent, vmin=0, interpolation="nearest")
    axes.plot(0, 0, marker="+", markersize=6, color=COLOURS[1])
    axes.set_title(title)
    axes.grid(False)
    axes.set_xticks([])
    axes.set_yticks([])


@styled
def lines(x: Sequence[float], series: Mapping[str, Sequence[float]], **axes: object) -> Figure:
    """Draws a line for each of the `series` over `x`; `axes` are set on the axes, as in xlabel="spread"."""
    figure, ((ax,),) = panels(1, 1, 6, 3.6)
    for name, values in series.items():
        ax.plot(x, values, label=name)
    ax.set(**axes)
    ax.legend()
    return figure


# Files


@styled
def pixels(figure: Figure, dpi: int = 100) -> UInt8[np.ndarray, "height width 3"]:
    """Returns a figure as an image."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


@styled
def encoded(figure: Figure, kind: str) -> bytes:
    """Returns a figure as the content of a file, "png" or "svg": the same bytes for the same figure."""
    content = io.BytesIO()
    metadata = {"png": {"Software": None}, "svg": {"Date": None}}[kind]
    figure.savefig(content, dpi=150, format=kind, metadata=metadata)
    return content.getvalue()


def save(figure: Figure, path: epath.Path) -> None:
    """Writes a figure in the format that the path's suffix names, .png or .svg.

    Raises:
      UserError: it cannot be written.
    """
    paths.write(path, encoded(figure, path.suffix.removeprefix(".")))
