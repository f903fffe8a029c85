"""How far and how sharply heads look, by layer, as box plots: nonlocality (d'Ascoli et al. 2021) and entropy."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attn_cnn import drawing
from attn_cnn.figures.sources import Numbers

PANELS = {
    "nonlocality": "mean distance to the attended pixel, pixels",
    "entropy": "entropy of a query's attention, nats",
}


@drawing.styled
def draw(numbers: Numbers) -> Figure:
    """Draws a box a layer, with a point for each head, and where uniform attention would be."""
    figure, (row,) = drawing.panels(1, 2, 1.8 + 0.35 * len(numbers), 3.0)
    for axes, (name, label) in zip(row, PANELS.items(), strict=True):
        _boxes(axes, {layer: of_layer[name] for layer, of_layer in numbers.items()})
        values = np.concatenate([of_layer[name] for of_layer in numbers.values()])
        uniform = [_uniform(*map(int, of_layer["grid"][0]))[name] for of_layer in numbers.values()]
        for place, value in enumerate(uniform):
            axes.hlines(value, place - 0.4, place + 0.4, color="0.3", linestyle=(0, (4, 2)), linewidth=1)
        axes.text(-0.4, uniform[0], "uniform", fontsize=drawing.SMALL, color="0.3", ha="left", va="bottom")
        axes.set(xlabel="layer", title=label, ylim=(-0.03 * max(uniform), 1.1 * max(*uniform, *values)))
    drawing.legend_of_heads(figure, range(max(len(n["entropy"]) for n in numbers.values())), lines=False)
    return figure


def _boxes(axes: Axes, layers: Mapping[int, np.ndarray]) -> None:
    places = range(len(layers))
    style = {"color": "0.35", "linewidth": 1}
    axes.boxplot(
        list(layers.values()),
        positions=places,
        widths=0.55,
        showfliers=False,  # every head is a point
        boxprops=style,
        whiskerprops=style,
        capprops=style,
        medianprops={"color": "black", "linewidth": 1.5},
    )
    for place, values in zip(places, layers.values(), strict=True):
        along = place + np.linspace(-0.2, 0.2, len(values)) * (len(values) > 1)
        colours = [drawing.head_colour(head) for head in range(len(values))]
        axes.scatter(along, values, c=colours, s=18, marker="o", zorder=3)
    axes.set_xticks(list(places), [str(layer) for layer in layers])
    axes.grid(False, axis="x")


def _uniform(height: int, width: int) -> dict[str, float]:
    """Returns nonlocality and entropy of a head that attends to all pixels of a grid alike."""
    rows, columns = (np.subtract.outer(np.arange(side), np.arange(side)) for side in (height, width))
    distances = np.hypot(rows[:, None, :, None], columns[None, :, None, :])
    return {"nonlocality": float(distances.mean()), "entropy": float(np.log(height * width))}
