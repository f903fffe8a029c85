"""Content encodings: a paper-scale training step against a straightforward einsum implementation.

python -m benchmarks.content  # about 3 minutes on 2 cores
python -m benchmarks.content --encoding=learned_content_position
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import flags
from jaxtyping import Array, Float

from attn_cnn import cli
from attn_cnn.encodings import QueryEncoding, Tables, encoding_class
from attn_cnn.layers import LinearMap
from benchmarks import common
from configs import learned_content, learned_content_position

CONFIGS = {"learned_content": learned_content, "learned_content_position": learned_content_position}
ENCODING = flags.DEFINE_enum("encoding", "learned_content", list(CONFIGS), "Which.")
BATCH = flags.DEFINE_integer("batch", 20, "Images in a step.")
ROUNDS = flags.DEFINE_integer("rounds", 4, "Steps of each side.", lower_bound=2)


class EinsumAttention(nn.Module):
    """Attention as one would write it down: a Linear for each map, one einsum for each product, all heads at once.

    Attributes:
      encoding: one of `CONFIGS`.
      heads: number of heads.
      max_side: largest side of the grid that the tables cover.
    """

    encoding: str
    heads: int
    max_side: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch H W features"], then: LinearMap, tables: Any = None, *, train: bool = False
    ) -> Float[Array, "batch H W out"]:
        """Mixes the grid, applies the value map, and `then`; `tables` and `train` mean nothing here."""
        features = x.shape[-1]
        query, key = (nn.DenseGeneral((self.heads, features), name=name)(x) for name in ("query", "key"))
        query *= features**-0.5
        encoding = encoding_class(self.encoding)
        tables = encoding.tables(self, self.max_side, 0, features)
        of_position = self.query_scores if issubclass(encoding, QueryEncoding) else self.position_scores
        row, column = of_position(query, tables)
        scores = jnp.einsum("bijhd,bklhd->bhijkl", query, key) + row[..., None] + column[..., None, :]
        mixed = jnp.einsum("bhijkl,bkld->bijhd", jax.nn.softmax(scores, (-2, -1)), x)
        return then(nn.DenseGeneral(features, axis=(-2, -1), name="value")(mixed))

    def query_scores(self, query: Array, tables: Tables) -> tuple[Array, Array]:
        """Returns the scores of each half of the queries with a table, b h i j k and b h i j l."""
        half = query.shape[-1] // 2
        rows, columns = (self.by_shift(table, side) for table, side in zip(tables, query.shape[1:3], strict=True))
        row = jnp.einsum("bijhd,ikd->bhijk", query[..., :half], rows)
        return row, jnp.einsum("bijhd,jld->bhijl", query[..., half:], columns)

    def position_scores(self, query: Array, tables: Tables) -> tuple[Array, Array]:
        """Returns the scores of the tables alone, 1 h i 1 k and 1 h 1 j l."""
        rows, columns = (
            self.by_shift(nn.Dense(self.heads, use_bias=False)(table), side)
            for table, side in zip(tables, query.shape[1:3], strict=True)
        )
        return jnp.einsum("ikh->hik", rows)[None, :, :, None], jnp.einsum("jlh->hjl", columns)[None, :, None]

    def by_shift(self, table: Float[Array, "shifts width"], side: int) -> Float[Array, "{side} {side} width"]:
        """Returns the table's row for each query and each key along a side of the grid."""
        pixels = jnp.arange(side)
        return table[pixels - pixels[:, None] + self.max_side - 1]


def main(_):
    experiment = common.paper_experiment(CONFIGS[ENCODING.value], 16, BATCH.value)
    model = experiment.config.model
    layer = functools.partial(EinsumAttention, model.encoding, model.heads, model.max_side, name="attention")
    einsum = experiment._replace(model=experiment.model.clone(mixers=(layer,) * model.layers))
    sides = {
        "einsum": common.training_side(einsum, counted=einsum),
        ENCODING.value: common.training_side(experiment),
        "matmul": common.matmul_side(),
    }
    print(common.table(sides, common.alternate(sides, ROUNDS.value), "einsum"))


if __name__ == "__main__":
    cli.run(main, config=False)
