"""Attention scores of the encodings (sections 2 and 3 of the paper), as pure functions of one head.

A query pixel (i, j) looks at a key pixel (k, l) through their shift d = (k - i, l - j). An encoding is
*separable* when its score is (a function of the rows) + (a function of the columns): the softmax over the
whole grid is then the product of a softmax over rows and one over columns, exactly. Separable encodings
return these two terms, the others their full score.

Letters of the shapes: H, W the grid; i, j the query; k, l the key;
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
    center: Float[Array, "2"], spread: Float[Array, ""], height: int, width: int
) -> tuple[Float[Array, "{height} {height}"], Float[Array, "{width} {width}"]]:
    """-1/2 s^2 |d - mu|^2 as its row and column terms (paper, eq. 9; s^2 is twice its alpha)."""

    def term(side, center):
        return -0.5 * (spread * (shifts(side) - center)) ** 2

    return term(height, center[0]), term(width, center[1])


def quadratic_generalized(
    center: Float[Array, "2"], spread: Float[Array, "2 2"], height: int, width: int
) -> Float[Array, "{height} {width} {height} {width}"]:
    """-1/2 (d - mu)^T S S^T (d - mu): a full covariance, so rows and columns do not separate."""
    # |S^T (d - mu)|^2, whose two components are each a row part plus a column part
    row_parts = jnp.einsum("ik,c->cik", shifts(height) - center[0], spread[0])
    column_parts = jnp.einsum("jl,c->cjl", shifts(width) - center[1], spread[1])
    first, second = row_parts[:, :, None, :, None] + column_parts[:, None, :, None, :]
    return -0.5 * (first**2 + second**2)


def _along(by_shift: Float[Array, "shifts *values"], side: int) -> Float[Array, "{side} {side} *values"]:
    """What a table holds of each query (first axis) and key (second axis); shift 0 is its middle."""
    return by_shift[shifts(side) + by_shift.shape[0] // 2]


def learned(
    row_scores: Float[Array, "shifts"], column_scores: Float[Array, "shifts"], height: int, width: int
) -> tuple[Float[Array, "{height} {height}"], Float[Array, "{width} {width}"]]:
    """u . r_row[d_row] and v . r_col[d_col], given the tables already mapped to scores."""
    return _along(row_scores, height), _along(column_scores, width)


def learned_query(
    x: Float[Array, "batch H W features"],
    row_keys: Float[Array, "shifts features"],
    row_biases: Float[Array, "shifts"],
    column_keys: Float[Array, "shifts features"],
    column_biases: Float[Array, "shifts"],
) -> tuple[Float[Array, "batch H W H"], Float[Array, "batch H W W"]]:
    """q[i, j] . (r_row[d_row] (+) r_col[d_col]) / sqrt(D) (Ramachandran et al. 2019, section 3).

    With q = Q^T x + c this is x . (Q r) + c . r; the keys are Q r and the biases c . r, divided by sqrt(D).
    """
    keys = jnp.concatenate([row_keys, column_keys]).astype(x.dtype)
    by_shift = jnp.einsum("bijd,sd->bijs", x, keys, preferred_element_type=jnp.float32)
    rows, columns = jnp.split(by_shift + jnp.concatenate([row_biases, column_biases]), 2, axis=-1)
    height, width = x.shape[1:3]
    # A product with 0 and 1 looks up by shift: the gradient of indexing would be a scatter, slow on every device.
    one_hot = jnp.eye(len(row_keys))
    row = jnp.einsum("bijs,iks->bijk", rows, _along(one_hot, height), precision="highest")
    column = jnp.einsum("bijs,jls->bijl", columns, _along(one_hot, width), precision="highest")
    return row, column


def content(
    query: Float[Array, "batch H W features"], key: Float[Array, "batch H W features"]
) -> Float[Array, "batch H W H W"]:
    """q[i, j] . k[k, l], the query already divided by sqrt(D) (Vaswani et al. 2017)."""
    batch, height, width, features = query.shape
    query, key = query.reshape(batch, -1, features), key.reshape(batch, -1, features)
    scores = jnp.einsum("bqd,bkd->bqk", query, key, preferred_element_type=jnp.float32)
    return scores.reshape(batch, height, width, height, width)
