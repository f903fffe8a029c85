"""Multi-head self-attention over a pixel grid, where every head mixes the whole hidden vector (paper, eq. 3).

    y_h[q] = sum_k A_h[q, k] x[k],        output = sum_h y_h W_h + b

For separable encodings A_h = R_h (x) C_h, a row factor and a column factor, and the mixing costs
O(heads * H * W * (H + W) * D) instead of O(heads * (H * W)^2 * D), with no approximation.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attn_cnn import positions
from attn_cnn.errors import UserError

CENTER_STD = 2.0
SPREAD_STD = 0.01


def fan_in_uniform(fan_in: int) -> nn.initializers.Initializer:
    """Uniform in +-1/sqrt(fan_in): PyTorch's default for weights and biases, which the paper trains from."""

    def init(key, shape, dtype=jnp.float32):
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def dense(features, fan_in: int, **kwargs) -> nn.DenseGeneral:
    """A Linear with PyTorch's initialisation; `features` may be a tuple, `axis` several axes of the input."""
    init = fan_in_uniform(fan_in)
    return nn.DenseGeneral(features, kernel_init=init, bias_init=init, **kwargs)


def joint(
    row: Float[Array, "#batch heads #H #W H"], column: Float[Array, "#batch heads #H #W W"]
) -> Float[Array, "batch heads H W H W"]:
    """A = R (x) C: probabilities over the whole grid from those over rows and over columns."""
    return row[..., :, None] * column[..., None, :]


def mix_dense(
    probabilities: Float[Array, "#batch heads H W H W"], x: Float[Array, "batch H W features"]
) -> Float[Array, "batch H W heads features"]:
    """y_h[q] = sum_k A_h[q, k] x[k]; without a batch axis of its own A is one matrix for all images."""
    if probabilities.shape[0] == 1:
        return jnp.einsum("hijkl,bkld->bijhd", probabilities[0], x)
    return jnp.einsum("bhijkl,bkld->bijhd", probabilities, x)


def mix_factored(
    row: Float[Array, "1 heads H 1 H"],
    column: Float[Array, "1 heads 1 W W"],
    x: Float[Array, "batch H W features"],
) -> Float[Array, "batch H W heads features"]:
    """The same sum, one grid axis at a time: (R_h (x) C_h) x = R_h (C_h x)."""
    mixed = jnp.einsum("hjl,bkld->bkjhd", column[0, :, 0], x)
    return jnp.einsum("hik,bkjhd->bijhd", row[0, :, :, 0], mixed)


@jax.checkpoint
def mix_per_query(
    row: Float[Array, "batch heads H W H"],
    column: Float[Array, "batch heads H W W"],
    x: Float[Array, "batch H W features"],
) -> Float[Array, "batch H W heads features"]:
    """Factors that differ from query to query: only they are kept for the backward pass, not their product."""
    return mix_dense(joint(row, column), x)


def default_embedding_size(encoding: str, features: int) -> int:
    """Width of the learned tables where none is asked for."""
    return features // 2 if encoding in positions.HALVING else features


def embedding_tables(
    module: nn.Module, max_side: int, width: int
) -> tuple[Float[Array, "shifts {width}"], Float[Array, "shifts {width}"]]:
    """The row and the column table of `module`: one N(0, 1) embedding for each shift in (-max_side, max_side)."""
    shape, init = (2 * max_side - 1, width), nn.initializers.normal(1.0)
    return module.param("row_embeddings", init, shape), module.param("column_embeddings", init, shape)


class SelfAttention(nn.Module):
    """One attention layer, with any of the encodings.

    Attributes:
      encoding: one of `positions.ENCODINGS`.
      heads: number of heads.
      max_side: largest side of the grid that the learned tables cover.
      embedding_size: width of the learned tables; 0: that of x, or half of it for encodings that halve the query.
      mixing: "factored", "dense", or "auto": factored wherever it is exact and no attention dropout is active.
        "factored" where it is not exact raises UserError.
      dropout: rate on the probabilities. Position-only probabilities are one array for the whole batch, and
        so is their mask, as in the paper's code.
      dtype: of the computation; parameters and softmax are float32.
    """

    encoding: str
    heads: int
    max_side: int = 16
    embedding_size: int = 0
    mixing: str = "auto"
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch H W features"],
        tables: tuple[Float[Array, "shifts width"], Float[Array, "shifts width"]] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "batch H W features"]:
        """Mixes the grid. `tables`: row and column embeddings shared between layers; without, the layer's own."""
        features = x.shape[-1]
        x = x.astype(self.dtype)
        dropping = train and self.dropout > 0
        separable = self.encoding in positions.SEPARABLE
        exact = separable and not dropping
        if self.mixing == "factored" and not exact:
            raise UserError(
                f"the {self.encoding} encoding has no exact factors" + " under attention dropout." * separable
            )
        factored = exact and self.mixing != "dense"
        collecting = self.is_mutable_collection("intermediates")

        scores = self._scores(x, tables)
        if separable:
            row, column = (jax.nn.softmax(term, axis=-1) for term in scores)
            probabilities = joint(row, column) if collecting or not factored else None
        else:
            probabilities = jax.nn.softmax(scores, axis=(-2, -1))
        if collecting:
            self.sow("intermediates", "probabilities", probabilities)

        if factored:
            mix = mix_per_query if self.encoding == "learned_query" else mix_factored
            mixed = mix(row.astype(self.dtype), column.astype(self.dtype), x)
        else:
            probabilities = nn.Dropout(self.dropout)(probabilities, deterministic=not dropping)
            mixed = mix_dense(probabilities.astype(self.dtype), x)
        fan_in = self.heads * features
        return dense(features, fan_in, axis=(-2, -1), dtype=self.dtype, name="value")(mixed)

    def _scores(self, x, tables):
        """Row and column scores, (1|B, heads, H, 1|W, H) and (1|B, heads, 1|H, W, W), where the encoding is
        separable; else scores over the whole grid, (1|B, heads, H, W, H, W)."""
        height, width, features = x.shape[1:]
        if self.encoding.startswith("quadratic"):
            centers = self.param("centers", nn.initializers.normal(CENTER_STD), (self.heads, 2))
            if self.encoding == "quadratic_generalized":
                spreads = self.param("spreads", spreads_init(jnp.eye(2)), (self.heads, 2, 2))
                return positions.quadratic_generalized(centers, spreads, height, width)[None]
            spreads = self.param("spreads", spreads_init(1.0), (self.heads,))
            return _same_for_all_queries(*positions.quadratic(centers, spreads, height, width))

        if tables is None:
            width_of_tables = self.embedding_size or default_embedding_size(self.encoding, features)
            tables = embedding_tables(self, self.max_side, width_of_tables)
        if self.encoding != "learned":
            per_head = {"features": (self.heads, features), "fan_in": features, "dtype": self.dtype}
            query = dense(**per_head, name="query")(x)
        if self.encoding in ("learned", "learned_content_position"):
            by_shift = [
                dense(self.heads, table.shape[-1], use_bias=False, name=f"{axis}_head_keys")(table)
                for axis, table in zip(("row", "column"), tables, strict=True)
            ]
            row, column = _same_for_all_queries(*positions.learned(*by_shift, height, width))
        else:
            row, column = positions.learned_query(query, *tables)
        if self.encoding in positions.SEPARABLE:
            return row, column
        key = dense(**per_head, name="key")(x)
        return positions.content(query, key) + row[..., :, None] + column[..., None, :]


def spreads_init(mean: float | Array) -> nn.initializers.Initializer:
    """`mean` + N(0, 0.01^2): 1 for a scalar spread, the identity for a matrix."""

    def init(key, shape, dtype=jnp.float32):
        return mean + SPREAD_STD * jax.random.normal(key, shape, dtype)

    return init


def _same_for_all_queries(row, column):
    """Gives (heads, H, H) and (heads, W, W) the axes of batch and of the query's other coordinate."""
    return row[None, :, :, None, :], column[None, :, None, :, :]


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
