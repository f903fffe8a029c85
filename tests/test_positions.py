"""Scores: what each encoding says of a query, a key and the shift between them."""

import jax
import jax.numpy as jnp
import numpy as np

from attn_cnn import positions


def test_shift_is_key_minus_query():
    np.testing.assert_array_equal(positions.shifts(3), [[0, 1, 2], [-1, 0, 1], [-2, -1, 0]])


def test_quadratic_score_is_the_scaled_squared_distance_to_the_center():
    centers, spreads = jnp.array([[1.0, -2.0]]), jnp.array([0.5])
    row, column = positions.quadratic(centers, spreads, 4, 5)
    i, j, k, l = 3, 1, 0, 4
    shift = np.array([k - i, l - j])
    expected = -0.5 * 0.5**2 * np.sum((shift - np.array([1, -2])) ** 2)
    np.testing.assert_allclose(row[0, i, k] + column[0, j, l], expected, rtol=1e-6)


def test_generalized_with_isotropic_spread_is_quadratic():
    key = jax.random.key(0)
    centers, spreads = jax.random.normal(key, (3, 2)), jnp.array([0.3, 1.0, 2.0])
    row, column = positions.quadratic(centers, spreads, 4, 5)
    scores = positions.quadratic_generalized(centers, spreads[:, None, None] * jnp.eye(2), 4, 5)
    np.testing.assert_allclose(scores, row[:, :, None, :, None] + column[:, None, :, None, :], rtol=1e-5, atol=1e-5)


def test_generalized_score_is_the_mahalanobis_form():
    center, spread = np.array([0.5, -1.0]), np.array([[1.0, 0.4], [-0.2, 0.7]])
    scores = positions.quadratic_generalized(jnp.array([center]), jnp.array([spread]), 3, 4)
    i, j, k, l = 2, 0, 1, 3
    d = np.array([k - i, l - j]) - center
    np.testing.assert_allclose(scores[0, i, j, k, l], -0.5 * d @ spread @ spread.T @ d, rtol=1e-5)


def test_learned_scores_depend_on_the_shift_alone():
    by_shift = jnp.arange(7.0)[:, None]  # shifts -3 .. 3
    row, column = positions.learned(by_shift, 10 * by_shift, 4, 3)
    assert row.shape == (1, 4, 4) and column.shape == (1, 3, 3)
    np.testing.assert_array_equal(row[0], 3 + positions.shifts(4))
    np.testing.assert_array_equal(column[0], 10 * (3 + positions.shifts(3)))


def test_learned_query_gives_rows_the_first_half_of_the_query():
    query = jax.random.normal(jax.random.key(0), (2, 3, 4, 5, 6))
    rows, columns = jax.random.normal(jax.random.key(1), (2, 7, 3))
    row, column = positions.learned_query(query, rows, columns)
    b, h, i, j, k, l = 1, 4, 2, 1, 0, 3
    np.testing.assert_allclose(row[b, h, i, j, k], query[b, i, j, h, :3] @ rows[k - i + 3] / np.sqrt(6), rtol=1e-5)
    np.testing.assert_allclose(
        column[b, h, i, j, l], query[b, i, j, h, 3:] @ columns[l - j + 3] / np.sqrt(6), rtol=1e-5
    )


def test_content_score_is_the_scaled_dot_product():
    query, key = jax.random.normal(jax.random.key(0), (2, 2, 3, 4, 5, 6))
    scores = positions.content(query, key)
    b, h, i, j, k, l = 1, 4, 2, 1, 0, 3
    expected = query[b, i, j, h] @ key[b, k, l, h] / np.sqrt(6)
    np.testing.assert_allclose(scores[b, h, i, j, k, l], expected, rtol=1e-5)
