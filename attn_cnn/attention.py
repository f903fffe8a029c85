"""Multi-head self-attention over a pixel grid, where every head mixes the whole hidden vector (paper, eq. 3).

    y_h[q] = sum_k A_h[q, k] x[k],        output = sum_h y_h W_h + b

For separable encodings A_h = R_h (x) C_h, a row factor and a column factor, and the mixing costs
O(heads * H * W * (H + W) * D) instead of O(heads * (H * W)^2 * D), with no approximation.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from attn_cnn import positions
from attn_cnn.errors import UserError

CENTER_STD = 2.0
SPREAD_STD = 0.01
KEPT = "kept for the backward pass"  # what costs a matrix product of the grid's size to compute


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


def joint(row: Float[Array, "#batch H #W H"], column: Float[Array, "#batch #H W W"]) -> Float[Array, "#batch H W H W"]:
    """A = R (x) C: probabilities over the whole grid from those over rows and over columns."""
    return row[..., :, None] * column[..., None, :]


def mix_dense(
    probabilities: Float[Array, "#batch H W H W"], x: Float[Array, "batch H W features"]
) -> Float[Array, "batch H W features"]:
    """y[q] = sum_k A[q, k] x[k]; without a batch axis of its own A is one matrix for all images."""
    batch, height, width, features = x.shape
    pixels = height * width
    A, x = probabilities.reshape(-1, pixels, pixels), x.reshape(batch, pixels, features)
    if A.shape[0] == 1:  # one large product, with the pixels in front of the images
        y = (A[0] @ x.swapaxes(0, 1).reshape(pixels, -1)).reshape(pixels, batch, features).swapaxes(0, 1)
    else:
        y = jnp.einsum("bqk,bkd->bqd", A, x)
    return checkpoint_name(y.reshape(batch, height, width, features), KEPT)


def mix_factored(
    row: Float[Array, "H H"], column: Float[Array, "W W"], x: Float[Array, "batch H W features"]
) -> Float[Array, "batch H W features"]:
    """The same sum, one grid axis at a time: (R (x) C) x = C (R x)."""
    batch, height, width, _ = x.shape
    # One small product for each image and row: with one for all of them, XLA would transpose x back and forth.
    # Cast last, so that the gradients of the factors are summed over images in float32.
    row = jnp.broadcast_to(row, (batch, height, height)).astype(x.dtype)
    column = jnp.broadcast_to(column, (batch, height, width, width)).astype(x.dtype)
    rows = jnp.einsum("bik,bkn->bin", row, x.reshape(batch, height, -1)).reshape(x.shape)
    return jnp.einsum("bijl,bild->bijd", column, rows)


def sum_over_heads(head: Callable[[Any], Array], heads: Any, unroll: bool = False) -> Array:
    """sum_h head(h) over the leading axis of `heads`, one head after another.

    What the backward pass needs of a head it computes again, but for arrays named KEPT.
    """
    shape = jax.eval_shape(head, jax.tree.map(lambda a: a[0], heads))

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(KEPT))
    def add(total, of_head):
        return total + head(of_head), None

    return jax.lax.scan(add, jnp.zeros(shape.shape, shape.dtype), heads, unroll=unroll)[0]


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
      unroll: write out the heads one after another instead of looping over them.
    """

    encoding: str
    heads: int
    max_side: int = 16
    embedding_size: int = 0
    mixing: str = "auto"
    dropout: float = 0.0
    dropout_on: str = "probabilities"
    dtype: Any = jnp.float32
    unroll: bool = False

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
        features = x.shape[-1]
        x = x.astype(self.dtype)
        rate = self.dropout if train else 0.0
        factored = self._is_factored(rate)

        heads = self._heads(features, tables)
        if self.is_mutable_collection("intermediates"):
            maps = jax.lax.map(lambda head: joined(head_probabilities(self.encoding, head, x)), heads)
            self.sow("intermediates", "probabilities", jnp.moveaxis(maps, 0, 1))

        def mixed_by(head, key):
            probabilities = head_probabilities(self.encoding, head, x)
            if rate and self.dropout_on == "factors":
                probabilities = drop_factors(key, rate, *probabilities)
            if factored:
                row, column = probabilities
                return mix_factored(row[0, :, 0], column[0, 0], x)
            probabilities = joined(probabilities)
            if rate and self.dropout_on == "probabilities":
                probabilities = drop(key, rate, probabilities)
            return mix_dense(probabilities.astype(self.dtype), x)

        def value_of(head):
            terms, value, key = head
            mixed = mixed_by(terms, key).reshape(-1, features)
            return jnp.einsum("nd,do->no", mixed, value).astype(jnp.float32)  # in which the heads are summed

        kernel, bias = Linear((self.heads, features, features), (features,), self.heads * features, name="value")()
        # Two linear maps in a row are one; composing them pays where there are more pixels than rows of the kernel.
        compose = output is not None and x.size // features > self.heads * features
        if compose:
            kernel, bias = kernel @ output[0], bias @ output[0] + output[1]
        keys = jax.random.split(self.make_rng("dropout"), self.heads) if rate else None
        y = sum_over_heads(value_of, (heads, kernel.astype(self.dtype), keys), self.unroll)
        y = y.reshape(*x.shape[:-1], -1) + bias
        if output is not None and not compose:
            y = y.astype(self.dtype) @ output[0].astype(self.dtype) + output[1]
        return y.astype(self.dtype)

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
                "center": self.param("centers", nn.initializers.normal(CENTER_STD), (self.heads, 2)),
                "spread": self.param("spreads", spreads_init(jnp.eye(2) if matrix else 1.0), (self.heads, *matrix)),
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
    encoding: str, head: dict[str, Array], x: Float[Array, "batch H W features"]
) -> tuple[Float[Array, "#batch H #W H"], Float[Array, "#batch #H W W"]] | Float[Array, "#batch H W H W"]:
    """Of one head: the row and the column factor where the encoding is separable, else the whole."""
    height, width = x.shape[1:3]
    if encoding == "quadratic_generalized":
        return jax.nn.softmax(positions.quadratic_generalized(**head, height=height, width=width)[None], (-2, -1))
    if encoding in positions.HALVING:
        terms = (head[name] for name in ("row_keys", "row_biases", "column_keys", "column_biases"))
        row, column = checkpoint_name(positions.learned_query(x, *terms), KEPT)
    else:
        if encoding == "quadratic":
            row, column = positions.quadratic(**head, height=height, width=width)
        else:
            row, column = positions.learned(head["row_scores"], head["column_scores"], height, width)
        row, column = row[None, :, None, :], column[None, None, :, :]  # the same for all images and the other axis
    if encoding in positions.SEPARABLE:
        return jax.nn.softmax(row), jax.nn.softmax(column)
    query = checkpoint_name(x @ head["query"].astype(x.dtype) + head["query_bias"].astype(x.dtype), KEPT)
    scores = positions.content(query, x) + row[..., :, None] + column[..., None, :]
    return checkpoint_name(jax.nn.softmax(scores, axis=(-2, -1)), KEPT)


def joined(probabilities) -> Float[Array, "#batch H W H W"]:
    """Of factors their product, of the whole itself."""
    return joint(*probabilities) if isinstance(probabilities, tuple) else probabilities


def drop(key: Key[Array, ""], rate: float, values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Each value zero with probability `rate`, else scaled up so that its expectation stays."""
    kept = jax.random.bernoulli(key, 1 - rate, values.shape)
    return jnp.where(kept, values / (1 - rate), 0)


def drop_factors(key: Key[Array, ""], rate: float, row: Float[Array, "..."], column: Float[Array, "..."]):
    """Drops entries of both factors, so that one of their product is dropped with probability `rate`."""
    row_key, column_key = jax.random.split(key)
    each = 1 - (1 - rate) ** 0.5
    return drop(row_key, each, row), drop(column_key, each, column)


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
