"""What a head does, in numbers: they are what their definitions say of its attention, for every encoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from golden import Golden, assert_close, small_model

from attn_cnn.attention import LayerHeads, attention_maps
from attn_cnn.encodings import ENCODINGS, Quadratic, QuadraticGeneralized
from attn_cnn.heads import measure
from attn_cnn.mixing import Factors, Weighted, Whole
from attn_cnn.model import create_model


@functools.cache
def model(encoding):
    """Returns a small model, its parameters and images."""
    images = jnp.asarray(Golden("quadratic").images)
    module = create_model(small_model(encoding))
    return module, jax.jit(module.init)(jax.random.key(0), images)["params"], images


def by_definition(A):
    """Returns the numbers of probabilities (images, heads, H, W, H, W), in float64."""
    A = np.asarray(A, np.float64)
    d = reference.shifts(*A.shape[2:4])
    means = {
        "mean_shift": A[..., None] * d,
        "nonlocality": A * np.sqrt((d**2).sum(-1)),
        "mass_3x3": A * (np.abs(d).max(-1) <= 1),
        "mass_5x5": A * (np.abs(d).max(-1) <= 2),
        "entropy": -A * np.log(np.where(A > 0, A, 1)),
    }
    return {name: value.sum((4, 5)).mean((0, 2, 3)) for name, value in means.items()}


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_numbers_are_the_means_over_queries_and_images_that_they_are_called(encoding):
    module, params, images = model(encoding)
    numbers = jax.jit(functools.partial(measure.measure, module))(params, images)
    maps = jax.jit(functools.partial(attention_maps, module))(params, images)
    assert list(numbers) == [0, 1] and len(maps) == 2
    for layer, A in enumerate(maps):
        for name, expected in by_definition(A).items():
            assert_close(numbers[layer][name], expected)


def random_factors(key, heads=2, height=3, width=4, per_query=False):
    """Returns factors that all queries of a row or a column share, or that differ from query to query."""
    row_key, column_key = jax.random.split(key)
    row = jax.random.normal(row_key, (heads, height, width if per_query else 1, height))
    column = jax.random.normal(column_key, (heads, height if per_query else 1, width, width))
    return Factors(jax.nn.softmax(row), jax.nn.softmax(column))


@pytest.mark.slow
@pytest.mark.parametrize("per_query", [False, True])
def test_factors_and_weighted_sums_have_the_numbers_of_the_whole(per_query):
    A = random_factors(jax.random.key(0), per_query=per_query)
    other = random_factors(jax.random.key(1))
    mixture = Weighted((jnp.array([0.25, 1.0]), jnp.array([0.75, 0.0])), (A, other.whole()))
    for probabilities in (A, mixture):
        whole = probabilities.whole()
        assert_close(measure.by_shift(probabilities), measure.by_shift(whole))
        assert_close(measure.entropy(probabilities), measure.entropy(whole))


def test_a_shift_that_leaves_the_grid_has_less_than_it_would_have_and_none_beyond():
    """Uniform attention on 2x3: a shift has one sixth of a sixth for each query that it keeps inside."""
    P = measure.by_shift(Whole(jnp.full((1, 2, 3, 2, 3), 1 / 6)))
    inside = np.outer([1, 2, 1], [1, 2, 3, 2, 1])
    assert_close(P[0], inside / 36)


def test_a_one_hot_head_away_from_the_border_looks_where_its_center_is():
    heads = Quadratic(jnp.array([[0.0, 0.0], [0.0, 1.0]]), jnp.full(2, 40.0))
    layer = LayerHeads(heads, jnp.zeros((1, 5, 5, 1)))
    numbers = measure.head_numbers(heads, measure.attended(layer, jnp.ones(1)))
    assert_close(numbers["entropy"], [0, 0])
    assert_close(numbers["mean_shift"], [[0, 0], [0, 0.8]])  # in the last of five columns, the query itself
    assert_close(numbers["nonlocality"], [0, 0.8])
    assert_close(numbers["most_attended_shift"], [[0, 0], [0, 1]])
    assert_close(numbers["mass_3x3"], [1, 1])
    assert_close(numbers["covariance"], [np.zeros((2, 2)), np.diag([0, 0.16])])
    assert_close(numbers["center"], heads.centers)
    assert_close(numbers["precision"], 1600 * np.stack([np.eye(2)] * 2))
    assert_close(numbers["condition_number"], [1, 1])


def test_condition_numbers_are_those_of_numpy_and_infinite_where_there_are_none():
    S = np.asarray(jax.random.normal(jax.random.key(0), (20, 2, 2)))
    matrices = jnp.asarray(S @ S.swapaxes(1, 2))
    np.testing.assert_allclose(
        measure.condition_number(matrices), np.linalg.cond(np.asarray(matrices, np.float64)), rtol=1e-3
    )
    singular = jnp.stack([jnp.zeros((2, 2)), jnp.diag(jnp.array([1.0, 0.0]))])
    assert measure.condition_number(singular).tolist() == [np.inf, np.inf]


@pytest.mark.slow
def test_images_with_weights_that_sum_to_1_over_pieces_make_the_mean_over_all():
    module, params, images = model("gated")
    layer = measure.heads_of_layers(module, params, images)[0]
    whole = measure.attended(layer, jnp.full(len(images), 1 / len(images)))
    half = len(images) // 2
    weights = jnp.where(jnp.arange(len(images)) < half, 1 / len(images), 0)
    pieces = [measure.attended(layer, w) for w in (weights, 1 / len(images) - weights)]
    jax.tree.map(assert_close, jax.tree.map(jnp.add, *pieces), whole)


def test_layers_with_other_numbers_of_heads_and_other_grids_stand_in_one_array():
    by_layer = {
        1: {"entropy": np.array([1.0, 2.0]), "row_scores": np.array([[1.0, 2, 3], [4, 5, 6]], np.float16)},
        2: {"entropy": np.array([3.0]), "row_scores": np.array([[7.0]], np.float16)},
    }
    stacked = measure.stacked(jax.tree.map(jnp.asarray, by_layer), 4)
    nan = np.nan
    np.testing.assert_array_equal(stacked["entropy"], [[nan, nan], [1, 2], [3, nan], [nan, nan]])
    np.testing.assert_array_equal(stacked["row_scores"][2], [[nan, 7, nan], [nan, nan, nan]])
    np.testing.assert_array_equal(stacked["row_scores"][1], [[1, 2, 3], [4, 5, 6]])
    assert stacked["row_scores"].dtype == np.float16


@pytest.mark.slow
def test_degenerate_heads_are_found_in_the_layer_where_they_are():
    module, params, images = model("quadratic_generalized")
    spreads = params["layer_1"]["attention"]["spreads"]
    assert not any(measure.degenerate(module, params, images.shape[1:]).values())
    params["layer_1"]["attention"]["spreads"] = spreads.at[1].set(jnp.array([[1.0, 0], [0, 1e-3]]))
    found = measure.degenerate(module, params, images.shape[1:])
    params["layer_1"]["attention"]["spreads"] = spreads
    assert found[0] == {} and list(found[1]) == [1] and "attention is a line" in found[1][1]


def test_a_full_covariance_counts_with_its_own_condition_number():
    heads = QuadraticGeneralized(jnp.zeros((1, 2)), jnp.diag(jnp.array([2.0, 1.0]))[None])
    numbers = measure.head_numbers(heads, measure.attended(LayerHeads(heads, jnp.zeros((1, 4, 4, 1))), jnp.ones(1)))
    assert_close(numbers["condition_number"], [4])
    assert_close(numbers["precision"], [[[4, 0], [0, 1]]])
