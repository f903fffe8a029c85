"""Multi-head self-attention over a pixel grid, where every head mixes the whole hidden vector (paper, eq. 3).

    y_h[q] = sum_k A_h[q, k] x[k],        output = sum_h y_h W_h + b

For separable encodings A_h = R_h (x) C_h, a row factor and a column factor, and the mixing costs
O(heads * H * W * (H + W) * D) instead of O(heads * (H * W)^2 * D), with no approximation.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from attn_cnn import positions
from attn_cnn.errors import UserError

CENTER_STD = 2.0
SPREAD_STD = 0.01
# Values that heads mix at a time. On a CPU 4 MB of float32 stay in its caches: up to 1.3 times as fast as whole batches
# at a 16x16 grid (benchmarks/RESULTS.md). Accelerators want large products.
CPU_BLOCK, ACCELERATOR_BLOCK = 2**20, 2**27


def fan_in_uniform(fan_in: int) -> nn.initializers.Initializer:
    """Uniform in +-1/sqrt(fan_in): PyTorch's default for weights and biases, which the paper trains from."""

    def init(key, shape, dtype=jnp.float32):
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def dense(features: int, fan_in: int, **kwargs) -> nn.Dense:
    """A Linear with PyTorch's initialisation."""
    init = fan_in_uniform(fan_in)
    return nn.Dense(features, kernel_init=init, bias_init=init, **kwargs)


def joint(row: Float[Array, "heads H #W H"], column: Float[Array, "heads #H W W"]) -> Float[Array, "heads H W H W"]:
    """A = R (x) C: probabilities over the whole grid from those over rows and over columns."""
    return row[..., :, None] * column[..., None, :]


# The products below have one contracted and at most one batch dimension, spelled out by reshaping: for more XLA would
# transpose the grid back and forth, most of all in the gradients.


def mix_dense(
    probabilities: Float[Array, "heads H W H W"], x: Float[Array, "H W features"]
) -> Float[Array, "heads H W features"]:
    """y_h[q] = sum_k A_h[q, k] x[k]."""
    height, width, features = x.shape
    A = probabilities.reshape(-1, height * width)
    return (A @ x.reshape(-1, features)).reshape(-1, height, width, features)


def mix_factored(
    row: Float[Array, "heads H H"], column: Float[Array, "heads W W"], x: Float[Array, "H W features"]
) -> Float[Array, "heads H W features"]:
    """The same sum, one grid axis at a time: (R_h (x) C_h) x = C_h (R_h x)."""
    height, width, features = x.shape
    heads = len(row)
    rows = (row.reshape(-1, height) @ x.reshape(height, -1)).reshape(-1, width, features)
    column = jnp.broadcast_to(column[:, None], (heads, height, width, width)).reshape(-1, width, width)
    return jnp.einsum("njl,nld->njd", column, rows).reshape(heads, height, width, features)


def mix(
    probabilities: tuple[Float[Array, "heads H 1 H"], Float[Array, "heads 1 W W"]] | Float[Array, "heads H W H W"],
    x: Float[Array, "H W features"],
) -> Float[Array, "heads H W features"]:
    """The same, given two factors or the whole, in the type of x."""
    if isinstance(probabilities, tuple):
        row, column = probabilities
        return mix_factored(row[:, :, 0].astype(x.dtype), column[:, 0].astype(x.dtype), x)
    return mix_dense(probabilities.astype(x.dtype), x)


def sum_over_groups(of_group: Callable[[Any], Array], heads: Any, size: int) -> Array:
    """sum_g of_group(heads of g), over groups of `size` heads, which the leading axis of `heads` counts.

    What the backward pass needs of a group it computes again.
    """
    groups = jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), heads)
    y = jax.eval_shape(of_group, jax.tree.map(lambda a: a[0], groups))

    @jax.checkpoint
    def add(total, group):
        return total + of_group(group), None

    return jax.lax.scan(add, jnp.zeros(y.shape, y.dtype), groups)[0]


def largest_divisor(n: int, limit: int) -> int:
    """The largest divisor of `n` that is at most `limit`, or 1."""
    return max(d for d in range(1, n + 1) if n % d == 0 and d <= max(1, limit))


def default_embedding_size(encoding: str, features: int) -> int:
    """Width of the learned tables where none is asked for."""
    return features // 2 if encoding in positions.HALVING else features


def embedding_tables(
    module: nn.Module, max_side: int, width: int
) -> tuple[Float[Array, "shifts {width}"], Float[Array, "shifts {width}"]]:
    """The row and the column table of `module`: one N(0, 1) embedding for each shift in (-max_side, max_side)."""
    shape, init = (2 * max_side - 1, width), nn.initializers.normal(1.0)
    return module.param("row_embeddings", init, shape), module.param("column_embeddings", init, shape)


class Linear(nn.Module):
    """Kernel and bias of a linear map with PyTorch's initialisation, for who composes it with other maps."""

    kernel: tuple[int, ...]
    bias: tuple[int, ...]
    fan_in: int

    @nn.compact
    def __call__(self) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        init = fan_in_uniform(self.fan_in)
        return self.param("kernel", init, self.kernel), self.param("bias", init, self.bias)


class SelfAttention(nn.Module):
    """One attention layer, with any of the encodings.

    Attributes:
      encoding: one of `positions.ENCODINGS`.
      heads: number of heads.
      max_side: largest side of the grid that the learned tables cover.
      embedding_size: width of the learned tables; 0: that of x, or half of it for encodings that halve the query.
      mixing: "factored", "dense", or "auto": factored wherever it is exact, which dropout on the probabilities is not.
        "factored" where it is not exact raises UserError. Factors that differ from query to query (learned_query) are
        multiplied and mix densely in any case.
      dropout: rate at which a probability is dropped. Position-only probabilities are one array for the whole batch,
        and so is their mask, as in the paper's code.
      dropout_on: "probabilities", each by itself, or "factors": entries of R and C, so that whole rows and columns of
        the grid drop out together, for all queries in a row and in a column, and mixing stays factored. Both leave the
        expected probabilities as they are.
      dtype: of the computation; parameters and softmax are float32.
      block: most mixed values, or probabilities, of some heads and images that are there at once; 0: what suits the
        device.
    """

    encoding: str
    heads: int
    max_side: int = 16
    embedding_size: int = 0
    mixing: str = "auto"
    dropout: float = 0.0
    dropout_on: str = "probabilities"
    dtype: Any = jnp.float32
    block: int = 0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch H W features"],
        tables: tuple[Float[Array, "shifts width"], Float[Array, "shifts width"]] | None = None,
        output: tuple[Float[Array, "features out"], Float[Array, "out"]] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "batch H W out"]:
        """Mixes the grid, then applies the layer's value map and, if given, the linear map `output`.

        `tables`: row and column embeddings shared between layers; without, the layer's own.
        """
        batch, height, width, features = x.shape
        x = x.astype(self.dtype)
        rate = self.dropout if train else 0.0
        factored = self._is_factored(rate)
        position_only = self.encoding in positions.POSITION_ONLY

        heads = self._heads(features, tables)
        if self.is_mutable_collection("intermediates"):
            mapped = x[:1] if position_only else x
            maps = jax.lax.map(lambda image: joined(head_probabilities(self.encoding, heads, image)), mapped)
            self.sow("intermediates", "probabilities", maps)

        kernel, bias = Linear((self.heads, features, features), (features,), self.heads * features, name="value")()
        # Two linear maps in a row are one; composing them pays where there are more pixels than rows of the kernel.
        compose = output is not None and x.size // features > self.heads * features
        if compose:
            kernel, bias = kernel @ output[0], bias @ output[0] + output[1]

        def probabilities(heads, keys, image):
            """Two factors if the mixing is factored, else the whole."""
            A = head_probabilities(self.encoding, heads, image)
            if rate and self.dropout_on == "factors":
                A = drop_factors(keys, rate, *A)
            if not factored:
                A = joined(A)
            if rate and self.dropout_on == "probabilities":
                A = drop(keys, rate, A)
            return A

        sharing, at_once, images = self._block_sizes(batch, height * width, features, factored)

        def attend(terms):
            """The sum over `sharing` heads, for all images."""
            shared = probabilities(*terms[:2], x[0]) if position_only else None

            def of_image(numbered):
                image, index = numbered
                heads, keys, kernel = terms
                if rate and not position_only:  # each image has masks of its own
                    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)

                def of_heads(group):
                    shared, heads, keys, value = group
                    mixed = mix(shared if position_only else probabilities(heads, keys, image), image)
                    mixed = jnp.moveaxis(mixed, 0, 2).reshape(height * width, -1)
                    # Cast here, so that the gradient is summed over blocks of images in float32, as groups are.
                    value = value.reshape(mixed.shape[1], -1).astype(self.dtype)
                    return (mixed @ value).astype(jnp.float32)

                return sum_over_groups(of_heads, (shared, heads, keys, kernel), at_once)

            return jax.lax.map(of_image, (x, jnp.arange(batch)), batch_size=images if images > 1 else None)

        keys = jax.random.split(self.make_rng("dropout"), self.heads) if rate else None
        y = sum_over_groups(attend, (heads, keys, kernel), sharing)
        y = y.reshape(batch, height, width, -1) + bias
        if output is not None and not compose:
            y = y.astype(self.dtype) @ output[0].astype(self.dtype) + output[1]
        return y.astype(self.dtype)

    def _block_sizes(self, batch: int, pixels: int, features: int, factored: bool) -> tuple[int, int, int]:
        """Heads whose probabilities for all images are there at once; heads, and images, that are mixed at once."""
        block = self.block or (CPU_BLOCK if jax.default_backend() == "cpu" else ACCELERATOR_BLOCK)
        shared = self.encoding in positions.POSITION_ONLY
        sharing = largest_divisor(self.heads, block // pixels**2) if shared and not factored else self.heads
        head = pixels * (features if shared else max(features, pixels))
        at_once = largest_divisor(sharing, block // head)
        # Several images only where they are small: XLA transposes their gradients back and forth, which takes room too.
        images = max(1, block // 4 // (head * at_once)) if at_once == self.heads else 1
        return sharing, at_once, math.ceil(batch / math.ceil(batch / images))

    def _is_factored(self, rate) -> bool:
        """Whether mixing goes one grid axis at a time; learned_query's factors, one pair a query, are multiplied."""
        separable = self.encoding in positions.SEPARABLE
        exact = separable and (rate == 0 or self.dropout_on == "factors")
        if self.dropout_on == "factors" and not separable:
            raise UserError(f"the {self.encoding} encoding has no factors to drop.")
        if self.mixing == "factored" and not exact:
            raise UserError(
                f"the {self.encoding} encoding has no exact factors"
                + " under dropout on the probabilities." * separable
            )
        return exact and self.mixing != "dense" and self.encoding in positions.POSITION_ONLY

    def _heads(self, features, tables) -> dict[str, Array]:
        """What the scores of each head depend on, beside x; the leading axis counts the heads."""
        if self.encoding.startswith("quadratic"):
            matrix = (2, 2) if self.encoding == "quadratic_generalized" else ()
            return {
                "centers": self.param("centers", nn.initializers.normal(CENTER_STD), (self.heads, 2)),
                "spreads": self.param("spreads", spreads_init(jnp.eye(2) if matrix else 1.0), (self.heads, *matrix)),
            }
        if tables is None:
            width = self.embedding_size or default_embedding_size(self.encoding, features)
            tables = embedding_tables(self, self.max_side, width)
        heads = {}
        if self.encoding != "learned":
            query, query_bias = self._per_head(features, "query")
            scale = features**-0.5
            query, query_bias = scale * query, scale * query_bias
        if self.encoding in positions.HALVING:
            for axis, table, half in zip(
                ("row", "column"), tables, (slice(None, features // 2), slice(features // 2, None)), strict=True
            ):
                # q . r with q = Q^T x + c is x . (Q r) + c . r: few embeddings take the place of many pixels.
                heads[f"{axis}_keys"] = jnp.einsum("dhf,sf->hsd", query[..., half], table)
                heads[f"{axis}_biases"] = jnp.einsum("hf,sf->hs", query_bias[:, half], table)
        else:
            for axis, table in zip(("row", "column"), tables, strict=True):
                maps = dense(self.heads, table.shape[-1], use_bias=False, name=f"{axis}_head_keys")
                heads[f"{axis}_scores"] = maps(table).T
        if self.encoding in positions.CONTENT:
            # Likewise q . k = (K Q^T x + K c) . x + ..., where what is left out is the same for all keys of a query,
            # so that softmax does not see it; with it goes the key's bias, whose gradient is zero.
            key, _ = self._per_head(features, "key")
            heads["query"] = jnp.einsum("dhf,ehf->hde", query, key)
            heads["query_bias"] = jnp.einsum("hf,ehf->he", query_bias, key)
        return heads

    def _per_head(self, features, name):
        return Linear((features, self.heads, features), (self.heads, features), features, name=name)()


def head_probabilities(
    encoding: str, heads: dict[str, Array], x: Float[Array, "H W features"]
) -> tuple[Float[Array, "heads H #W H"], Float[Array, "heads #H W W"]] | Float[Array, "heads H W H W"]:
    """Of each head: the row and the column factor where the encoding is separable, else the whole."""
    height, width, _ = x.shape
    if encoding == "quadratic_generalized":
        return jax.nn.softmax(positions.quadratic_generalized(**heads, height=height, width=width), (-2, -1))
    if encoding in positions.HALVING:
        terms = (heads[name] for name in ("row_keys", "row_biases", "column_keys", "column_biases"))
        row, column = positions.learned_query(x, *terms)
    else:
        if encoding == "quadratic":
            row, column = positions.quadratic(**heads, height=height, width=width)
        else:
            row, column = positions.learned(heads["row_scores"], heads["column_scores"], height, width)
        row, column = row[:, :, None, :], column[:, None, :, :]  # the same for all queries of a row, of a column
    if encoding in positions.SEPARABLE:
        return jax.nn.softmax(row), jax.nn.softmax(column)
    query = jnp.einsum("ijd,hde->hije", x, heads["query"].astype(x.dtype))
    query += heads["query_bias"].astype(x.dtype)[:, None, None]
    return jax.nn.softmax(row[..., :, None] + column[..., None, :] + positions.content(query, x), (-2, -1))


def joined(probabilities) -> Float[Array, "heads H W H W"]:
    """Of factors their product, of the whole itself."""
    return joint(*probabilities) if isinstance(probabilities, tuple) else probabilities


def drop(keys: Key[Array, "heads"], rate: float, values: Float[Array, "heads *shape"]) -> Float[Array, "heads *shape"]:
    """Each value zero with probability `rate`, else scaled up so that its expectation stays; one key a head."""
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, values.shape[1:]))(keys)
    return jnp.where(kept, values / (1 - rate), 0)


def drop_factors(
    keys: Key[Array, "heads"], rate: float, row: Float[Array, "heads *rows"], column: Float[Array, "heads *columns"]
) -> tuple[Float[Array, "heads *rows"], Float[Array, "heads *columns"]]:
    """Drops entries of both factors, so that one of their product is dropped with probability `rate`."""
    row_keys, column_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    each = 1 - (1 - rate) ** 0.5
    return drop(row_keys, each, row), drop(column_keys, each, column)


def spreads_init(mean: float | Array) -> nn.initializers.Initializer:
    """`mean` + N(0, 0.01^2): 1 for a scalar spread, the identity for a matrix."""

    def init(key, shape, dtype=jnp.float32):
        return mean + SPREAD_STD * jax.random.normal(key, shape, dtype)

    return init


def attention_maps(
    module: nn.Module, params: dict, images: Float[Array, "batch height width channels"]
) -> list[Float[Array, "_ heads H W H W"]]:
    """Attention probabilities of every layer: query grid, then key grid; each sums to 1 over the last two axes.

    The leading axis is 1 for position-only encodings and the batch otherwise. `images` are normalised, NHWC.

    Raises:
      UserError: the model has no attention layers.
    """
    _, collected = module.apply({"params": params}, images, train=False, mutable=["intermediates"])
    layers = collected.get("intermediates", {})
    if not layers:
        raise UserError(f"{type(module).__name__} has no attention layers to map.")
    return [layers[f"layer_{i}"]["attention"]["probabilities"][0] for i in range(len(layers))]
