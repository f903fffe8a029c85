"""Cost of one paper-scale layer by grid side, 8 to 64: factored, dense and convolution; writes docs/sides.png.

    python -m benchmarks.sides  # about 2 minutes on 2 cores

A layer's values and all its gradients, for 2 images.
"""

import statistics
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import flags
from etils import epath
from matplotlib.figure import Figure

from attn_cnn import cli, drawing
from attn_cnn.attention import SelfAttention
from attn_cnn.layers import Convolution, LinearMap
from attn_cnn.mixing import UNBOUNDED, Device
from benchmarks import common

SIDES = flags.DEFINE_list("sides", ["8", "16", "24", "32", "48", "64"], "Grid sides.")
flags.register_validator("sides", common.are_positive, "Give whole numbers above 0, as in 8,16.")
BATCH = flags.DEFINE_integer("batch", 2, "Images.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds of each form.", lower_bound=2)
HEADS, FEATURES = 9, 400
CONVOLUTION = "3x3 convolution"


def layers(device: Device | None) -> dict[str, nn.Module]:
    """Returns the layers to compare, for a device."""
    forms = ("dense", "factored")
    attention = {form: SelfAttention("quadratic", HEADS, mixing=form, device=device) for form in forms}
    return attention | {CONVOLUTION: Convolution(3)}


def gradients(layer: nn.Module, then: LinearMap) -> Callable:
    """Returns a function from parameters and x to a layer's squared values, summed, and all gradients."""

    def total(params, x):
        return jnp.square(layer.apply(params, x, then)).sum()

    return jax.value_and_grad(total, (0, 1))


def layer_sides(grid: int) -> dict[str, common.Side]:
    """Returns the layers on a `grid` x `grid` of pixels."""
    x = jax.random.normal(jax.random.key(0), (BATCH.value, grid, grid, FEATURES))
    identity = LinearMap(jnp.eye(FEATURES), jnp.zeros(FEATURES))
    in_one_block, sides = layers(UNBOUNDED), {}
    for name, layer in layers(None).items():
        params = layer.init(jax.random.key(0), x, identity)
        counted = gradients(in_one_block[name], identity)
        sides[name] = common.function_side(gradients(layer, identity), params, x, images=BATCH.value, counted=counted)
    return sides


def draw(grids: list[int], milliseconds: dict[str, list[float]]) -> Figure:
    """Draws a line for each layer, both axes logarithmic."""
    labels = {"xlabel": "grid side", "ylabel": "ms an image, values and gradients"}
    figure = drawing.lines(grids, milliseconds, xscale="log", yscale="log", **labels)
    figure.axes[0].set_xticks(grids, map(str, grids))
    figure.axes[0].minorticks_off()
    return figure


def main(_):
    grids, milliseconds = list(map(int, SIDES.value)), {name: [] for name in layers(None)}
    for grid in grids:
        sides = layer_sides(grid)
        seconds = common.alternate(sides, ROUNDS.value)
        print(f"\n{grid}x{grid}\n{common.table(sides, seconds, CONVOLUTION)}", flush=True)
        for name, values in milliseconds.items():
            values.append(statistics.median(seconds[name]) / BATCH.value * 1e3)
    drawing.save(draw(grids, milliseconds), epath.Path(__file__).parent.parent / "docs" / "sides.png")


if __name__ == "__main__":
    cli.run(main, config=False)
