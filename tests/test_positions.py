"""Scores: what each encoding says of a query, a key and the shift between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_cnn import positions


def test_shift_is_key_minus_query():
    np.testing.assert_array_equal(positions.shifts(3), [[0, 1, 2], [-1, 0, 1], [-2, -1, 0]])


def test_quadratic_score_is_the_scaled_squared_distance_to_the_center():
    row, column = positions.quadratic(jnp.array([1.0, -2.0]), jnp.array(0.5), 4, 5)
    i, j, k, l = 3, 1, 0, 4
    shift = np.array([k - i, l - j])
    expected = -0.5 * 0.5**2 * np.sum((shift - np.array([1, -2])) ** 2)
    np.testing.assert_allclose(row[i, k] + column[j, l], expected, rtol=1e-6)


@pytest.mark.parametrize("spread", [0.3, 1.0, 2.0])
def test_generalized_with_isotropic_spread_is_quadratic(spread):
    center = jax.random.normal(jax.random.key(0), (2,))
    row, column = positions.quadratic(center, jnp.array(spread), 4, 5)
    scores = positions.quadratic_generalized(center, spread * jnp.eye(2), 4, 5)
    np.testing.assert_allclose(scores, row[:, None, :, None] + column[None, :, None, :], rtol=1e-5, atol=1e-5)


def test_generalized_score_is_the_mahalanobis_form():
    center, spread = np.array([0.5, -1.0]), np.array([[1.0, 0.4], [-0.2, 0.7]])
    scores = positions.quadratic_generalized(jnp.array(center), jnp.array(spread), 3, 4)
    i, j, k, l = 2, 0, 1, 3
    d = np.array([k - i, l - j]) - center
    np.testing.assert_allclose(scores[i, j, k, l], -0.5 * d @ spread @ spread.T @ d, rtol=1e-5)


def test_learned_scores_depend_on_the_shift_alone():
    by_shift = jnp.arange(7.0)  # shifts -3 .. 3
    row, column = positions.learned(by_shift, 10 * by_shift, 4, 3)
    assert row.shape == (4, 4) and column.shape == (3, 3)
    np.testing.assert_array_equal(row, 3 + positions.shifts(4))
    np.testing.assert_array_equal(column, 10 * (3 + positions.shifts(3)))


def test_learned_query_looks_its_keys_up_by_shift():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 6))
    row_keys, column_keys = jax.random.normal(jax.random.key(1), (2, 7, 6))
    row_biases, column_biases = jax.random.normal(jax.random.key(2), (2, 7))
    row, column = positions.learned_query(x, row_keys, row_biases, column_keys, column_biases)
    b, i, j, k, l = 1, 2, 1, 0, 3
    np.testing.assert_allclose(
        row[b, i, j, k], x[b, i, j] @ row_keys[k - i + 3] + row_biases[k - i + 3], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        column[b, i, j, l], x[b, i, j] @ column_keys[l - j + 3] + column_biases[l - j + 3], rtol=1e-5, atol=1e-6
    )


def test_content_score_is_the_dot_product():
    query, key = jax.random.normal(jax.random.key(0), (2, 2, 3, 4, 6))
    scores = positions.content(query, key)
    b, i, j, k, l = 1, 2, 1, 0, 3
    np.testing.assert_allclose(scores[b, i, j, k, l], query[b, i, j] @ key[b, k, l], rtol=1e-5)
