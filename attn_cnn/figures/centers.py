"""Centers and spreads of all heads over training (the paper's Figure 3), and the same as an animation.

Of heads that are no Gaussians it is those with mean and covariance of the attended shift: from the query in the middle
of the grid where that is known, else over all queries, at the border too, from which a head cannot look where it would.
"""

import io
from collections.abc import Mapping

import numpy as np
import PIL.Image
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse

from attn_cnn import drawing
from attn_cnn.heads import history
from attn_cnn.regions import SHARES

COLUMNS = 6  # epochs in the still figure
FRAMES = 50  # at most, of the animation
DURATION = 120  # of a frame, in ms; the last one stays for two seconds
LAST = 2000

Numbers = Mapping[str, np.ndarray]  # as `heads/history.py` documents them


def gaussians(
    numbers: Numbers,
) -> tuple[Float[np.ndarray, "epoch layer head 2"], Float[np.ndarray, "epoch layer head 2 2"]]:
    """Returns centers and covariances of heads that are Gaussians, of others mean and covariance of the attended shift.

    Heads that are not there are NaN; where a precision has no inverse, the covariance is huge.
    """
    if "center" in numbers:
        precision = numbers["precision"].astype(np.float64)
        return numbers["center"], np.linalg.inv(precision + 1e-9 * np.eye(2))
    if "row_scores" in numbers:
        return from_the_middle(numbers)
    return numbers["mean_shift"], numbers["covariance"]


def from_the_middle(
    numbers: Numbers,
) -> tuple[Float[np.ndarray, "epoch layer head 2"], Float[np.ndarray, "epoch layer head 2 2"]]:
    """Returns mean and covariance of the shift that heads with row and column scores attend to, from the middle.

    Probabilities are products of one over rows and one over columns, so that the two shifts do not covary.
    """
    axes = [_along(numbers[f"{name}_scores"], numbers["grid"][..., n]) for n, name in enumerate(("row", "column"))]
    means, variances = (np.stack(moments, -1) for moments in zip(*axes, strict=True))
    return means, variances[..., None] * np.eye(2)


def _along(
    scores: Float[np.ndarray, "epoch layer head shifts"], sides: Float[np.ndarray, "epoch layer head"]
) -> tuple[Float[np.ndarray, "epoch layer head"], Float[np.ndarray, "epoch layer head"]]:
    """Returns mean and variance of the shift along one axis, whose scores are given, from the middle of its side."""
    means, variances = np.full(sides.shape, np.nan), np.full(sides.shape, np.nan)
    for layer in np.flatnonzero(np.isfinite(sides).any((0, 2))):
        side = int(np.nanmax(sides[:, layer]))
        shifts = np.arange(side) - side // 2
        scores_there = scores[:, layer][..., shifts + scores.shape[-1] // 2].astype(np.float64)
        mass = np.exp(scores_there - scores_there.max(-1, keepdims=True))
        mass /= mass.sum(-1, keepdims=True)
        means[:, layer] = mass @ shifts
        variances[:, layer] = mass @ shifts**2 - means[:, layer] ** 2
    return means, variances


@drawing.styled
def draw(numbers: Numbers) -> Figure:
    """Draws layers below each other and epochs side by side."""
    centers, covariances = gaussians(numbers)
    layers = _with_heads(centers)
    epochs = chosen(len(centers), COLUMNS)
    figure, grid = drawing.panels(len(layers), len(epochs), 1.45, 1.5)
    reach = _reach(numbers, centers)
    for row, layer in zip(grid, layers, strict=True):
        for axes, epoch in zip(row, epochs, strict=True):
            _heads(axes, centers[epoch, layer], covariances[epoch, layer], reach)
        row[0].set_ylabel(f"layer {layer}")
    for axes, epoch in zip(grid[0], epochs, strict=True):
        axes.set_title(f"epoch {int(numbers['epoch'][epoch])}")
    drawing.legend_of_heads(figure, range(centers.shape[2]))
    if explanation := _explanation(numbers):
        figure.suptitle(explanation, fontsize=8, color="0.3")
    return figure


def animate(numbers: Numbers) -> bytes:
    """Returns the content of a WebP file: layers side by side, frame by frame the epochs."""
    epochs = history.evenly(len(numbers["epoch"]), FRAMES)
    heads = gaussians(numbers)
    frames = [PIL.Image.fromarray(drawing.pixels(_frame(numbers, epoch, *heads), dpi=90)) for epoch in epochs]
    content = io.BytesIO()
    frames[0].save(
        content,
        format="WEBP",
        save_all=True,
        append_images=frames[1:],
        duration=[DURATION] * (len(frames) - 1) + [LAST],
        loop=0,
        quality=80,
    )
    return content.getvalue()


@drawing.styled
def _frame(numbers: Numbers, epoch: int, centers: np.ndarray, covariances: np.ndarray) -> Figure:
    layers = _with_heads(centers)
    figure, grid = drawing.panels(*drawing.rows_and_columns(len(layers)), 2.3, 2.45)
    for axes in grid.flat[len(layers) :]:
        axes.set_axis_off()
    for axes, layer in zip(grid.flat, layers, strict=False):
        _heads(axes, centers[epoch, layer], covariances[epoch, layer], _reach(numbers, centers))
        axes.set_title(f"layer {layer}")
    title = f"epoch {int(numbers['epoch'][epoch])}"
    figure.suptitle("\n".join(filter(None, [title, _explanation(numbers)])), fontsize=9)
    drawing.legend_of_heads(figure, range(centers.shape[2]))
    return figure


def _explanation(numbers: Numbers) -> str:
    """Returns what is drawn of heads that are no Gaussians; nothing where they are."""
    if "center" in numbers:
        return ""
    whence = "from the middle of the grid" if "row_scores" in numbers else "over all queries, at the border too"
    return f"the Gaussians with mean and covariance of the attended shift, {whence}"


def chosen(epochs: int, number: int) -> list[int]:
    """Returns the first epoch, the last, and in between those at about equal ratios, which show how training begins."""
    if epochs <= number:
        return list(range(epochs))
    return sorted({round(epoch) - 1 for epoch in np.geomspace(1, epochs, number)})


def _with_heads(centers: np.ndarray) -> list[int]:
    return np.flatnonzero(np.isfinite(centers).any((0, 2, 3))).tolist()


def _reach(numbers: Numbers, centers: np.ndarray) -> float:
    """Returns the largest shift to show: nearly all centers, and no more than the grid has."""
    side = np.nanmax(numbers["grid"])
    return float(np.clip(np.nanpercentile(np.abs(centers), 98) + 2, 2.5, side - 0.5))


def _heads(axes: Axes, centers: np.ndarray, covariances: np.ndarray, reach: float) -> None:
    """Draws the ellipses that hold `regions.SHARES` of each head's Gaussian, around the query at shift 0."""
    drawing.bare(axes)
    axes.set(xlim=(-reach, reach), ylim=(reach, -reach), aspect="equal")
    inner = np.arange(-int(reach), int(reach) + 2) - 0.5
    axes.vlines(inner, -reach, reach, color="0.9", linewidth=0.4, zorder=0)
    axes.hlines(inner, -reach, reach, color="0.9", linewidth=0.4, zorder=0)
    drawing.mark_query(axes)
    there = np.isfinite(centers[:, 0]) & np.isfinite(covariances).all((1, 2))
    for head in np.flatnonzero(there).tolist():
        axes.plot(*centers[head, ::-1], marker="o", markersize=2, color=drawing.head_colour(head), zorder=4)
        values, vectors = np.linalg.eigh(covariances[head])
        row, column = vectors[:, 1]
        for share, line in zip(SHARES, drawing.LINES, strict=True):
            minor, major = 2 * np.sqrt(-2 * np.log(1 - share) * np.maximum(values, 0))
            angle = np.degrees(np.arctan2(row, column))
            style = {"fill": False, "edgecolor": drawing.head_colour(head), "zorder": 3}
            axes.add_patch(Ellipse(tuple(centers[head, ::-1]), major, minor, angle=angle, **style, **line))
