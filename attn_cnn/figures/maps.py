"""Attention maps, layers below each other and heads side by side: the paper's Figures 5 and 6, and its appendix."""

from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attn_cnn import drawing
from attn_cnn.encodings import Parts
from attn_cnn.figures.sources import Image, Query, Seen

CELL = (0.78, 0.95)  # inches of a panel


@drawing.styled
def draw(layers: Mapping[int, Seen], image: Image | None, text: str) -> Figure:
    """Draws layers x heads, averaged over the images they are of, for one query pixel below the other.

    Args:
      layers: what the heads of each layer see.
      image: what they look at, to lie underneath; None: nothing does.
      text: what stands below all panels.
    """
    queries, heads = len(next(iter(layers.values())).queries), max(s.probabilities.shape[2] for s in layers.values())
    figure, grid = drawing.panels(queries * len(layers), heads, *CELL)
    for axes in grid.flat:
        axes.set_axis_off()
    blocks = grid.reshape(queries, len(layers), heads)
    for place, (number, seen) in enumerate(layers.items()):
        mean = seen.probabilities.mean(0, dtype=np.float64)
        for block, query, of_heads in zip(blocks, seen.queries, mean, strict=True):
            for axes, probabilities in zip(block[place], of_heads, strict=False):
                axes.set_axis_on()
                drawing.attention_map(axes, probabilities, query, image)
            whence = f"from {query}\n" if queries > 1 and not place else ""
            block[place][0].set_ylabel(f"{whence}layer {number}")
    for block in blocks:
        _name_heads(block[0])
    drawing.note(figure, text)
    return figure


def _name_heads(row: Iterable[Axes]) -> None:
    for head, axes in enumerate(row):
        if axes.get_title():
            axes.set_title(f"head {head}\n{axes.get_title()}", fontsize=drawing.SMALL, pad=2)


@drawing.styled
def draw_parts(parts: Parts, query: Query, layer: int) -> Figure:
    """Draws the parts of one layer's scores apart and together, before and after softmax; heads side by side."""
    rows = {
        "position": np.asarray(parts.position),
        "content": np.asarray(parts.content),
        "together": np.asarray(parts.total),
    }
    heads = len(parts.total)
    figure, grid = drawing.panels(2 * len(rows), heads, *CELL)
    for pair, (name, scores) in enumerate(rows.items()):
        probabilities = np.asarray(jax.nn.softmax(scores, (-2, -1)))
        for head in range(heads):
            drawing.signed_map(grid[2 * pair][head], scores[head], query)
            drawing.attention_map(grid[2 * pair + 1][head], probabilities[head], query)
        grid[2 * pair][0].set_ylabel(f"{name}\nscore", fontsize=8)
        grid[2 * pair + 1][0].set_ylabel(f"{name}\nsoftmax", fontsize=8)
    _name_heads(grid[0])
    drawing.note(
        figure,
        f"layer {layer}, query {query}, row first; scores (purple: above their mean) and probabilities, each scaled "
        "by its largest, above it",
    )
    return figure


def caption(queries: Sequence[Query], images: int, shown: bool) -> str:
    """Returns what stands below maps: which queries, of how many images, and how they are scaled."""
    where = "query " + ", ".join(f"({row}, {column})" for row, column in queries) + ", row first"
    what = (
        "the image underneath" if shown else "one map for all images" if images == 1 else f"mean over {images} images"
    )
    return f"{where}; {what}; scaled by the largest probability, above each"
