"""Mixing by full covariances, dense by nature, against a matrix product of the same size; and what could replace it.

    python -m benchmarks.generalized  # about a minute on 2 cores

Each side gives the values and all gradients. `fft` and `window` use that the scores depend on the shift alone: A x is a
correlation with e = exp(score), divided by its sum over the grid.

fft: exact but for rounding, |error| <= c eps |e|_1 max|x| / sum_k e[k - q], unbounded where the center lies outside the
  grid, so that all e[k - q] are small.
window: drops shifts further than `--radius` from the center; |error| <= 2 (1 - m) max|x|, m the probability inside.
"""

import functools

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


def by_image(heads, x, weights, loop=jax.lax.map):
    """Weighted sum of what the heads mix, in the layer's way: all heads of one image after another."""
    probabilities = attention.head_probabilities("quadratic_generalized", heads, x[0])
    total = jax.checkpoint(lambda image, weights: jnp.vdot(attention.mix_dense(probabilities, image), weights))
    return loop(lambda values: total(*values), (x, weights)).sum()


def by_head(mix):
    """The same with `mix`, of one head after another and all images."""

    def total(heads, x, weights, loop=jax.lax.map):
        total = jax.checkpoint(lambda head, weights: jnp.vdot(mix(head, x), weights))
        return loop(lambda values: total(*values), (heads, weights)).sum()

    return total


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


def plain(probabilities, x, weights):
    """One product of all heads' matrices with all images."""
    return jnp.vdot(probabilities @ x, weights)


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
    totals = {"quadratic_generalized": by_image, "fft": by_head(fft), "window": by_head(window)}
    sides = {"product": common.function_side(jax.value_and_grad(plain, (0, 1)), *arguments["product"], images=batch)}
    for name, total in totals.items():
        looped = jax.value_and_grad(total, (0, 1))
        counted = jax.value_and_grad(functools.partial(total, loop=at_once), (0, 1))
        sides[name] = common.function_side(looped, *arguments[name], images=batch, counted=counted)
    print(common.table(sides, common.alternate(sides, ROUNDS.value), "product"))
    expected = attention.mix_dense(attention.head_probabilities("quadratic_generalized", heads, x[0]), x[0])
    for name, mix in {"fft": fft, "window": window}.items():
        error = jnp.abs(jax.vmap(mix, (0, None))(heads, x[:1])[:, 0] - expected).max()
        print(f"{name}: largest difference {error:.1e} of values up to {jnp.abs(expected).max():.1f}")


if __name__ == "__main__":
    app.run(main)
