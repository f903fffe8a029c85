"""Mixing a grid of pixels with attention probabilities, and the sum over heads that follows (paper, eq. 3).

    y_h[q] = sum_k A_h[q, k] x[k],        output[q] = sum_h y_h[q] W_h

The probabilities A_h come in three forms: `Factors`, `Whole`, or `Weighted` sums of them. Each form can `drop` entries,
`mix` a grid, and become `whole`. `attend_in_blocks` computes the formula in pieces that fit a device. Letters: h the
head, (i, j) the query pixel, (k, l) the key pixel, d a feature in, o a feature out.
"""

import functools
import math
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Key


def drop(keys: Key[Array, "heads"], rate: float, values: Float[Array, "heads *shape"]) -> Float[Array, "heads *shape"]:
    """Sets each value to zero with probability `rate` and scales the others so that the expectation stays."""
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, values.shape[1:]))(keys)
    return jnp.where(kept, values / (1 - rate), 0)


# The products in `mix` have one contracted and at most one batch dimension, spelled out by reshaping: for more XLA
# would transpose the grid back and forth, most of all in the gradients.


class Whole(struct.PyTreeNode):
    """Probabilities as one number for each head, query pixel and key pixel."""

    values: Array  # heads H W H W

    def drop(self, keys: Key[Array, "heads"], rate: float) -> "Whole":
        """Drops each probability by itself; one key a head."""
        return Whole(drop(keys, rate, self.values))

    @jax.named_scope("mixing")
    def mix(self, x: Float[Array, "H W features"]) -> Float[Array, "heads H W features"]:
        """Returns sum_k A_h[q, k] x[k], in the type of x."""
        height, width, features = x.shape
        A = self.values.astype(x.dtype).reshape(-1, height * width)
        return (A @ x.reshape(-1, features)).reshape(-1, height, width, features)

    def whole(self) -> "Whole":
        """Returns itself."""
        return self


class Factors(struct.PyTreeNode):
    """Probabilities A_h = R_h (x) C_h: one over the key's row times one over its column.

    Where the factors are the same for all queries of a row, and of a column, that axis has size 1, and mixing costs
    O(H + W) for each pixel instead of O(H W). Where they differ from query to query, mixing multiplies them first.
    Factors that are shared by all queries may cover some rows and columns of queries alone, as under a stride.
    """

    row: Array  # heads H #W H: query row, query column, key row
    column: Array  # heads #H W W: query row, query column, key column

    def drop(self, keys: Key[Array, "heads"], rate: float) -> "Factors":
        """Drops entries of both factors, so that each of their products is dropped with probability `rate`.

        Whole rows and columns of the grid are dropped together.
        """
        row_keys, column_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        each = 1 - (1 - rate) ** 0.5
        return Factors(drop(row_keys, each, self.row), drop(column_keys, each, self.column))

    @jax.named_scope("mixing")
    def mix(self, x: Float[Array, "H W features"]) -> Float[Array, "heads queryH queryW features"]:
        """Returns (R_h (x) C_h) x = C_h (R_h x), one grid axis at a time, in the type of x."""
        if self.row.shape[2] > 1 or self.column.shape[1] > 1:  # they differ from query to query
            return self.whole().mix(x)
        height, width, features = x.shape
        row, column = self.row[:, :, 0].astype(x.dtype), self.column[:, 0].astype(x.dtype)
        heads, queries, _ = row.shape
        rows = (row.reshape(-1, height) @ x.reshape(height, -1)).reshape(-1, width, features)
        column = jnp.broadcast_to(column[:, None], (heads, queries, *column.shape[1:])).reshape(-1, *column.shape[1:])
        return jnp.einsum("njl,nld->njd", column, rows).reshape(heads, queries, -1, features)

    def whole(self) -> Whole:
        """Multiplies the factors."""
        return Whole(self.row[..., :, None] * self.column[..., None, :])


class Weighted(struct.PyTreeNode):
    """A sum of probabilities, each part multiplied by one weight a head.

    Where the weights of a head are positive and sum to 1, so does every row of the sum.
    """

    weights: tuple[Array, ...]  # heads, for each part
    parts: tuple[Whole | Factors, ...]

    def drop(self, keys: Key[Array, "heads"], rate: float) -> Whole:
        """Drops each probability of the sum by itself; one key a head."""
        return self.whole().drop(keys, rate)

    @jax.named_scope("mixing")
    def mix(self, x: Float[Array, "H W features"]) -> Float[Array, "heads H W features"]:
        """Mixes with each part in its own form and adds the results, in the type of x."""
        return weighted_sum(self.weights, [part.mix(x) for part in self.parts])

    def whole(self) -> Whole:
        """Adds the parts."""
        return Whole(weighted_sum(self.weights, [part.whole().values for part in self.parts]))


def weighted_sum(weights: Sequence[Array], parts: Sequence[Array]) -> Array:
    """Returns the sum of arrays (heads, *shape), each multiplied by one weight a head, in the type of the arrays."""
    weighted = (
        w.astype(part.dtype).reshape(-1, *[1] * (part.ndim - 1)) * part for w, part in zip(weights, parts, strict=True)
    )
    return functools.reduce(operator.add, weighted)


Probabilities = Whole | Factors | Weighted


@runtime_checkable
class Heads(Protocol):
    """A pytree, with the heads on the leading axis of every array, that knows its probabilities for an image."""

    def probabilities(self, image: Float[Array, "H W features"], index: Int[Array, ""] | int) -> Probabilities:
        """Returns the probabilities for `image`, the batch's image number `index`."""
        ...


class Fixed(struct.PyTreeNode):
    """Heads whose probabilities are the same for every image."""

    A: Probabilities

    def probabilities(self, image: Float[Array, "H W features"], index: Int[Array, ""] | int) -> Probabilities:
        """Returns the probabilities, whatever the image."""
        return self.A


class Device(NamedTuple):
    """What the size of blocks depends on: a device's kind, as "cpu", "gpu" or "tpu", and its bytes; 0: unknown."""

    kind: str
    memory: int = 0


UNBOUNDED = Device("any", sys.maxsize)  # everything goes in one block: of a loop XLA's cost analysis counts one round

# On a CPU 4 MB of float32 stay in its caches: up to 1.3 times as fast as whole batches at a 16x16 grid
# (benchmarks/RESULTS.md).
CPU_BLOCK = 2**20
# Small grids are mixed by one head after another, for as many images as fill a block (benchmarks/RESULTS.md).
CPU_SMALL_GRID = 2**15
# Accelerators want large products; what one block holds, in float32, takes at most a sixteenth of the memory, and what
# the backward pass finds there, of the whole layer, a quarter of that. A CPU mixes again instead
# (benchmarks/RESULTS.md).
BYTES_PER_BLOCK_VALUE = 64
ACCELERATORS = ("gpu", "tpu")
UNKNOWN_MEMORY = 2**33


def this_device() -> Device:
    """Returns the device that JAX computes on here."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return Device(jax.default_backend(), stats.get("bytes_limit", 0))


class Blocks(NamedTuple):
    """How much of a layer's work is done at once.

    Attributes:
      held: heads whose probabilities, the same for all images, are held while the images are mixed.
      heads: heads that are mixed at once.
      images: images that are mixed at once.
      recompute: whether the backward pass mixes again what it needs, which then need not be kept.
    """

    held: int
    heads: int
    images: int
    recompute: bool = True


def choose_blocks(
    batch: Any, heads: int, pixels: int, features: int, *, needs_x: bool, whole: bool, device: Device
) -> Blocks:
    """Chooses blocks that are as large as `device` handles well.

    Args:
      batch: number of images; a symbolic dimension of `jax.export` goes image by image.
      heads: number of heads.
      pixels: pixels of the grid.
      features: features of a pixel.
      needs_x: whether probabilities differ from image to image.
      whole: whether probabilities are held as `Whole`.
      device: where the layer runs.
    """
    on_cpu = device.kind == "cpu"
    block = CPU_BLOCK if on_cpu else (device.memory or UNKNOWN_MEMORY) // BYTES_PER_BLOCK_VALUE
    held = largest_divisor(heads, block // pixels**2) if whole and not needs_x else heads
    values_of_head = pixels * (max(features, pixels) if needs_x else features)
    if on_cpu and not needs_x and values_of_head <= CPU_SMALL_GRID and not jax.export.is_symbolic_dim(batch):
        return Blocks(held, 1, even_share(batch, CPU_BLOCK // values_of_head))
    at_once = largest_divisor(held, block // values_of_head)
    if jax.export.is_symbolic_dim(batch) or at_once < heads:
        return Blocks(held, at_once, 1)
    # On a CPU several images only where they are small: XLA transposes their gradients back and forth.
    images = even_share(batch, max(1, (block // 4 if on_cpu else block) // (values_of_head * at_once)))
    kept = device.kind in ACCELERATORS and batch * heads * values_of_head <= block // 4
    return Blocks(held, at_once, images, recompute=not kept)


def even_share(n: int, limit: int) -> int:
    """Returns the share of at most `limit` that cuts `n` into the fewest shares, which are then as even as can be."""
    return math.ceil(n / math.ceil(n / limit))


def largest_divisor(n: int, limit: int) -> int:
    """Returns the largest divisor of `n` that is at most `limit`, or 1."""
    return max(d for d in range(1, n + 1) if n % d == 0 and d <= max(1, limit))


def attend_in_blocks(
    heads: Heads,
    x: Float[Array, "batch H W features"],
    kernel: Float[Array, "heads features out"],
    blocks: Blocks,
    needs_x: bool,
) -> Float[Array, "batch queryH queryW out"]:
    """Returns sum_h A_h x W_h in float32, of `blocks` at a time, with products in the type of x.

    Args:
      heads: the heads; unless `needs_x` their probabilities are computed once for all images.
      x: the grids.
      kernel: the value map W_h of each head, float32.
      blocks: how much to do at once.
      needs_x: whether probabilities differ from image to image.
    """
    if needs_x:
        return _of_images(heads, x, kernel, blocks)

    def of_group(group):
        heads, kernel = group
        return _of_probabilities(heads.probabilities(x[0], 0), x, kernel, blocks)

    return sum_over_groups(of_group, (heads, kernel), blocks.held, blocks.recompute)


def _of_images(heads: Heads, x: Array, kernel: Array, blocks: Blocks) -> Array:
    """Computes the sum over `heads`, whose probabilities are each image's own, one block of images after another."""

    def of_image(numbered):
        image, index = numbered

        def of_group(group):
            heads, kernel = group
            return _apply(kernel, heads.probabilities(image, index).mix(image))

        return sum_over_groups(of_group, (heads, kernel), blocks.heads, blocks.recompute)

    return jax.lax.map(of_image, (x, jnp.arange(x.shape[0])), batch_size=blocks.images if blocks.images > 1 else None)


def _of_probabilities(A: Probabilities, x: Array, kernel: Array, blocks: Blocks) -> Array:
    """Computes the sum over the heads of `A`, the same for all images, for one block of images after another.

    To what mixes pixels, the images of a block are one image with more features: the grid lies in front of the images.
    """
    batch, height, width, features = x.shape
    n = blocks.images

    def of_block(images):
        grid = jnp.moveaxis(images, 0, 2).reshape(height, width, -1)

        def of_group(group):
            A, kernel = group
            mixed = A.mix(grid)
            return _apply(kernel, mixed.reshape(*mixed.shape[:3], len(images), features))

        return jnp.moveaxis(sum_over_groups(of_group, (A, kernel), blocks.heads, blocks.recompute), 2, 0)

    whole = batch // n * n
    y = jax.lax.map(of_block, x[:whole].reshape(batch // n, n, height, width, features))
    y = y.reshape(whole, *y.shape[2:])
    return y if n == 1 or whole == batch else jnp.concatenate([y, of_block(x[whole:])])


def _apply(kernel: Array, mixed: Array) -> Array:
    """Returns sum_h y_h W_h in float32, with y of (heads, *pixels, features)."""
    heads, *pixels, features = mixed.shape
    rows = jnp.moveaxis(mixed.reshape(heads, -1, features), 0, 1).reshape(-1, heads * features)
    # Cast here, so that the gradient is summed over blocks of images in float32, as it is over groups.
    y = (rows @ kernel.reshape(heads * features, -1).astype(mixed.dtype)).astype(jnp.float32)
    return y.reshape(*pixels, -1)


def sum_over_groups(of_group: Callable[[Any], Array], heads: Any, size: int, recompute: bool) -> Array:
    """Returns sum_g of_group(heads of g), over groups of `size` heads.

    `heads` is any pytree whose arrays count the heads on their leading axis. What the backward pass needs of a group is
    computed again where that is asked for, else kept.
    """
    groups = jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), heads)
    y = jax.eval_shape(of_group, jax.tree.map(lambda a: a[0], groups))

    def add(total, group):
        return total + of_group(group), None

    return jax.lax.scan(jax.checkpoint(add) if recompute else add, jnp.zeros(y.shape, y.dtype), groups)[0]
