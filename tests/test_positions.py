"""Scores: what each encoding says of a query, a key and the shift between them."""

import jax
import jax.numpy as jnp
import numpy as np

from attn_cnn import positions


def test_shift_is_key_minus_query():
    np.testing.assert_array_equal(positions.shifts(3), [[0, 1, 2], [-1, 0, 1], [-2, -1, 0]])


def test_quadratic_score_is_the_scaled_squared_distance_to_the_center():
    row, column = positions.quadratic(jnp.array([[0.0, 0.0], [1.0, -2.0]]), jnp.array([1.0, 0.5]), 4, 5)
    h, i, j, k, l = 1, 3, 1, 0, 4
    shift = np.array([k - i, l - j])
    expected = -0.5 * 0.5**2 * np.sum((shift - np.array([1, -2])) ** 2)
    np.testing.assert_allclose(row[h, i, k] + column[h, j, l], expected, rtol=1e-6)


def test_generalized_with_isotropic_spreads_is_quadratic():
    centers, spreads = jax.random.normal(jax.random.key(0), (3, 2)), jnp.array([0.3, 1.0, 2.0])
    row, column = positions.quadratic(centers, spreads, 4, 5)
    scores = positions.quadratic_generalized(centers, spreads[:, None, None] * jnp.eye(2), 4, 5)
    np.testing.assert_allclose(scores, row[:, :, None, :, None] + column[:, None, :, None, :], rtol=1e-5, atol=1e-5)


def test_generalized_score_is_the_mahalanobis_form():
    centers = np.array([[0.0, 0.0], [0.5, -1.0]])
    spreads = np.array([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.4], [-0.2, 0.7]]])
    scores = positions.quadratic_generalized(jnp.array(centers), jnp.array(spreads), 3, 4)
    h, i, j, k, l = 1, 2, 0, 1, 3
    d = np.array([k - i, l - j]) - centers[h]
    np.testing.assert_allclose(scores[h, i, j, k, l], -0.5 * d @ spreads[h] @ spreads[h].T @ d, rtol=1e-5)


def test_learned_scores_depend_on_the_shift_alone():
    by_shift = jnp.array([[1.0], [2.0]]) * jnp.arange(7.0)  # shifts -3 .. 3
    row, column = positions.learned(by_shift, 10 * by_shift, 4, 3)
    assert row.shape == (2, 4, 4) and column.shape == (2, 3, 3)
    for head, factor in enumerate((1, 2)):
        np.testing.assert_array_equal(row[head], factor * (3 + positions.shifts(4)))
        np.testing.assert_array_equal(column[head], 10 * factor * (3 + positions.shifts(3)))


def test_learned_query_looks_its_keys_up_by_shift():
    x = jax.random.normal(jax.random.key(0), (3, 4, 6))
    row_keys, column_keys = jax.random.normal(jax.random.key(1), (2, 2, 7, 6))
    row_biases, column_biases = jax.random.normal(jax.random.key(2), (2, 2, 7))
    row, column = positions.learned_query(x, row_keys, row_biases, column_keys, column_biases)
    h, i, j, k, l = 1, 2, 1, 0, 3
    row_shift, column_shift = k - i + 3, l - j + 3
    np.testing.assert_allclose(
        row[h, i, j, k], x[i, j] @ row_keys[h, row_shift] + row_biases[h, row_shift], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        column[h, i, j, l],
        x[i, j] @ column_keys[h, column_shift] + column_biases[h, column_shift],
        rtol=1e-5,
        atol=1e-6,
    )


def test_content_score_is_the_dot_product():
    query, key = jax.random.normal(jax.random.key(0), (2, 3, 4, 6)), jax.random.normal(jax.random.key(1), (3, 4, 6))
    scores = positions.content(query, key)
    h, i, j, k, l = 1, 2, 1, 0, 3
    np.testing.assert_allclose(scores[h, i, j, k, l], query[h, i, j] @ key[k, l], rtol=1e-5)
