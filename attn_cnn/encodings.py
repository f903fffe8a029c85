"""What a head's score is: one class for each encoding of relative positions (paper, sections 2 and 3).

A query pixel (i, j) looks at a key pixel (k, l) through their shift d = (k - i, l - j), in pixels. An encoding is a
pytree of the arrays that its scores need, with the heads on every array's leading axis. It owns all that is particular
to it: its parameters and how they start, its scores by shift, whether they separate, the rules for its config fields,
its names in the paper's PyTorch code, when a head of it is degenerate, and what figures may draw of it.

A new encoding is a subclass with a name; everything else finds it by that name in `ENCODINGS`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, Key, Shaped

from attn_cnn import schema
from attn_cnn.errors import UserError
from attn_cnn.layers import Linear, LinearMap, dense
from attn_cnn.mixing import Factors, Probabilities, Weighted, Whole

CENTER_STD = 2.0
SPREAD_STD = 0.01
SMALLEST_EIGENVALUE = 1e-5  # of a head's precision, below which its attention is uniform
LARGEST_CONDITION = 1000.0  # of a head's precision, above which its attention is a line

ENCODINGS: dict[str, type["Encoding"]] = {}

# Fields of config.model that some encodings read and the others refuse.
FIELDS = {
    "embedding_size": schema.integer(0, 65_536, default=0),
    "share_tables": schema.boolean(default=False),
    "init": schema.choice("random", "grid", "impulse", default="random"),
    "init_spread": schema.number(0, 1e6, default=2**0.5),
    "content_init": schema.choice("random", "mimetic", default="random"),
}


def in_config(field: str) -> str:
    """Returns what messages call a field of `config.model`."""
    return f"config.model.{field}"


def shifts(height: int, width: int) -> tuple[Int[Array, "{height} 1 {height} 1"], Int[Array, "1 {width} 1 {width}"]]:
    """Returns the row and the column shift from each query to each key of a grid; together they broadcast."""
    rows, columns = jnp.arange(height), jnp.arange(width)
    return (rows - rows[:, None])[:, None, :, None], (columns - columns[:, None])[None, :, None, :]


def window(height: int, width: int | None = None) -> Int[np.ndarray, "pixels 2"]:
    """Returns the shifts of a convolution's window, row by row; of an even side the larger half is positive.

    The window is square where `width` is None.
    """
    along = [np.arange(side) - (side - 1) // 2 for side in (height, width or height)]
    return np.stack(np.meshgrid(*along, indexing="ij"), axis=-1).reshape(-1, 2)


class Gaussians(NamedTuple):
    """Heads as Gaussians over the shift: `centers` in pixels, `precisions` the inverse covariances."""

    centers: Float[Array, "heads 2"]
    precisions: Float[Array, "heads 2 2"]


class Parts(NamedTuple):
    """Scores before softmax, taken apart; every array has the shape of `total`.

    Attributes:
      position: what the shift scores (by itself, or with the query).
      content: what query and key score; None: nothing.
      total: the scores whose softmax are the probabilities; position plus content, or of gated heads log A_h.
    """

    position: Float[Array, "*images heads H W H W"]
    content: Float[Array, "*images heads H W H W"] | None
    total: Float[Array, "*images heads H W H W"]


class Encoding(struct.PyTreeNode):
    """The scores of some heads of one layer.

    Class attributes:
      name: what config.model.encoding calls it.
      separable: whether the score is a row term plus a column term, so that probabilities are `Factors`, exactly.
      needs_x: whether the score depends on the pixels' features, and so on the image.
      continuous: whether there are scores between pixels: `scores` takes shifts that are no whole numbers.
      reads: the fields of `FIELDS` that mean something to it.
      undecayed: names of its parameters that weight decay spares.
      positions: names of the parameters and submodules that say where heads look whatever the pixels hold.
      torch_names: its parameters' paths in the layer, and their names in the paper's PyTorch layer.
      penalty: a method that returns (condition number - 1)^2 of each head, where there is one to penalise.
    """

    name: ClassVar[str]
    separable: ClassVar[bool] = False
    needs_x: ClassVar[bool] = False
    continuous: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ()
    undecayed: ClassVar[tuple[str, ...]] = ()
    positions: ClassVar[tuple[str, ...]] = ()
    torch_names: ClassVar[dict[str, str]] = {}
    penalty: ClassVar[Any] = None

    def __init_subclass__(cls, name: str = "", **kwargs):
        super().__init_subclass__(**kwargs)
        if name:
            cls.name = name
            ENCODINGS[name] = cls

    @classmethod
    def check(cls, model: ml_collections.ConfigDict) -> None:
        """Raises UserError if a field of `config.model` is one that this encoding ignores or cannot use."""
        cls.check_reads({name: model[name] for name in FIELDS}, in_config)

    @classmethod
    def check_reads(cls, values: Mapping[str, Any], called: Callable[[str], str]) -> None:
        """Raises UserError if one of `FIELDS` has a value that this encoding ignores.

        Args:
          values: values of some of them; the others have their defaults.
          called: what a message calls a field.
        """
        for name, value in values.items():
            if name not in cls.reads and value != FIELDS[name].default:
                raise UserError(
                    f"{called(name)} is {value}, which the {cls.name} encoding ignores; "
                    f"set it to {FIELDS[name].default}."
                )

    @classmethod
    def check_width(cls, features: int, embedding_size: int, called: Callable[[str], str]) -> None:
        """Raises UserError if the encoding has no scores for so many features; `called` is that of `check_reads`."""

    @classmethod
    def check_grid(cls, height: int, width: int, max_side: int) -> None:
        """Raises UserError if the encoding has no scores for some shifts of a grid."""

    @classmethod
    def tables(cls, module: nn.Module, max_side: int, embedding_size: int, features: int) -> Any:
        """Declares in `module` what all layers of a model may share."""
        raise NotImplementedError(f"the {cls.name} encoding shares nothing")

    @classmethod
    def declare(cls, module: nn.Module, features: int, tables: Any) -> "Encoding":
        """Declares the parameters in `module`, a `SelfAttention` whose attributes say how, and returns the encoding.

        Args:
          module: the layer; its compact method is running.
          features: features of a pixel.
          tables: what `tables` returned where all layers share them, else None.
        """
        raise NotImplementedError

    def scores(
        self,
        rows: Shaped[Array, "*#shape"],
        columns: Shaped[Array, "*#shape"],
        x: Float[Array, "H W features"] | None = None,
    ) -> Float[Array, "heads *shape"]:
        """Returns the scores of keys at shifts (`rows`, `columns`), two arrays of as many axes that broadcast together.

        Encodings that need `x` take the shifts of its own grid, from `shifts`.
        """
        row, column = self.terms(rows, columns, x)
        return row + column

    def terms(self, rows: Array, columns: Array, x: Array | None = None) -> tuple[Array, Array]:
        """Returns the row term and the column term of the scores of a separable encoding; each can broadcast."""
        raise NotImplementedError

    def probabilities(self, x: Float[Array, "H W features"]) -> Probabilities:
        """Returns the softmax over all key pixels of the grid of one image."""
        if self.separable:
            return self.factors(x)
        return Whole(jax.nn.softmax(self.scores(*shifts(*x.shape[:2]), x), (-2, -1)))

    def factors(self, x: Float[Array, "H W features"]) -> Factors:
        """Returns the probabilities of a separable encoding: the softmax over key rows and that over key columns."""
        row, column = self.terms(*shifts(*x.shape[:2]), x)
        return Factors(jax.nn.softmax(row[..., 0]), jax.nn.softmax(column[..., 0, :]))

    def parts(self, x: Float[Array, "H W features"]) -> Parts:
        """Returns the scores of all pairs of pixels of one image, taken apart."""
        total = self.scores(*shifts(*x.shape[:2]), x)
        return Parts(total, None, total)

    def degenerate(self) -> dict[int, str]:
        """Returns the heads that do nothing of use, each with the reason and the value."""
        return {}

    def gaussians(self) -> Gaussians | None:
        """Returns centers and precisions of the heads, or None where the scores are no Gaussian's."""
        return None

    def numbers(self) -> dict[str, Float[Array, "heads"]]:
        """Returns, by name, numbers of each head that only this encoding has."""
        return {}


def along_heads(values: Float[Array, "heads"], shifts: Shaped[Array, "*shape"]) -> Float[Array, "heads *ones"]:
    """Returns one value a head in a shape that broadcasts against `shifts` with the heads in front."""
    return values.reshape(-1, *[1] * shifts.ndim)


def encoding_class(name: str) -> type[Encoding]:
    """Returns the class of the encoding called `name`.

    Raises:
      UserError: there is none.
    """
    if name not in ENCODINGS:
        raise UserError(f"there is no encoding {name!r}; the encodings are {', '.join(ENCODINGS)}.")
    return ENCODINGS[name]


# Quadratic encodings


def check_square(heads: int, start: str, number: str) -> None:
    """Raises UserError unless so many heads fill a square window; `start` and `number` say who asks for it."""
    side = math.isqrt(heads)
    if side**2 != heads:
        raise UserError(
            f"{start}, which puts heads on a square window, but {number} {heads}; the nearest squares are {side**2} "
            f"and {(side + 1) ** 2}."
        )


def centers_init(module: nn.Module) -> nn.initializers.Initializer:
    """Returns N(0, 2^2), or for `start` "grid" the shifts of a convolution's window, one for each head.

    For "impulse" each head draws one of the shifts of the smallest window that has as many as there are heads, as each
    filter does in impulse initialisation (Zheng et al. 2024).
    """
    if module.start == "random":
        return nn.initializers.normal(CENTER_STD)
    shifts = window(math.isqrt(module.heads - 1) + 1)
    if module.start == "grid":
        check_square(module.heads, "start is grid", "heads is")
        return lambda key, shape, dtype=jnp.float32: jnp.asarray(shifts, dtype)
    return lambda key, shape, dtype=jnp.float32: jax.random.choice(key, jnp.asarray(shifts, dtype), shape[:1])


def spreads_init(module: nn.Module, unit: Float[Array, "*matrix"]) -> nn.initializers.Initializer:
    """Returns `unit` + N(0, 0.01^2), or for `start` "grid" and "impulse" exactly `init_spread` times `unit`."""

    def init(key, shape, dtype=jnp.float32):
        if module.start == "random":
            return unit + SPREAD_STD * jax.random.normal(key, shape, dtype)
        return jnp.broadcast_to(jnp.asarray(module.init_spread * unit, dtype), shape)

    return init


class CenteredEncoding(Encoding):
    """What the encodings share whose heads look at a center, mu_h, from wherever they are."""

    continuous = True
    reads: ClassVar[tuple[str, ...]] = ("init", "init_spread")
    undecayed: ClassVar[tuple[str, ...]] = ("centers", "spreads")
    positions = ("centers", "spreads")

    @classmethod
    def check(cls, model: ml_collections.ConfigDict) -> None:
        """Raises UserError if the heads cannot start on a square window, or a field is ignored."""
        super().check(model)
        if model.init != "grid":
            return
        for heads in schema.for_each_layer(model.heads, model.layers):
            check_square(heads, "config.model.init is grid", "config.model.heads is")

    @classmethod
    def check_reads(cls, values: Mapping[str, Any], called: Callable[[str], str]) -> None:
        """Raises UserError if a field has a value that the encoding, or a random start, ignores."""
        super().check_reads(values, called)
        values = {name: field.default for name, field in FIELDS.items()} | dict(values)
        if values["init"] == "random" and values["init_spread"] != FIELDS["init_spread"].default:
            raise UserError(
                f"{called('init_spread')} is {values['init_spread']}, which a random start ignores; "
                f"set {called('init')} to grid or impulse."
            )


class Quadratic(CenteredEncoding, name="quadratic"):
    """Scores -1/2 s_h^2 |d - mu_h|^2 (paper, eq. 9; s_h^2 is twice its alpha)."""

    centers: Array  # heads 2: mu, in pixels
    spreads: Array  # heads: s, in 1/pixels

    separable = True
    torch_names: ClassVar = {"centers": "attention_centers", "spreads": "attention_spreads"}

    @classmethod
    def declare(cls, module: nn.Module, features: int, tables: Any) -> "Quadratic":
        """Declares centers and spreads."""
        return cls(
            module.param("centers", centers_init(module), (module.heads, 2)),
            module.param("spreads", spreads_init(module, jnp.ones(())), (module.heads,)),
        )

    def terms(self, rows: Array, columns: Array, x: Array | None = None) -> tuple[Array, Array]:
        """Returns the squared distances along rows and along columns, each times -1/2 s_h^2."""

        def term(shifts, center):
            return -0.5 * (along_heads(self.spreads, shifts) * (shifts - along_heads(center, shifts))) ** 2

        return term(rows, self.centers[:, 0]), term(columns, self.centers[:, 1])

    def degenerate(self) -> dict[int, str]:
        """Returns the heads whose attention is uniform."""
        squares = np.asarray(self.spreads, np.float64) ** 2
        return {
            int(head): f"uniform attention: s^2 is {squares[head]:.3g}, below {SMALLEST_EIGENVALUE:g}"
            for head in np.flatnonzero(squares < SMALLEST_EIGENVALUE)
        }

    def gaussians(self) -> Gaussians:
        """Returns the centers, and s_h^2 times the identity."""
        return Gaussians(self.centers, self.spreads[:, None, None] ** 2 * jnp.eye(2))


class QuadraticGeneralized(CenteredEncoding, name="quadratic_generalized"):
    """Scores -1/2 (d - mu_h)^T S_h S_h^T (d - mu_h), whose covariance couples rows and columns (paper, section 4.2)."""

    centers: Array  # heads 2: mu, in pixels
    spreads: Array  # heads 2 2: S, in 1/pixels

    torch_names: ClassVar = Quadratic.torch_names

    @classmethod
    def declare(cls, module: nn.Module, features: int, tables: Any) -> "QuadraticGeneralized":
        """Declares centers and spreads."""
        return cls(
            module.param("centers", centers_init(module), (module.heads, 2)),
            module.param("spreads", spreads_init(module, jnp.eye(2)), (module.heads, 2, 2)),
        )

    def scores(self, rows: Array, columns: Array, x: Array | None = None) -> Array:
        """Returns -1/2 |S^T (d - mu)|^2, each of the two components being a row part plus a column part."""

        def parts(shifts, axis):
            along = shifts - along_heads(self.centers[:, axis], shifts)
            return [along * along_heads(self.spreads[:, axis, component], shifts) for component in (0, 1)]

        (first_row, second_row), (first_column, second_column) = parts(rows, 0), parts(columns, 1)
        return -0.5 * ((first_row + first_column) ** 2 + (second_row + second_column) ** 2)

    def penalty(self) -> Float[Array, "heads"]:
        """Returns (kappa - 1)^2 of each head, with kappa the condition number of S S^T.

        With u = kappa + 1/kappa - 2 = tr^2/det - 4 it is u + u^2/2 + u sqrt(u + u^2/4), whose gradient is finite at the
        identity.
        """
        precision = self.gaussians().precisions
        a, b, c = precision[:, 0, 0], precision[:, 0, 1], precision[:, 1, 1]
        u = ((a - c) ** 2 + 4 * b**2) / jnp.linalg.det(precision)
        square = u + u**2 / 4
        root = jnp.where(u > 0, jnp.sqrt(jnp.where(u > 0, square, 1)), 0)
        return u + u**2 / 2 + u * root

    def degenerate(self) -> dict[int, str]:
        """Returns the heads whose attention is a line, or else uniform."""
        reasons = {}
        for head, (smallest, largest) in enumerate(
            np.linalg.eigvalsh(np.asarray(self.gaussians().precisions, np.float64))
        ):
            condition = largest / smallest if smallest > 0 else np.inf
            if condition > LARGEST_CONDITION:
                reasons[head] = f"attention is a line: condition number is {condition:.3g}, above {LARGEST_CONDITION:g}"
            elif largest < SMALLEST_EIGENVALUE:
                reasons[head] = (
                    f"uniform attention: the largest eigenvalue is {largest:.3g}, below {SMALLEST_EIGENVALUE:g}"
                )
        return reasons

    def gaussians(self) -> Gaussians:
        """Returns the centers, and S_h S_h^T."""
        return Gaussians(self.centers, jnp.einsum("hxc,hyc->hxy", self.spreads, self.spreads, precision="highest"))


# Learned encodings


def look_up(by_shift: Float[Array, "values shifts"], at: Int[Array, "*shape"]) -> Float[Array, "values *shape"]:
    """Returns values by shift at the integer shifts `at`; shift 0 is in the middle of `by_shift`."""
    return by_shift[..., at + by_shift.shape[-1] // 2]


class Tables(NamedTuple):
    """One embedding for each row shift and for each column shift in (-max_side, max_side)."""

    row: Float[Array, "shifts width"]
    column: Float[Array, "shifts width"]


def resize_tables(params: dict, max_side: int) -> dict:
    """Returns the parameters of a model or layer with tables for grids of side `max_side`, to fine-tune at that size.

    The new tables are linear between the old ones' shifts, which are stretched so that the furthest stay the furthest.
    """

    def resized(path, table):
        if path[-1].key not in ("row_embeddings", "column_embeddings"):
            return table
        at = jnp.linspace(0, len(table) - 1, 2 * max_side - 1)
        return jax.vmap(lambda column: jnp.interp(at, jnp.arange(len(table)), column), 1, 1)(table)

    return jax.tree_util.tree_map_with_path(resized, params)


class LearnedEncoding(Encoding):
    """What the learned encodings share: two tables of embeddings, N(0, 1), of their own or of the whole model."""

    reads: ClassVar[tuple[str, ...]] = ("embedding_size", "share_tables")
    positions = ("row_embeddings", "column_embeddings", "row_head_keys", "column_head_keys")

    @classmethod
    def width(cls, features: int) -> int:
        """Returns the width of the tables where none is asked for."""
        return features

    @classmethod
    def check(cls, model: ml_collections.ConfigDict) -> None:
        """Raises UserError if a field is ignored or the tables do not cover the grid."""
        super().check(model)
        side = max(model.image_shape[:2]) // model.patch
        if side > model.max_side:
            raise UserError(
                f"config.model.max_side is {model.max_side}, but patches of {model.patch} make a grid of side {side}; "
                f"set max_side to {side} or more."
            )
        if model.share_tables and len({*schema.for_each_layer(model.hidden_size, model.layers)}) > 1:
            raise UserError(
                f"config.model.share_tables is True, but layers of several sizes (config.model.hidden_size is "
                f"{model.hidden_size}) share no tables; set it to False."
            )

    @classmethod
    def check_grid(cls, height: int, width: int, max_side: int) -> None:
        """Raises UserError if the grid is larger than the tables: indices beyond them would give wrong numbers."""
        if max(height, width) > max_side:
            raise UserError(
                f"the grid is {height}x{width}, but learned tables cover a side of {max_side} (max_side); set it "
                f"to {max(height, width)}, and `encodings.resize_tables` makes trained tables fit."
            )

    @classmethod
    def tables(cls, module: nn.Module, max_side: int, embedding_size: int, features: int) -> Tables:
        """Declares the tables in `module`."""
        shape, init = (2 * max_side - 1, embedding_size or cls.width(features)), nn.initializers.normal(1.0)
        return Tables(module.param("row_embeddings", init, shape), module.param("column_embeddings", init, shape))

    @classmethod
    def own_or_shared(cls, module: nn.Module, features: int, tables: Tables | None) -> Tables:
        """Returns the shared tables, or declares the layer's own."""
        return tables or cls.tables(module, module.max_side, module.embedding_size, features)


# In the paper's position-only scores the table called row acts on columns, and col on rows.
_POSITION_ONLY_NAMES = {
    "row_embeddings": "col_embeddings.weight",
    "column_embeddings": "row_embeddings.weight",
    "row_head_keys/kernel": "head_keys_col.weight",
    "column_head_keys/kernel": "head_keys_row.weight",
}
_TABLE_NAMES = {"row_embeddings": "row_embeddings.weight", "column_embeddings": "col_embeddings.weight"}
_QUERY_NAMES = {"query/kernel": "query.weight", "query/bias": "query.bias"}
_KEY_NAMES = {"key/kernel": "key.weight", "key/bias": "key.bias"}


class Learned(LearnedEncoding, name="learned"):
    """Scores u_h . r_row[d_row] + v_h . r_column[d_column], whatever the pixels hold (paper, section 4.3)."""

    row_scores: Array  # heads shifts: u_h . r_row
    column_scores: Array  # heads shifts: v_h . r_column

    separable = True
    torch_names: ClassVar = _POSITION_ONLY_NAMES

    @classmethod
    def declare(cls, module: nn.Module, features: int, tables: Tables | None) -> "Learned":
        """Declares the tables, unless they are shared, and the maps from embeddings to one score a head."""
        tables = cls.own_or_shared(module, features, tables)
        maps = [
            dense(module.heads, table.shape[-1], use_bias=False, name=f"{axis}_head_keys")
            for axis, table in zip(tables._fields, tables, strict=True)
        ]
        return cls(*(map(table).T for map, table in zip(maps, tables, strict=True)))

    def terms(self, rows: Array, columns: Array, x: Array | None = None) -> tuple[Array, Array]:
        """Returns the scores at integer shifts."""
        return look_up(self.row_scores, rows), look_up(self.column_scores, columns)


class QueryEncoding(LearnedEncoding):
    """What the encodings have in common whose query meets the tables, one half of it each."""

    @classmethod
    def width(cls, features: int) -> int:
        """Returns the width of half a query."""
        return features // 2

    @classmethod
    def check(cls, model: ml_collections.ConfigDict) -> None:
        """Raises UserError if a query cannot be halved or the tables are not as wide as its halves."""
        super().check(model)
        for size in schema.for_each_layer(model.hidden_size, model.layers):
            cls.check_width(size, model.embedding_size, in_config)

    @classmethod
    def check_width(cls, features: int, embedding_size: int, called: Callable[[str], str]) -> None:
        """Raises UserError if a query cannot be halved or the tables are not as wide as its halves."""
        if features % 2:
            raise UserError(
                f"{called('hidden_size')} is {features}; the {cls.name} encoding halves each query, so it must be even."
            )
        if embedding_size not in (0, features // 2):
            raise UserError(
                f"{called('embedding_size')} is {embedding_size}; the {cls.name} encoding multiplies tables "
                f"with half a query, so it must be {features // 2}, or 0 for just that."
            )


def declare_per_head(
    module: nn.Module, features: int, name: str, mimetic: nn.initializers.Initializer | None = None
) -> LinearMap:
    """Declares the map from a pixel to one vector of `features` for each head: kernel (features, heads, features).

    Where the layer's `content_start` is "mimetic", the kernel starts as `mimetic` says.
    """
    shape = (features, module.heads, features)
    init = mimetic if module.content_start == "mimetic" else None
    return Linear(shape, shape[1:], features, init, name=name)()


def declare_query(module: nn.Module, features: int) -> LinearMap:
    """Declares the query's map and divides it by sqrt(features)."""
    kernel, bias = declare_per_head(module, features, "query", orthogonal)
    scale = features**-0.5
    return LinearMap(scale * kernel, scale * bias)


def product(a: Float[Array, "n features"], b: Float[Array, "m features"]) -> Float[Array, "n m"]:
    """Returns a b^T in float32, whatever the type of a and b; products of the gradient are of that type, too."""
    return _product(a, b) if a.dtype == jnp.float32 else _product_in_half_precision(a, b)


def _product(a: Array, b: Array) -> Array:
    return jnp.einsum("nd,md->nm", a, b, preferred_element_type=jnp.float32)


# In half precision, since otherwise the gradient would multiply float32 by half precision, at the cost of float32.
_product_in_half_precision = jax.custom_vjp(_product)
_product_in_half_precision.defvjp(
    lambda a, b: (_product(a, b), (a, b)),
    lambda factors, gradient: (
        gradient.astype(factors[0].dtype) @ factors[1],
        gradient.astype(factors[1].dtype).T @ factors[0],
    ),
)


class LearnedQuery(QueryEncoding, name="learned_query"):
    """Scores q_h[i, j] . (r_row[d_row] (+) r_column[d_column]) / sqrt(D) (Ramachandran et al. 2019, section 3).

    With q = Q^T x + c this is x . (Q r) + c . r: few embeddings take the place of many pixels.
    """

    row_keys: Array  # heads shifts features: Q r_row / sqrt(D)
    row_biases: Array  # heads shifts: c . r_row / sqrt(D)
    column_keys: Array  # heads shifts features
    column_biases: Array  # heads shifts

    separable, needs_x = True, True
    torch_names: ClassVar = _TABLE_NAMES | _QUERY_NAMES

    @classmethod
    def declare(cls, module: nn.Module, features: int, tables: Tables | None) -> "LearnedQuery":
        """Declares the tables, unless they are shared, and the query's map."""
        return cls.of_query(cls.own_or_shared(module, features, tables), declare_query(module, features))

    @classmethod
    def of_query(cls, tables: Tables, query: LinearMap) -> "LearnedQuery":
        """Lets the first half of the query meet the row table and the second half the column table."""
        fields, half = [], query.kernel.shape[-1] // 2
        for table, part in zip(tables, (slice(None, half), slice(half, None)), strict=True):
            fields.append(jnp.einsum("dhf,sf->hsd", query.kernel[..., part], table))
            fields.append(jnp.einsum("hf,sf->hs", query.bias[:, part], table))
        return cls(*fields)

    def terms(self, rows: Array, columns: Array, x: Array | None = None) -> tuple[Array, Array]:
        """Returns the scores of the pixels of `x`; `rows` and `columns` are the shifts of its grid."""
        assert x is not None  # needs_x
        height, width, features = x.shape
        keys = jnp.concatenate([self.row_keys, self.column_keys], axis=1).astype(x.dtype)
        biases = jnp.concatenate([self.row_biases, self.column_biases], axis=1)
        heads, both, _ = keys.shape
        by_shift = product(x.reshape(-1, features), keys.reshape(-1, features)).reshape(height, width, heads, both)
        row_scores, column_scores = jnp.split(by_shift + biases, 2, axis=-1)
        # A product with 0 and 1 looks up by shift: the gradient of indexing would be a scatter, slow on every device.
        one_hot = jnp.eye(both // 2)
        at_rows, at_columns = look_up(one_hot, rows[:, 0, :, 0]), look_up(one_hot, columns[0, :, 0])
        row = jnp.einsum("ijhs,sik->hijk", row_scores, at_rows, precision="highest")
        column = jnp.einsum("ijhs,sjl->hijl", column_scores, at_columns, precision="highest")
        return row[..., None], column[..., None, :]


# Content

MIMETIC_NOISE, MIMETIC_IDENTITY = 0.7, 0.7  # alpha and beta of Trockman and Kolter


def orthogonal(key: Key[Array, ""], shape: tuple[int, int, int], dtype: Any = jnp.float32) -> Array:
    """Draws an orthogonal matrix for each head: (features, heads, features)."""
    features, heads, _ = shape
    draw = jax.vmap(lambda key: nn.initializers.orthogonal()(key, (features, features), dtype), out_axes=1)
    return draw(jax.random.split(key, heads))


def mimetic_key(query: Float[Array, "features heads features"]) -> nn.initializers.Initializer:
    """Returns the initializer of a key K whose product with the orthogonal `query` Q is Q K^T = alpha Z + beta I.

    Z has entries N(0, 1/features) (Trockman and Kolter 2023, whose factors Q and K are those of a singular value
    decomposition).
    """

    def init(key, shape, dtype=jnp.float32):
        features, heads, _ = shape
        Z = jax.random.normal(key, (heads, features, features), dtype) * features**-0.5
        product = MIMETIC_NOISE * Z + MIMETIC_IDENTITY * jnp.eye(features, dtype=dtype)
        return jnp.einsum("hde,dhf->ehf", product, query, precision="highest")

    return init


class Content(struct.PyTreeNode):
    """Scores q_h[i, j] . k_h[k, l] / sqrt(D) (Vaswani et al. 2017), which other encodings add to theirs.

    With q = Q^T x + c and k = K^T x + e this is (K (Q^T x + c)) . x plus what is the same for all keys of a query,
    which softmax does not see. So the bias e has no effect, and its gradient is zero.
    """

    query: Array  # heads features features: Q K^T / sqrt(D)
    bias: Array  # heads features: K c / sqrt(D)

    @classmethod
    def declare(cls, module: nn.Module, features: int, query: LinearMap) -> "Content":
        """Declares the key's map and composes it with the query's, which is scaled already."""
        key, _ = declare_per_head(module, features, "key", mimetic_key(query.kernel * features**0.5))
        return cls(jnp.einsum("dhf,ehf->hde", query.kernel, key), jnp.einsum("hf,ehf->he", query.bias, key))

    def scores(self, x: Float[Array, "H W features"]) -> Float[Array, "heads H W H W"]:
        """Returns the scores of all pairs of pixels of one image."""
        height, width, features = x.shape
        query = jnp.einsum("ijd,hde->hije", x, self.query.astype(x.dtype))
        query += self.bias.astype(x.dtype)[:, None, None]
        scores = product(query.reshape(-1, features), x.reshape(-1, features))
        return scores.reshape(-1, height, width, height, width)


class PositionAndContent:
    """What the encodings share that have a `position` and a `content` and add their scores."""

    position: Encoding
    content: Content

    needs_x = True

    def scores(self, rows: Array, columns: Array, x: Array | None = None) -> Array:
        """Returns the scores of position plus those of content."""
        assert x is not None  # needs_x
        return self.position.scores(rows, columns, x) + self.content.scores(x)

    def parts(self, x: Float[Array, "H W features"]) -> Parts:
        """Returns the scores of position, those of content, and their sum."""
        position, content = self.position.scores(*shifts(*x.shape[:2]), x), self.content.scores(x)
        return Parts(position, content, position + content)


class LearnedContent(PositionAndContent, QueryEncoding, name="learned_content"):
    """Scores of `LearnedQuery` plus those of content, with the same query (Ramachandran et al. 2019)."""

    position: LearnedQuery
    content: Content

    reads = (*QueryEncoding.reads, "content_init")
    torch_names: ClassVar = _TABLE_NAMES | _QUERY_NAMES | _KEY_NAMES

    @classmethod
    def declare(cls, module: nn.Module, features: int, tables: Tables | None) -> "LearnedContent":
        """Declares the tables, unless they are shared, and the maps of query and key."""
        tables, query = cls.own_or_shared(module, features, tables), declare_query(module, features)
        return cls(LearnedQuery.of_query(tables, query), Content.declare(module, features, query))


class LearnedContentPosition(PositionAndContent, LearnedEncoding, name="learned_content_position"):
    """Scores of `Learned` plus those of content, whose query the positions do not see."""

    position: Learned
    content: Content

    reads = (*LearnedEncoding.reads, "content_init")
    torch_names: ClassVar = _POSITION_ONLY_NAMES | _QUERY_NAMES | _KEY_NAMES

    @classmethod
    def declare(cls, module: nn.Module, features: int, tables: Tables | None) -> "LearnedContentPosition":
        """Declares what `Learned` does, and the maps of query and key."""
        position = Learned.declare(module, features, tables)
        return cls(position, Content.declare(module, features, declare_query(module, features)))


class Gated(CenteredEncoding, name="gated"):
    """Gated attention between content and position (GPSA of ConViT, d'Ascoli et al. 2021, eq. 7).

        A_h = (1 - g_h) softmax(q_h . k_h / sqrt(D)) + g_h softmax(-1/2 s_h^2 |d - mu_h|^2),   g_h = sigmoid(lambda_h)

    ConViT's positional score alpha (2 c . d - |d|^2) is the quadratic one with s^2 = 2 alpha and center c.
    """

    position: Quadratic
    content: Content
    gates: Array  # heads: lambda

    needs_x, continuous = True, False
    reads = (*CenteredEncoding.reads, "content_init")
    undecayed = (*CenteredEncoding.undecayed, "gates")

    @classmethod
    def declare(cls, module: nn.Module, features: int, tables: Any) -> "Gated":
        """Declares centers, spreads, gates that start at lambda = 1, and the maps of query and key."""
        position = Quadratic.declare(module, features, tables)
        gates = module.param("gates", nn.initializers.ones, (module.heads,))
        return cls(position, Content.declare(module, features, declare_query(module, features)), gates)

    def scores(self, rows: Array, columns: Array, x: Array | None = None) -> Array:
        """Returns log A_h, the scores whose softmax is the mixture."""
        assert x is not None  # needs_x
        return self.parts(x).total

    def parts(self, x: Float[Array, "H W features"]) -> Parts:
        """Returns the scores of position, those of content, and log A_h, finite also where A_h is rounded to 0."""
        position, content = self.position.scores(*shifts(*x.shape[:2]), x), self.content.scores(x)
        gates = self.gates[:, None, None, None, None]
        total = jnp.logaddexp(
            jax.nn.log_sigmoid(-gates) + jax.nn.log_softmax(content, (-2, -1)),
            jax.nn.log_sigmoid(gates) + jax.nn.log_softmax(position, (-2, -1)),
        )
        return Parts(position, content, total)

    def probabilities(self, x: Float[Array, "H W features"]) -> Weighted:
        """Returns the mixture, whose positional part keeps its factors."""
        content = Whole(jax.nn.softmax(self.content.scores(x), (-2, -1)))
        g = jax.nn.sigmoid(self.gates)
        return Weighted((1 - g, g), (content, self.position.factors(x)))

    def degenerate(self) -> dict[int, str]:
        """Returns the heads whose positional part is uniform and weighs more than their content."""
        return {head: reason for head, reason in self.position.degenerate().items() if self.gates[head] > 0}

    def gaussians(self) -> Gaussians:
        """Returns centers and precisions of the positional part."""
        return self.position.gaussians()

    def numbers(self) -> dict[str, Float[Array, "heads"]]:
        """Returns the gates g_h."""
        return {"gate": jax.nn.sigmoid(self.gates)}
