"""Attention scores of the encodings (sections 2 and 3 of the paper), as pure functions.

A query pixel (i, j) looks at a key pixel (k, l) through their shift d = (k - i, l - j). An encoding is
*separable* when its score is (a function of the rows) + (a function of the columns): the softmax over the
whole grid is then the product of a softmax over rows and one over columns, exactly. Separable encodings
return these two terms, the others their full score.

Letters of the shapes: H, W the grid; i, j the query; k, l the key; M the largest grid side the tables cover.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

SEPARABLE = ("quadratic", "learned", "learned_query")
LEARNED = ("learned", "learned_query", "learned_content", "learned_content_position")
HALVING = ("learned_query", "learned_content")  # one half of the query meets each table
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
        offset = shifts(side) - center[:, None, None]
        return -0.5 * (spreads[:, None, None] * offset) ** 2

    return term(height, centers[:, 0]), term(width, centers[:, 1])


def quadratic_generalized(
    centers: Float[Array, "heads 2"], spreads: Float[Array, "heads 2 2"], height: int, width: int
) -> Float[Array, "heads {height} {width} {height} {width}"]:
    """-1/2 (d - mu_h)^T S_h S_h^T (d - mu_h): a full covariance, so rows and columns do not separate."""
    rows = shifts(height)[None] - centers[:, 0, None, None]
    columns = shifts(width)[None] - centers[:, 1, None, None]
    # |S^T (d - mu)|^2, whose two components are each a row part plus a column part
    row_parts = jnp.einsum("hik,hc->chik", rows, spreads[:, 0])
    column_parts = jnp.einsum("hjl,hc->chjl", columns, spreads[:, 1])
    first, second = row_parts[:, :, :, None, :, None] + column_parts[:, :, None, :, None, :]
    return -0.5 * (first**2 + second**2)


def _along(scores: Float[Array, "shifts heads"], side: int) -> Float[Array, "heads {side} {side}"]:
    """Scores by shift laid out as (head, query, key); shift 0 is the middle of the table."""
    middle = scores.shape[0] // 2
    return scores.T[:, shifts(side) + middle]


def learned(
    row_scores: Float[Array, "shifts heads"],
    column_scores: Float[Array, "shifts heads"],
    height: int,
    width: int,
) -> tuple[Float[Array, "heads {height} {height}"], Float[Array, "heads {width} {width}"]]:
    """u_h . r_row[d_row] and v_h . r_col[d_col], given the tables already mapped to one score a head."""
    return _along(row_scores, height), _along(column_scores, width)


def learned_query(
    query: Float[Array, "batch height width heads features"],
    row_embeddings: Float[Array, "shifts half"],
    column_embeddings: Float[Array, "shifts half"],
) -> tuple[Float[Array, "batch heads height width height"], Float[Array, "batch heads height width width"]]:
    """q_h[i, j] . (r_row[d_row] (+) r_col[d_col]) / sqrt(D): the query's first half meets the row table, its
    second half the column table (Ramachandran et al. 2019, section 3)."""
    height, width, features = query.shape[1], query.shape[2], query.shape[-1]
    half, middle = row_embeddings.shape[1], row_embeddings.shape[0] // 2
    query = query / jnp.sqrt(features).astype(query.dtype)
    rows = row_embeddings[shifts(height) + middle].astype(query.dtype)
    columns = column_embeddings[shifts(width) + middle].astype(query.dtype)
    row_term = jnp.einsum("bijhd,ikd->bhijk", query[..., :half], rows, preferred_element_type=jnp.float32)
    column_term = jnp.einsum("bijhd,jld->bhijl", query[..., half:], columns, preferred_element_type=jnp.float32)
    return row_term, column_term


def content(
    query: Float[Array, "batch height width heads features"],
    key: Float[Array, "batch height width heads features"],
) -> Float[Array, "batch heads height width height width"]:
    """q_h[i, j] . k_h[k, l] / sqrt(D) (Vaswani et al. 2017)."""
    query = query / jnp.sqrt(query.shape[-1]).astype(query.dtype)
    return jnp.einsum("bijhd,bklhd->bhijkl", query, key, preferred_element_type=jnp.float32)
