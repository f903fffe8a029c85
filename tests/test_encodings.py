"""Encodings: what each says of the shift from query to key, how its heads start, and when a head is of no use."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from golden import assert_close, small_model

from attn_cnn import encodings
from attn_cnn.attention import SelfAttention
from attn_cnn.encodings import ENCODINGS, Content, Gated, Learned, LearnedQuery, Quadratic, QuadraticGeneralized
from attn_cnn.errors import UserError
from attn_cnn.model import create_model

SEPARABLE = [name for name, encoding in ENCODINGS.items() if encoding.separable]
CENTERED = ["quadratic", "quadratic_generalized", "gated"]
WITH_CONTENT = ["learned_content", "learned_content_position", "gated"]

HEADS, HEIGHT, WIDTH, FEATURES = 3, 4, 5, 6
X = jax.random.normal(jax.random.key(0), (HEIGHT, WIDTH, FEATURES))
CENTERS = jax.random.normal(jax.random.key(1), (HEADS, 2))
MATRICES = jnp.eye(2) + 0.4 * jax.random.normal(jax.random.key(2), (HEADS, 2, 2))
SPREADS = jnp.array([0.3, 1.0, 2.0])


class Declared(nn.Module):
    """A layer that declares an encoding and returns it."""

    encoding: str
    heads: int = HEADS
    max_side: int = 5
    embedding_size: int = 0
    start: str = "random"
    init_spread: float = 1.0
    content_start: str = "random"

    @nn.compact
    def __call__(self):
        return ENCODINGS[self.encoding].declare(self, FEATURES, None)


@functools.cache
def declared(encoding):
    """Returns an encoding as a layer starts it, with gates that differ from each other."""
    heads, _ = jax.jit(Declared(encoding).init_with_output)(jax.random.key(3))
    return heads.replace(gates=jnp.array([-2.0, 0.0, 1.5])) if encoding == "gated" else heads


def gaussian(name):
    """Returns an encoding whose positional part is Gaussian, and its precisions in float64."""
    content = Content(jnp.zeros((HEADS, FEATURES, FEATURES)), jnp.zeros((HEADS, FEATURES)))
    isotropic = np.asarray(SPREADS, np.float64)[:, None, None] ** 2 * np.eye(2)
    matrices = np.asarray(MATRICES, np.float64)
    return {
        "quadratic": (Quadratic(CENTERS, SPREADS), isotropic),
        "quadratic_generalized": (QuadraticGeneralized(CENTERS, MATRICES), matrices @ matrices.swapaxes(1, 2)),
        "gated": (Gated(Quadratic(CENTERS, SPREADS), content, jnp.ones(HEADS)), isotropic),
    }[name]


# --- Scores -----------------------------------------------------------------------------------------------------------


def test_shift_is_key_minus_query():
    rows, columns = encodings.shifts(3, 2)
    np.testing.assert_array_equal(rows[:, 0, :, 0], [[0, 1, 2], [-1, 0, 1], [-2, -1, 0]])
    np.testing.assert_array_equal(columns[0, :, 0], [[0, 1], [-1, 0]])
    both = np.stack(np.broadcast_arrays(rows, columns), -1)
    np.testing.assert_array_equal(both, reference.shifts(3, 2))


@pytest.mark.parametrize("name", ["quadratic", "quadratic_generalized"])
def test_the_score_is_the_squared_distance_to_the_center_as_the_precision_measures_it(name):
    heads, precisions = gaussian(name)
    expected = reference.gaussian_scores(reference.shifts(HEIGHT, WIDTH), CENTERS, precisions)
    assert_close(heads.scores(*encodings.shifts(HEIGHT, WIDTH)), expected)


@pytest.mark.parametrize("name", ["quadratic", "quadratic_generalized"])
def test_the_score_is_known_at_shifts_between_pixels_too(name):
    heads, precisions = gaussian(name)
    rows, columns = np.linspace(-3, 3, 13, dtype=np.float32), np.linspace(-2.5, 4, 9, dtype=np.float32)
    between = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1)
    expected = reference.gaussian_scores(between, CENTERS, precisions)
    assert_close(heads.scores(jnp.array(rows)[:, None], jnp.array(columns)[None]), expected)


def test_generalized_with_isotropic_spreads_is_quadratic():
    generalized = QuadraticGeneralized(CENTERS, SPREADS[:, None, None] * jnp.eye(2))
    grid = encodings.shifts(HEIGHT, WIDTH)
    scores = Quadratic(CENTERS, SPREADS).scores(*grid)
    np.testing.assert_allclose(generalized.scores(*grid), scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SEPARABLE)
def test_a_separable_score_is_a_term_of_the_key_row_plus_one_of_the_key_column(name):
    heads, grid = declared(name), encodings.shifts(HEIGHT, WIDTH)
    row, column = jax.jit(heads.terms)(*grid, X)
    scores = jax.jit(heads.scores)(*grid, X)
    assert row.shape[-1] == 1 and column.shape[-2] == 1
    assert scores.shape == (HEADS, HEIGHT, WIDTH, HEIGHT, WIDTH)
    assert_close(scores, row + column)
    # Seen from any query, rows differ by the same number in every column.
    between_rows = np.diff(np.asarray(scores, np.float64), axis=-2)
    assert_close(between_rows, np.broadcast_to(between_rows[..., :1], between_rows.shape))


@pytest.mark.parametrize("name", ENCODINGS)
def test_the_probabilities_are_the_softmax_of_the_scores_over_the_grid(name):
    heads = declared(name)
    expected = reference.softmax(heads.scores(*encodings.shifts(HEIGHT, WIDTH), X))
    assert_close(heads.probabilities(X).whole().values, expected)


def test_learned_scores_depend_on_the_shift_alone():
    by_shift = jnp.array([[1.0], [2.0]]) * jnp.arange(7.0)  # shifts -3 .. 3
    rows, columns = encodings.shifts(4, 3)
    row, column = Learned(by_shift, 10 * by_shift).terms(rows, columns)
    assert row.shape == (2, 4, 1, 4, 1) and column.shape == (2, 1, 3, 1, 3)
    for head, factor in enumerate((1, 2)):
        np.testing.assert_array_equal(row[head], factor * (3 + rows))
        np.testing.assert_array_equal(column[head], 10 * factor * (3 + columns))


@pytest.mark.slow
def test_learned_query_looks_its_keys_up_by_shift():
    x = jax.random.normal(jax.random.key(0), (3, 4, 6))
    row_keys, column_keys = jax.random.normal(jax.random.key(1), (2, 2, 7, 6))
    row_biases, column_biases = jax.random.normal(jax.random.key(2), (2, 2, 7))
    heads = LearnedQuery(row_keys, row_biases, column_keys, column_biases)
    row, column = jax.jit(heads.terms)(*encodings.shifts(3, 4), x)
    h, i, j, k, l = 1, 2, 1, 0, 3
    row_shift, column_shift = k - i + 3, l - j + 3
    np.testing.assert_allclose(
        row[h, i, j, k, 0], x[i, j] @ row_keys[h, row_shift] + row_biases[h, row_shift], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        column[h, i, j, 0, l],
        x[i, j] @ column_keys[h, column_shift] + column_biases[h, column_shift],
        rtol=1e-5,
        atol=1e-6,
    )


def test_content_score_is_the_dot_product():
    query, bias = jax.random.normal(jax.random.key(1), (3, 6, 6)), jax.random.normal(jax.random.key(2), (3, 6))
    scores = Content(query, bias).scores(X)
    h, i, j, k, l = 1, 2, 1, 0, 3
    np.testing.assert_allclose(scores[h, i, j, k, l], (X[i, j] @ query[h] + bias[h]) @ X[k, l], rtol=1e-5)


@pytest.mark.parametrize(
    "name, position", [("learned_content", "learned_query"), ("learned_content_position", "learned")]
)
def test_content_is_added_to_the_scores_of_position(name, position):
    heads, grid = declared(name), encodings.shifts(HEIGHT, WIDTH)
    assert heads.position.name == position
    assert_close(heads.scores(*grid, X), heads.position.scores(*grid, X) + heads.content.scores(X))


# --- Starts -----------------------------------------------------------------------------------------------------------


def parameters(*args, **kwargs):
    """Returns the parameters that a layer starts with."""
    return jax.jit(Declared(*args, **kwargs).init)(jax.random.key(0))["params"]


@pytest.mark.slow
def test_positions_start_as_the_paper_says():
    params = parameters("quadratic", heads=1000)
    assert np.std(params["centers"]) == pytest.approx(2, rel=0.1)
    assert np.mean(params["spreads"]) == pytest.approx(1, abs=0.002)
    assert np.std(params["spreads"]) == pytest.approx(0.01, rel=0.1)
    params = parameters("quadratic_generalized", heads=1000)
    assert np.std(params["centers"]) == pytest.approx(2, rel=0.1)
    np.testing.assert_allclose(params["spreads"].mean(0), np.eye(2), atol=0.002)
    assert np.std(params["spreads"] - np.eye(2)) == pytest.approx(0.01, rel=0.1)


def test_embeddings_start_as_unit_normals_one_for_each_shift():
    params = parameters("learned", max_side=100)
    for table in ("row_embeddings", "column_embeddings"):
        assert params[table].shape == (199, FEATURES)
        assert np.mean(params[table]) == pytest.approx(0, abs=0.1)
        assert np.std(params[table]) == pytest.approx(1, rel=0.1)


def test_a_window_lists_the_shifts_of_a_convolution_row_by_row():
    assert encodings.window(1).tolist() == [[0, 0]]
    assert encodings.window(2).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert encodings.window(3).tolist() == [[i, j] for i in (-1, 0, 1) for j in (-1, 0, 1)]


@pytest.mark.parametrize("name", CENTERED)
def test_heads_on_a_grid_start_on_the_window_of_a_convolution_with_one_spread(name):
    layer = SelfAttention(name, heads=9, start="grid", init_spread=0.7)
    params = jax.jit(layer.init)(jax.random.key(0), X[None])["params"]
    unit = np.eye(2) if name == "quadratic_generalized" else np.ones(())
    np.testing.assert_array_equal(params["centers"], encodings.window(3))
    np.testing.assert_array_equal(params["spreads"], np.broadcast_to(np.float32(0.7) * unit, (9, *unit.shape)))


@pytest.mark.parametrize("heads, side", [(9, 3), (7, 3), (16, 4), (1, 1)])
@pytest.mark.parametrize("name", ["quadratic", "quadratic_generalized"])
def test_impulses_start_anywhere_in_the_smallest_window_that_has_as_many_shifts_as_heads(name, heads, side):
    layer = SelfAttention(name, heads=heads, start="impulse", init_spread=0.7)
    first, second = (jax.jit(layer.init)(jax.random.key(seed), X[None])["params"] for seed in (0, 1))
    window = set(map(tuple, encodings.window(side).tolist()))
    assert set(map(tuple, first["centers"].tolist())) <= window
    assert heads == 1 or np.any(first["centers"] != second["centers"])
    unit = np.eye(2) if name == "quadratic_generalized" else np.ones(())
    np.testing.assert_array_equal(first["spreads"], np.broadcast_to(np.float32(0.7) * unit, (heads, *unit.shape)))


@pytest.mark.parametrize("name", ["quadratic", "quadratic_generalized"])
def test_a_grid_with_a_large_spread_is_a_convolution_away_from_the_border(name):
    """Theorem 1: head h attends to the query plus shift h alone, and its value map is the kernel's slice there."""
    layer = SelfAttention(name, heads=9, start="grid", init_spread=30.0)
    grids = jax.random.normal(jax.random.key(0), (2, 6, 7, 4))
    params = layer.init(jax.random.key(1), grids)["params"]
    kernel, bias = params["value"]["kernel"].reshape(3, 3, 4, 4), params["value"]["bias"]
    dimensions, highest = ("NHWC", "HWIO", "NHWC"), jax.lax.Precision.HIGHEST
    convolved = jax.lax.conv_general_dilated(
        grids, kernel, (1, 1), "VALID", dimension_numbers=dimensions, precision=highest
    )
    assert_close(layer.apply({"params": params}, grids)[:, 1:-1, 1:-1], convolved + bias)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_CONTENT)
def test_a_mimetic_start_has_products_of_query_and_key_near_a_multiple_of_the_identity(name):
    layer, grids = SelfAttention(name, heads=3, content_start="mimetic"), jnp.ones((1, 2, 2, 64))
    params = jax.jit(layer.init)(jax.random.key(0), grids)["params"]
    query, key = (np.moveaxis(np.asarray(params[n]["kernel"], np.float64), 1, 0) for n in ("query", "key"))
    off = query @ key.swapaxes(1, 2) - 0.7 * np.eye(64)
    assert np.std(off, axis=(1, 2)) == pytest.approx(0.7 / 8, rel=0.05)
    assert np.abs(off.mean((1, 2))).max() < 0.01
    assert_close(query @ query.swapaxes(1, 2), np.stack([np.eye(64)] * 3))
    assert np.abs(off[0] - off[1]).max() > 0.1  # each head has noise of its own


@pytest.mark.parametrize("name", CENTERED)
@pytest.mark.parametrize("heads, named, nearest", [(8, 8, "4 and 9"), ((9, 5), 5, "4 and 9"), (12, 12, "9 and 16")])
def test_heads_that_make_no_square_window_are_told_the_nearest_that_do(name, heads, named, nearest):
    with pytest.raises(UserError, match=f"init is grid.*heads is {named}; the nearest squares are {nearest}"):
        create_model(small_model(name, heads=heads, init="grid"))
    create_model(small_model(name, heads=(9, 0), init="grid"))


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_field_that_an_encoding_ignores_is_refused(name):
    tables, starts = {"share_tables": True, "embedding_size": 20}, {"init": "grid", "init_spread": 0.5}
    changed = {**tables, **starts, "content_init": "mimetic"}
    ignored = set(tables if name in CENTERED else starts) | (set() if name in WITH_CONTENT else {"content_init"})
    assert set(encodings.FIELDS) == set(changed) and set(encodings.FIELDS) - ignored == set(ENCODINGS[name].reads)
    for field in ignored:
        with pytest.raises(UserError, match=rf"model\.{field} is {changed[field]}, which the {name} encoding ignores"):
            create_model(small_model(name, **{field: changed[field]}))


@pytest.mark.parametrize("name", CENTERED)
def test_a_spread_for_the_grid_is_refused_where_heads_start_at_random(name):
    with pytest.raises(UserError, match=r"init_spread is 0\.5, which a random start ignores; set .*init to grid"):
        create_model(small_model(name, init_spread=0.5))
    create_model(small_model(name, init="grid", init_spread=0.5))


def test_an_encoding_that_is_none_is_told_which_there_are():
    with pytest.raises(UserError, match="no encoding 'sinusoidal'; the encodings are quadratic, .*gated"):
        encodings.encoding_class("sinusoidal")


# --- Heads as figures and pruning see them ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CENTERED)
def test_gaussians_are_the_centers_and_the_precisions(name):
    heads, precisions = gaussian(name)
    gaussians = heads.gaussians()
    np.testing.assert_array_equal(gaussians.centers, CENTERS)
    assert_close(gaussians.precisions, precisions)


@pytest.mark.parametrize("name", sorted(set(ENCODINGS) - set(CENTERED)))
def test_heads_that_are_no_gaussians_have_none_and_are_never_degenerate(name):
    heads = declared(name)
    assert heads.gaussians() is None
    assert heads.degenerate() == {}


def test_a_quadratic_head_is_degenerate_where_its_attention_is_uniform():
    spreads = jnp.array([1.0, 0.003, 0.0032, -0.003, -1.0, 0.0])
    quadratic = Quadratic(jnp.zeros((6, 2)), spreads)
    assert quadratic.degenerate() == {
        1: "uniform attention: s^2 is 9e-06, below 1e-05",
        3: "uniform attention: s^2 is 9e-06, below 1e-05",
        5: "uniform attention: s^2 is 0, below 1e-05",
    }
    content = Content(jnp.zeros((6, 4, 4)), jnp.zeros((6, 4)))
    assert Gated(quadratic, content, jnp.ones(6)).degenerate() == quadratic.degenerate()
    gates = jnp.array([1.0, -1.0, 1.0, 0.1, 1.0, -0.1])  # heads 1 and 5 attend by content more than by position
    assert list(Gated(quadratic, content, gates).degenerate()) == [3]


@pytest.mark.parametrize("angle", [0.0, 0.5, 2.0])
def test_a_generalized_head_is_degenerate_where_its_attention_is_a_line_or_else_uniform(angle):
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    diagonals = [(1, 1), (1, 1 / 31), (1, 1 / 32), (3, 3 / 32), (0.0033, 0.001), (0.0031, 0.001), (0.003, 0.00003)]
    spreads = jnp.array([rotation @ np.diag(diagonal) for diagonal in diagonals])
    reasons = QuadraticGeneralized(jnp.zeros((7, 2)), spreads).degenerate()
    line = r"attention is a line: condition number is 1.02e+03, above 1000"
    assert reasons == {
        2: line,
        3: line,
        5: "uniform attention: the largest eigenvalue is 9.61e-06, below 1e-05",
        6: "attention is a line: condition number is 1e+04, above 1000",
    }


def penalty64(spreads):
    spreads = np.asarray(spreads, np.float64)
    return (np.linalg.cond(spreads @ spreads.swapaxes(-1, -2)) - 1) ** 2


def penalty(spreads):
    return QuadraticGeneralized(jnp.zeros((len(spreads), 2)), spreads).penalty()


def test_the_penalty_of_a_head_is_the_square_of_its_condition_number_less_1():
    spreads = jnp.eye(2) + 0.3 * jax.random.normal(jax.random.key(0), (50, 2, 2))
    np.testing.assert_allclose(penalty(spreads), penalty64(spreads), rtol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 1e-2, 30.0])
def test_the_penalty_of_an_isotropic_head_is_0_and_so_is_its_gradient(scale):
    spreads = scale * jnp.eye(2)[None]
    value, gradient = jax.value_and_grad(lambda spreads: penalty(spreads).sum())(spreads)
    assert value == 0
    np.testing.assert_array_equal(gradient, jnp.zeros_like(spreads))


@pytest.mark.parametrize("size", [0.01, 0.3])
def test_the_gradient_of_the_penalty_is_that_of_finite_differences(size):
    spreads = jnp.eye(2) + size * jax.random.normal(jax.random.key(0), (4, 2, 2))
    exact, step = np.asarray(spreads, np.float64), 1e-6
    differences = np.zeros_like(exact)
    for index in np.ndindex(exact.shape):
        offset = np.zeros_like(exact)
        offset[index] = step
        differences[index] = (penalty64(exact + offset) - penalty64(exact - offset)).sum() / (2 * step)
    gradient = jax.grad(lambda spreads: penalty(spreads).sum())(spreads)
    for head in range(4):
        assert_close(gradient[head], differences[head], tolerance=1e-3)


def test_only_a_full_covariance_has_a_penalty():
    assert [name for name, encoding in ENCODINGS.items() if encoding.penalty] == ["quadratic_generalized"]


def test_a_grid_larger_than_learned_tables_is_an_error_that_names_max_side():
    layer = SelfAttention("learned_content_position", heads=2, max_side=4)
    params = layer.init(jax.random.key(0), jnp.ones((1, 4, 3, 6)))
    with pytest.raises(UserError, match=r"the grid is 5x4, but learned tables cover a side of 4 \(max_side\)"):
        layer.apply(params, jnp.ones((1, 5, 4, 6)))


def test_resized_tables_are_linear_in_the_shift_and_keep_the_furthest():
    table = jnp.stack([jnp.arange(7.0), -2 * jnp.arange(7.0)], axis=1)
    params = {"layer": {"row_embeddings": table, "column_embeddings": table, "other": table}}
    resized = encodings.resize_tables(params, 7)["layer"]
    np.testing.assert_allclose(resized["row_embeddings"][:, 0], np.arange(13) / 2, rtol=1e-6)
    np.testing.assert_allclose(resized["column_embeddings"][:, 1], -np.arange(13), rtol=1e-6)
    np.testing.assert_array_equal(resized["other"], table)
    jax.tree.map(np.testing.assert_array_equal, encodings.resize_tables(params, 4), params)


def test_the_gradient_of_a_product_in_half_precision_is_near_that_in_float32():
    a, b, weights = (jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate([(5, 7), (6, 7), (5, 6)]))

    def gradients(dtype):
        def total(a, b):
            return jnp.vdot(weights, encodings.product(a.astype(dtype), b.astype(dtype)))

        return jax.grad(total, (0, 1))(a, b)

    for ours, exact in zip(gradients(jnp.bfloat16), gradients(jnp.float32), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, exact, atol=0.02 * np.abs(exact).max())
