"""How far a 3x3 convolution's attention layer is from it by spread, and the bound; writes docs/spread_error.png.

python -m benchmarks.spread_error  # half a minute on 2 cores
"""

import jax
import numpy as np
import tabulate
from etils import epath

from attn_cnn import cli, drawing
from attn_cnn.attention import ConvolutionalAttention
from attn_cnn.convolution import attention_from_convolution
from attn_cnn.convolution.theorem import error_bound

SPREADS = np.geomspace(0.5, 8, 22)
GRID, CHANNELS = 16, 32


def errors(x: jax.Array, kernel: jax.Array, spreads: np.ndarray) -> list[float]:
    """Returns the largest difference between convolution and attention at each spread."""
    dimensions = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dimensions)
    apply = jax.jit(ConvolutionalAttention(kernel.shape[-1], (3, 3)).apply)

    def error(spread):
        params = attention_from_convolution(kernel, spread=float(spread))
        return float(abs(apply({"params": params}, x) - expected).max())

    return [error(spread) for spread in spreads]


def main(_):
    x = jax.random.normal(jax.random.key(0), (4, GRID, GRID, CHANNELS))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, CHANNELS, CHANNELS)) / (9 * CHANNELS) ** 0.5
    largest = float(abs(x).max())
    measured = errors(x, kernel, SPREADS)
    bounds = [error_bound(kernel, float(spread), largest) for spread in SPREADS]
    rows = [
        (f"{s:.2f}", f"{s**2:.1f}", f"{e:.1e}", f"{b:.1e}") for s, e, b in zip(SPREADS, measured, bounds, strict=True)
    ]
    print(tabulate.tabulate(rows, ("s", "s^2", "error", "bound"), disable_numparse=True, stralign="right"))
    figure = drawing.lines(
        SPREADS**2,
        {"largest error of an output": measured, "bound": bounds},
        xscale="log",
        yscale="log",
        ylim=(1e-7, 1e3),
        xlabel="$s^2$, in 1/pixels$^2$",
        ylabel="attention minus convolution",
    )
    drawing.save(figure, epath.Path(__file__).parent.parent / "docs" / "spread_error.png")


if __name__ == "__main__":
    cli.run(main, config=False)
