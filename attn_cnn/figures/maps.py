"""Attention maps, layers below each other and heads side by side: the paper's Figures 5 and 6, and its appendix."""

from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attn_cnn import drawing
from attn_cnn.encodings import Parts
from attn_cnn.figures.sources import Image, Query, Seen

CELL = (0.78, 0.95)  # inches of a panel; side by side they are narrower
NARROW = (0.56, 0.75)


@drawing.styled
def draw(layers: Mapping[int, Seen], image: Image | None, text: str) -> Figure:
    """Draws layers x heads, averaged over the images they are of; the query pixels are side by side in blocks.

    Args:
      layers: what the heads of each layer see.
      image: what they look at, to lie underneath; None: nothing does.
      text: what stands below all panels.
    """
    queries, heads = len(next(iter(layers.values())).queries), max(s.probabilities.shape[2] for s in layers.values())
    widths = ([1] * heads + [0.35]) * queries
    figure, grid = drawing.panels(len(layers), len(widths) - 1, *(CELL if queries == 1 else NARROW), ratios=widths[:-1])
    for row, (number, seen) in zip(grid, layers.items(), strict=True):
        for axes in row:
            axes.set_axis_off()
        mean = seen.probabilities.mean(0, dtype=np.float64)
        for block, query in enumerate(seen.queries):
            for head, probabilities in enumerate(mean[block]):
                axes = row[block * (heads + 1) + head]
                axes.set_axis_on()
                drawing.attention_map(axes, probabilities, query, image)
        row[0].set_ylabel(f"layer {number}")
    _name_heads(grid[0], heads)
    drawing.note(figure, text)
    return figure


def _name_heads(row: Iterable[Axes], heads: int) -> None:
    for column, axes in enumerate(row):
        if axes.get_title():
            axes.set_title(f"head {column % (heads + 1)}\n{axes.get_title()}", fontsize=drawing.SMALL, pad=2)


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
    _name_heads(grid[0], heads)
    drawing.note(
        figure,
        f"layer {layer}, query {query}; scores (purple: above their mean) and probabilities, each scaled by its "
        "largest, which stands above",
    )
    return figure


def caption(queries: Sequence[Query], images: int, shown: bool) -> str:
    """Returns what stands below maps: which queries, of how many images, and how they are scaled."""
    where = "query " + ", ".join(f"({row}, {column})" for row, column in queries)
    what = (
        "the image underneath" if shown else "one map for all images" if images == 1 else f"mean over {images} images"
    )
    return f"{where}; {what}; each map is scaled by its largest probability, which stands above"
