"""Mixing by full covariances, dense by nature, against a matrix product of the same size; and what could replace it.

    python -m benchmarks.generalized  # about a minute on 2 cores

Each side gives the values and all gradients. `fft` and `window` use that the scores depend on the shift alone: A x is a
correlation with e = exp(score), divided by its sum over the grid.

fft: exact but for rounding, |error| <= c eps |e|_1 max|x| / sum_k e[k - q], unbounded where the center lies outside the
  grid, so that all e[k - q] are small.
window: drops shifts further than `--radius` from the center; |error| <= 2 (1 - m) max|x|, m the probability inside.
"""

import jax
import jax.numpy as jnp
from absl import app, flags

from attn_cnn import attention, positions
from benchmarks import common

GRID = flags.DEFINE_integer("grid", 16, "Side of the grid.")
BATCH = flags.DEFINE_integer("batch", 20, "Images.")
RADIUS = flags.DEFINE_integer("radius", 4, "Of the window, in pixels.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Rounds of each side.")
HEADS, FEATURES = 9, 400


def by_image(heads, x, loop=jax.lax.map):
    """What the heads mix, in the layer's way: all heads of one image after another."""
    probabilities = attention.head_probabilities("quadratic_generalized", heads, x[0])
    return loop(jax.checkpoint(lambda image: attention.mix_dense(probabilities, image)), x)


def by_head(mix):
    """The same with `mix`, of one head after another and all images."""
    return lambda heads, x, loop=jax.lax.map: loop(jax.checkpoint(lambda head: mix(head, x)), heads)


def at_once(function, values):
    """`jax.lax.map` without its loop, of which the compiler counts one round."""
    return jax.vmap(function)(values)


def by_shift(head, side):
    """exp(score) of all shifts in (-side, side)^2, scaled to a largest value of 1."""
    head = jax.tree.map(lambda a: a[None], head)
    scores = positions.quadratic_generalized(**head, height=2 * side - 1, width=2 * side - 1)[0, side - 1, side - 1]
    return jnp.exp(scores - scores.max())


def correlate_fft(e, x):
    size = 3 * x.shape[1] - 2
    spectrum = jnp.conj(jnp.fft.rfft2(e, (size, size)))[..., None]
    start, side = x.shape[1] - 1, x.shape[1]
    full = jnp.fft.irfft2(jnp.fft.rfft2(x, (size, size), axes=(1, 2)) * spectrum, (size, size), axes=(1, 2))
    return jnp.roll(full, (start, start), (1, 2))[:, :side, :side]


def fft(head, x):
    side = x.shape[1]
    e = by_shift(head, side)
    return correlate_fft(e, x) / correlate_fft(e, jnp.ones((1, side, side, 1)))


def window(head, x):
    side, radius = x.shape[1], RADIUS.value
    center = jnp.round(jax.lax.stop_gradient(head["centers"])).astype(int)
    around = [center[0] + side - 1 - radius, center[1] + side - 1 - radius]
    e = jax.lax.dynamic_slice(jnp.pad(by_shift(head, side), radius), [a + radius for a in around], [2 * radius + 1] * 2)
    border = ((0, 0), (side, side), (side, side), (0, 0))
    start = [center[0] + side - radius, center[1] + side - radius]

    def correlate(x):
        padded = jnp.pad(x, border)
        return sum(
            e[r, c] * jax.lax.dynamic_slice(padded, (0, start[0] + r, start[1] + c, 0), x.shape)
            for r in range(2 * radius + 1)
            for c in range(2 * radius + 1)
        )

    return correlate(x) / correlate(jnp.ones((1, side, side, 1)))


def with_gradients(mix, **loop):
    def function(heads, x, weights):
        def total(heads, x):
            return jnp.vdot(mix(heads, x, **loop), weights)

        return jax.value_and_grad(total, (0, 1))(heads, x)

    return function


def plain(probabilities, x, weights):
    """One product of all heads' matrices with all images, and its two gradients."""
    return jax.value_and_grad(lambda a, x: jnp.vdot(a @ x, weights), (0, 1))(probabilities, x)


def main(_):
    side, batch = GRID.value, BATCH.value
    key = jax.random.key(0)
    x, weights = jax.random.normal(key, (2, batch, side, side, FEATURES))
    heads = {
        "centers": jax.random.uniform(key, (HEADS, 2), minval=-2, maxval=2),
        "spreads": attention.spreads_init(jnp.eye(2))(key, (HEADS, 2, 2)),
    }
    matrices = jax.nn.softmax(jax.random.normal(key, (HEADS * side**2, side**2)))
    columns = x.transpose(1, 2, 0, 3).reshape(side**2, -1)
    every_head = jnp.tile(weights, (HEADS, 1, 1, 1, 1))
    arguments = {"product": (matrices, columns, jnp.tile(columns, (HEADS, 1)))}
    arguments["quadratic_generalized"] = (heads, x, every_head.swapaxes(0, 1))
    arguments["fft"] = arguments["window"] = (heads, x, every_head)
    mixes = {"quadratic_generalized": by_image, "fft": by_head(fft), "window": by_head(window)}
    sides = {"product": common.function_side(plain, *arguments["product"], images=batch)} | {
        name: common.function_side(
            with_gradients(mix), *arguments[name], images=batch, counted=with_gradients(mix, loop=at_once)
        )
        for name, mix in mixes.items()
    }
    print(common.table(sides, common.alternate(sides, ROUNDS.value), "product"))
    expected = by_image(heads, x).swapaxes(0, 1)
    for name in ("fft", "window"):
        error = jnp.abs(mixes[name](heads, x) - expected).max()
        print(f"{name}: largest difference {error:.1e} of values up to {jnp.abs(expected).max():.1f}")


if __name__ == "__main__":
    app.run(main)
