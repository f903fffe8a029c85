"""Mixing by full covariances, dense by nature, against a matrix product of the same size; and what could replace it.

    python -m benchmarks.generalized  # about a minute on 2 cores

Each side gives the values and all gradients. `fft` and `window` use that the scores depend on the shift alone: A x is a
correlation with e = exp(score), divided by its sum over the grid.

fft: exact but for rounding, |error| <= c eps |e|_1 max|x| / sum_k e[k - q], unbounded where the center lies outside the
  grid, so that all e[k - q] are small.
window: drops shifts further than `--radius` from the center; |error| <= 2 (1 - m) max|x|, m the probability inside.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jaxtyping import Array, Float

from attn_cnn import cli
from attn_cnn.encodings import SPREAD_STD, QuadraticGeneralized
from benchmarks import common

GRID = flags.DEFINE_integer("grid", 16, "Side of the grid.")
BATCH = flags.DEFINE_integer("batch", 20, "Images.")
RADIUS = flags.DEFINE_integer("radius", 4, "Of the window, in pixels.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Rounds of each side.", lower_bound=2)
HEADS, FEATURES = 9, 400

# The sides: weighted sums of what the heads mix. `loop` is `jax.lax.map`, or `at_once` for the compiler to count.


def at_once(function: Callable, values: Any) -> Any:
    """Returns what `jax.lax.map` does, without its loop, of which the compiler counts one round."""
    return jax.vmap(function)(values)


def plain(probabilities: Array, x: Array, weights: Array) -> Array:
    """Mixes all images with all heads' matrices in one product."""
    return jnp.vdot(probabilities @ x, weights)


def by_image(heads: QuadraticGeneralized, x: Array, weights: Array, loop: Callable = jax.lax.map) -> Array:
    """Mixes as the layer does: all heads of one image after another."""
    probabilities = heads.probabilities(x[0])
    total = jax.checkpoint(lambda image, weights: jnp.vdot(probabilities.mix(image), weights))
    return loop(lambda values: total(*values), (x, weights)).sum()


def by_head(
    heads: QuadraticGeneralized, x: Array, weights: Array, loop: Callable = jax.lax.map, *, mix: Callable
) -> Array:
    """Mixes all images with one head after another, by `mix`."""
    total = jax.checkpoint(lambda head, weights: jnp.vdot(mix(head, x), weights))
    return loop(lambda values: total(*values), (heads, weights)).sum()


# Mixing by correlation. A head is an encoding whose arrays have lost their leading axis.


def by_shift(head: QuadraticGeneralized, side: int) -> Float[Array, "shifts shifts"]:
    """Returns exp(score) at all shifts in (-side, side)^2, scaled to a largest value of 1."""
    shifts = jnp.arange(1 - side, side)
    scores = jax.tree.map(lambda a: a[None], head).scores(shifts[:, None], shifts)[0]
    return jnp.exp(scores - scores.max())


def fft(head: QuadraticGeneralized, x: Float[Array, "batch side side features"]) -> Array:
    """Mixes by a product of Fourier transforms."""
    side = x.shape[1]
    e = by_shift(head, side)
    return correlate_fft(e, x) / correlate_fft(e, jnp.ones((1, side, side, 1)))


def correlate_fft(e: Float[Array, "shifts shifts"], x: Float[Array, "batch side side features"]) -> Array:
    """Returns sum_k e[k - q] x[k]."""
    side = x.shape[1]
    size = 3 * side - 2
    spectrum = jnp.conj(jnp.fft.rfft2(e, (size, size)))[..., None]
    full = jnp.fft.irfft2(jnp.fft.rfft2(x, (size, size), axes=(1, 2)) * spectrum, (size, size), axes=(1, 2))
    return jnp.roll(full, (side - 1, side - 1), (1, 2))[:, :side, :side]


def window(head: QuadraticGeneralized, x: Float[Array, "batch side side features"]) -> Array:
    """Mixes by a sum over the shifts around the center."""
    side, radius = x.shape[1], RADIUS.value
    center = jnp.round(jax.lax.stop_gradient(head.centers)).astype(int)
    e = jax.lax.dynamic_slice(jnp.pad(by_shift(head, side), radius), center + side - 1, [2 * radius + 1] * 2)
    start = center + side - radius

    def correlate(x):
        padded = jnp.pad(x, ((0, 0), (side, side), (side, side), (0, 0)))
        return sum(
            e[r, c] * jax.lax.dynamic_slice(padded, (0, start[0] + r, start[1] + c, 0), x.shape)
            for r in range(2 * radius + 1)
            for c in range(2 * radius + 1)
        )

    return correlate(x) / correlate(jnp.ones((1, side, side, 1)))


def product_side(x: Array) -> common.Side:
    """Returns one product of the same size, by matrices of no head in particular."""
    pixels = GRID.value**2
    matrices = jax.nn.softmax(jax.random.normal(jax.random.key(0), (HEADS * pixels, pixels)))
    columns = x.transpose(1, 2, 0, 3).reshape(pixels, -1)
    gradients = jax.value_and_grad(plain, (0, 1))
    return common.function_side(gradients, matrices, columns, jnp.tile(columns, (HEADS, 1)), images=BATCH.value)


def main(_):
    key = jax.random.key(0)
    x, weights = jax.random.normal(key, (2, BATCH.value, GRID.value, GRID.value, FEATURES))
    heads = QuadraticGeneralized(
        centers=jax.random.uniform(key, (HEADS, 2), minval=-2, maxval=2),
        spreads=jnp.eye(2) + SPREAD_STD * jax.random.normal(key, (HEADS, 2, 2)),
    )
    every_head = jnp.tile(weights, (HEADS, 1, 1, 1, 1))
    correlations = {"fft": fft, "window": window}
    totals = {"quadratic_generalized": (by_image, every_head.swapaxes(0, 1))}
    totals |= {name: (functools.partial(by_head, mix=mix), every_head) for name, mix in correlations.items()}
    sides = {"product": product_side(x)}
    for name, (total, weights) in totals.items():
        looped, counted = (
            jax.value_and_grad(functools.partial(total, loop=loop), (0, 1)) for loop in (jax.lax.map, at_once)
        )
        sides[name] = common.function_side(looped, heads, x, weights, images=BATCH.value, counted=counted)
    print(common.table(sides, common.alternate(sides, ROUNDS.value), "product"))
    expected = heads.probabilities(x[0]).mix(x[0])
    for name, mix in correlations.items():
        error = jnp.abs(jax.vmap(mix, (0, None))(heads, x[:1])[:, 0] - expected).max()
        print(f"{name}: largest difference {error:.1e} of values up to {jnp.abs(expected).max():.1f}")


if __name__ == "__main__":
    cli.run(main, config=False)
