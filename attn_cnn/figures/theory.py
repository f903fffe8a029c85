"""What the quadratic encoding can do: softmax(-a |d - D|^2) for several a (paper, section 3, after equation 9)."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from attn_cnn import drawing
from attn_cnn.encodings import Quadratic

ALPHAS = (0.02, 0.1, 0.5, 3.0)
CENTER = (-2.0, 4.0)  # D, in pixels
SIDE = 13


def probabilities(
    alphas: Sequence[float], center: tuple[float, float], side: int
) -> Float[np.ndarray, "alphas {side} {side}"]:
    """Returns softmax(-a |d - D|^2) from the middle of a grid, for each a; s^2 of the quadratic encoding is 2 a."""
    heads = Quadratic(jnp.tile(jnp.array(center), (len(alphas), 1)), jnp.sqrt(2 * jnp.array(alphas)))
    middle = side // 2
    return np.asarray(heads.probabilities(jnp.zeros((side, side, 1))).whole().values[:, middle, middle])


@drawing.styled
def draw() -> Figure:
    """Draws a panel for each a, with an arrow from the query to the center D."""
    figure, (row,) = drawing.panels(1, len(ALPHAS), 1.9, 2.15)
    middle = (SIDE // 2, SIDE // 2)
    for axes, alpha, values in zip(row, ALPHAS, probabilities(ALPHAS, CENTER, SIDE), strict=True):
        drawing.attention_map(axes, values, middle)
        axes.set_title(rf"$\alpha$ = {alpha:g}")
        axes.annotate(
            "",
            (middle[1] + CENTER[1], middle[0] + CENTER[0]),
            middle[::-1],
            arrowprops={"arrowstyle": "->", "color": "white", "linewidth": 1.2},
        )
    note = (
        r"softmax$_d$($-\alpha\,|d-\Delta|^2$) with $\Delta$ = "
        + f"({CENTER[0]:g}, {CENTER[1]:g}); each scaled by itself"
    )
    figure.supxlabel(note, fontsize=8, color="0.3")
    return figure
