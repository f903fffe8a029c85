"""Attention scores of the encodings (sections 2 and 3 of the paper), as pure functions of one image and some heads.

A query pixel (i, j) looks at a key pixel (k, l) through their shift d = (k - i, l - j). An encoding is
*separable* when its score is (a function of the rows) + (a function of the columns): the softmax over the
whole grid is then the product of a softmax over rows and one over columns, exactly. Separable encodings
return these two terms, the others their full score.

Letters of the shapes: h the head; H, W the grid; i, j the query; k, l the key;
shifts = 2 M - 1, with M the largest side the tables cover.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

POSITION_ONLY = ("quadratic", "quadratic_generalized", "learned")
SEPARABLE = ("quadratic", "learned", "learned_query")
LEARNED = ("learned", "learned_query", "learned_content", "learned_content_position")
HALVING = ("learned_query", "learned_content")  # one half of the query meets each table
CONTENT = ("learned_content", "learned_content_position")
ENCODINGS = ("quadratic", "quadratic_generalized", *LEARNED)


def shifts(side: int) -> Int[Array, "side side"]:
    """Shift from each query (first axis) to each key (second axis) along one side of the grid, in pixels."""
    pixels = jnp.arange(side)
    return pixels[None, :] - pixels[:, None]


def quadratic(
    centers: Float[Array, "heads 2"], spreads: Float[Array, "heads"], height: int, width: int
) -> tuple[Float[Array, "heads {height} {height}"], Float[Array, "heads {width} {width}"]]:
    """-1/2 s_h^2 |d - mu_h|^2 as its row and column terms (paper, eq. 9; s_h^2 is twice its alpha)."""

    def term(side, center):
        return -0.5 * (spreads[:, None, None] * (shifts(side) - center[:, None, None])) ** 2

    return term(height, centers[:, 0]), term(width, centers[:, 1])


def quadratic_generalized(
    centers: Float[Array, "heads 2"], spreads: Float[Array, "heads 2 2"], height: int, width: int
) -> Float[Array, "heads {height} {width} {height} {width}"]:
    """-1/2 (d - mu_h)^T S_h S_h^T (d - mu_h): a full covariance, so rows and columns do not separate."""
    rows = shifts(height) - centers[:, 0, None, None]
    columns = shifts(width) - centers[:, 1, None, None]
    # |S^T (d - mu)|^2, whose two components are each a row part plus a column part
    row_parts = jnp.einsum("hik,hc->chik", rows, spreads[:, 0])
    column_parts = jnp.einsum("hjl,hc->chjl", columns, spreads[:, 1])
    first, second = row_parts[:, :, :, None, :, None] + column_parts[:, :, None, :, None, :]
    return -0.5 * (first**2 + second**2)


def _along(by_shift: Float[Array, "*values shifts"], side: int) -> Float[Array, "*values {side} {side}"]:
    """Values by shift laid out by query (first axis) and key (second axis); shift 0 is the middle."""
    return by_shift[..., shifts(side) + by_shift.shape[-1] // 2]


def learned(
    row_scores: Float[Array, "heads shifts"], column_scores: Float[Array, "heads shifts"], height: int, width: int
) -> tuple[Float[Array, "heads {height} {height}"], Float[Array, "heads {width} {width}"]]:
    """u_h . r_row[d_row] and v_h . r_col[d_col], given the tables already mapped to scores."""
    return _along(row_scores, height), _along(column_scores, width)


def learned_query(
    x: Float[Array, "H W features"],
    row_keys: Float[Array, "heads shifts features"],
    row_biases: Float[Array, "heads shifts"],
    column_keys: Float[Array, "heads shifts features"],
    column_biases: Float[Array, "heads shifts"],
) -> tuple[Float[Array, "heads H W H"], Float[Array, "heads H W W"]]:
    """q_h[i, j] . (r_row[d_row] (+) r_col[d_col]) / sqrt(D) (Ramachandran et al. 2019, section 3).

    With q = Q^T x + c this is x . (Q r) + c . r; the keys are Q r and the biases c . r, divided by sqrt(D).
    """
    height, width, features = x.shape
    keys = jnp.concatenate([row_keys, column_keys], axis=1).astype(x.dtype)
    biases = jnp.concatenate([row_biases, column_biases], axis=1)
    heads, both, _ = keys.shape
    by_shift = _product(x.reshape(-1, features), keys.reshape(-1, features)).reshape(height, width, heads, both)
    rows, columns = jnp.split(by_shift + biases, 2, axis=-1)
    # A product with 0 and 1 looks up by shift: the gradient of indexing would be a scatter, slow on every device.
    one_hot = jnp.eye(both // 2)
    row = jnp.einsum("ijhs,sik->hijk", rows, _along(one_hot, height), precision="highest")
    column = jnp.einsum("ijhs,sjl->hijl", columns, _along(one_hot, width), precision="highest")
    return row, column


def content(
    query: Float[Array, "heads H W features"], key: Float[Array, "H W features"]
) -> Float[Array, "heads H W H W"]:
    """q_h[i, j] . k[k, l], the query already divided by sqrt(D) (Vaswani et al. 2017)."""
    heads, height, width, features = query.shape
    scores = _product(query.reshape(-1, features), key.reshape(-1, features))
    return scores.reshape(heads, height, width, height, width)


def _product(a: Float[Array, "n features"], b: Float[Array, "m features"]) -> Float[Array, "n m"]:
    """a b^T, in float32 whatever the type of a and b."""
    return jnp.einsum("nd,md->nm", a, b, preferred_element_type=jnp.float32)
