"""Attention layers: the factored form is the dense form, and both are a softmax over the whole grid."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import Golden, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_cnn import attention, positions
from attn_cnn.attention import SelfAttention, attention_maps
from attn_cnn.errors import UserError
from attn_cnn.model import create_model

SPREADS = st.sampled_from([0.0, 1e-3, 0.1, 1.0, 3.0, 1e3])
CENTERS = st.sampled_from([-1e3, -7.5, -1.0, 0.0, 0.3, 2.0, 50.0])


def softmax64(scores):
    """Softmax over the last two axes in float64."""
    scores = np.asarray(scores, np.float64)
    scores = np.exp(scores - scores.max((-2, -1), keepdims=True))
    return scores / scores.sum((-2, -1), keepdims=True)


def quadratic_probabilities64(centers, spreads, height, width):
    shifts = np.stack(
        np.broadcast_arrays(
            np.arange(height)[None, None, :, None] - np.arange(height)[:, None, None, None],
            np.arange(width)[None, None, None, :] - np.arange(width)[None, :, None, None],
        ),
        axis=-1,
    )
    distances = ((shifts - np.asarray(centers, np.float64)[:, None, None, None, None]) ** 2).sum(-1)
    return softmax64(-0.5 * np.asarray(spreads, np.float64)[:, None, None, None, None] ** 2 * distances)


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    heads=st.lists(st.tuples(CENTERS, CENTERS, SPREADS), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_factored_is_dense_for_any_grid_center_and_spread(height, width, heads, seed):
    centers = jnp.array([head[:2] for head in heads])
    spreads = jnp.array([head[2] for head in heads])
    x = jax.random.normal(jax.random.key(seed), (2, height, width, 3))
    layers = {mixing: SelfAttention("quadratic", len(heads), mixing=mixing) for mixing in ("factored", "dense")}
    params = layers["dense"].init(jax.random.key(0), x)["params"]
    params = params | {"centers": centers, "spreads": spreads}

    factored, dense = (layers[m].apply({"params": params}, x) for m in ("factored", "dense"))
    expected = quadratic_probabilities64(centers, spreads, height, width)
    _, collected = layers["factored"].apply({"params": params}, x, mutable=["intermediates"])
    probabilities = collected["intermediates"]["probabilities"][0][0]
    np.testing.assert_allclose(probabilities.sum((-2, -1)), 1, rtol=1e-5)
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    mixed = np.einsum("hijkl,bkld->bijhd", expected, np.asarray(x, np.float64))
    kernel = np.asarray(params["value"]["kernel"], np.float64)
    reference = np.einsum("bijhd,hdo->bijo", mixed, kernel) + np.asarray(params["value"]["bias"])
    np.testing.assert_allclose(factored, reference, atol=1e-4)
    np.testing.assert_allclose(dense, reference, atol=1e-4)


@pytest.mark.parametrize("encoding", positions.SEPARABLE)
def test_factored_and_dense_agree_on_a_grid_that_is_not_square(encoding):
    x = jax.random.normal(jax.random.key(0), (3, 4, 7, 6))
    layer = functools.partial(SelfAttention, encoding, heads=5, max_side=7, embedding_size=3)
    params = layer().init(jax.random.key(1), x)["params"]

    def loss(params, mixing):
        return jnp.sin(layer(mixing=mixing).apply({"params": params}, x)).sum()

    outputs = [jax.value_and_grad(loss)(params, mixing) for mixing in ("factored", "dense")]
    (factored, factored_grads), (dense, dense_grads) = outputs
    assert_close(factored, dense)
    jax.tree.map(assert_close, factored_grads, dense_grads)


def test_auto_is_factored_unless_dropout_falls_on_the_probabilities(monkeypatch):
    calls = set()
    for name in ("mix_factored", "mix_dense"):
        mix = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *a, n=name, f=mix: (calls.add(n), f(*a))[1])
    x = jnp.ones((1, 4, 4, 3))
    params = SelfAttention("quadratic", 2).init(jax.random.key(0), x)

    def forms(train, **attributes):
        calls.clear()
        layer = SelfAttention("quadratic", 2, **attributes)
        layer.apply(params, x, train=train, rngs={"dropout": jax.random.key(0)})
        return calls

    assert forms(train=True) == {"mix_factored"}
    assert forms(train=False, dropout=0.5) == {"mix_factored"}
    assert forms(train=True, dropout=0.5) == {"mix_dense"}
    assert forms(train=True, dropout=0.5, dropout_on="factors") == {"mix_factored"}


def test_dropout_falls_on_the_probabilities():
    layer = SelfAttention("quadratic", 1, dropout=0.5)
    x = jnp.ones((2, 4, 4, 1))
    params = layer.init(jax.random.key(0), x)["params"] | {"spreads": jnp.zeros(1)}
    params["value"] = {"kernel": jnp.ones((1, 1, 1)), "bias": jnp.zeros(1)}
    y = layer.apply({"params": params}, x, train=True, rngs={"dropout": jax.random.key(0)})
    kept = y * 16 / 2  # uniform attention over 16 pixels, the kept ones scaled by 1 / (1 - rate)
    np.testing.assert_allclose(kept, np.round(kept), atol=1e-4)
    assert kept.min() > 0 and kept.max() < 16 and kept.std() > 0
    np.testing.assert_array_equal(y[0], y[1])  # one mask for the whole batch


def test_dropout_on_factors_drops_whole_rows_and_columns_at_the_same_rate():
    rate, side = 0.3, 40
    row, column = jnp.ones((1, side, 1, side)), jnp.ones((1, 1, side, side))
    product = attention.joint(*attention.drop_factors(jax.random.key(0)[None], rate, row, column))
    assert np.mean(product == 0) == pytest.approx(rate, abs=0.02)
    np.testing.assert_allclose(product[product > 0], 1 / (1 - rate), rtol=1e-5)
    assert np.mean(product) == pytest.approx(1, abs=0.03)  # the expectation is unchanged
    by_query = np.asarray(product[0]).reshape(side**2, side, side) == 0
    np.testing.assert_array_equal(by_query, by_query.all(2, keepdims=True) | by_query.all(1, keepdims=True))


@pytest.mark.parametrize("encoding", positions.SEPARABLE)
def test_dropout_on_factors_is_the_same_in_the_factored_and_the_dense_form(encoding):
    x = jax.random.normal(jax.random.key(0), (3, 4, 7, 6))
    layers = [
        SelfAttention(encoding, heads=5, max_side=7, mixing=mixing, dropout=0.5, dropout_on="factors")
        for mixing in ("factored", "dense")
    ]
    params = layers[0].init(jax.random.key(1), x)
    factored, dense = (layer.apply(params, x, train=True, rngs={"dropout": jax.random.key(2)}) for layer in layers)
    assert_close(factored, dense)
    assert np.abs(factored - layers[0].apply(params, x)).max() > 0.01


def test_an_output_map_is_applied_whether_composed_with_the_value_or_not():
    layer = SelfAttention("quadratic", heads=2)
    output = tuple(jax.random.normal(jax.random.key(3), shape) for shape in ((6, 5), (5,)))
    for side in (2, 8):  # 4 pixels are fewer, and 64 more, than the kernel's 12 rows
        x = jax.random.normal(jax.random.key(0), (1, side, side, 6))
        params = layer.init(jax.random.key(1), x)
        assert_close(layer.apply(params, x, None, output), layer.apply(params, x) @ output[0] + output[1])


def temporaries(x, *args, **kwargs):
    """Bytes that a layer's values and gradients need beside arguments and results."""
    layer = SelfAttention(*args, **kwargs)
    params = jax.eval_shape(layer.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype))
    gradient = jax.grad(lambda params, x: jnp.square(layer.apply(params, x)).sum(), (0, 1))
    return jax.jit(gradient).lower(params, x).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("mixing", ["factored", "dense"])
def test_memory_does_not_grow_with_the_heads(mixing):
    x = jax.ShapeDtypeStruct((64, 8, 8, 8), jnp.float32)
    few, many = (temporaries(x, "quadratic", heads, mixing=mixing, block=2 * 8**4) for heads in (2, 16))
    assert many < 1.2 * few


@pytest.mark.parametrize("encoding", ["learned_query", *positions.CONTENT])
def test_the_probabilities_of_a_batch_are_never_there_at_once(encoding):
    x = jax.ShapeDtypeStruct((64, 16, 16, 8), jnp.float32)
    assert temporaries(x, encoding, 8) < 4 * 64 * 8 * 16**4 / 4


@pytest.mark.parametrize("encoding", positions.ENCODINGS)
def test_the_block_changes_nothing_but_the_order_of_sums(encoding):
    images, heads, image = 5, 6, (3, 4, 12)
    x = jax.random.normal(jax.random.key(0), (images, *image))
    for dropout_on in ("probabilities", "factors") if encoding in positions.SEPARABLE else ("probabilities",):

        def values(block, dropout_on=dropout_on):
            layer = SelfAttention(encoding, heads, max_side=4, dropout=0.3, dropout_on=dropout_on, block=block)
            params = layer.init(jax.random.key(1), x)

            def loss(params, x):
                return jnp.sin(layer.apply(params, x, train=True, rngs={"dropout": jax.random.key(2)})).sum()

            return jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)

        together = values(4 * images * heads * math.prod(image))
        for blocks in (1, 3, 4 * 2 * heads):  # one head of one image, three heads of one, all heads of two
            jax.tree.map(assert_close, values(blocks * math.prod(image)), together)


def test_each_head_has_a_mask_of_its_own():
    layer = SelfAttention("quadratic", heads=2, dropout=0.5)
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 3))
    value = jax.random.normal(jax.random.key(1), (3, 3))
    params = {"centers": jnp.zeros((2, 2)), "spreads": jnp.ones(2)}  # two heads whose outputs cancel
    params["value"] = {"kernel": jnp.stack([value, -value]), "bias": jnp.zeros(3)}
    np.testing.assert_allclose(layer.apply({"params": params}, x), 0, atol=1e-6)
    y = layer.apply({"params": params}, x, train=True, rngs={"dropout": jax.random.key(0)})
    assert np.abs(y).max() > 0.1


@pytest.mark.parametrize("encoding", ["learned_query", *positions.CONTENT])
def test_each_image_has_a_mask_of_its_own_where_probabilities_depend_on_it(encoding):
    layer = SelfAttention(encoding, heads=2, dropout=0.5)
    x = jnp.repeat(jax.random.normal(jax.random.key(0), (1, 4, 4, 6)), 3, axis=0)
    params = layer.init(jax.random.key(1), x)
    y = layer.apply(params, x, train=True, rngs={"dropout": jax.random.key(0)})
    assert min(np.abs(y[0] - y[1]).max(), np.abs(y[1] - y[2]).max()) > 0.01


@pytest.mark.parametrize("encoding", ["quadratic_generalized", "learned_content", "learned_content_position"])
def test_factored_is_refused_where_it_is_not_exact(encoding):
    with pytest.raises(UserError, match=f"factored.*{encoding}"):
        create_model(Golden(encoding).model("factored"))


def test_factored_is_refused_with_dropout_on_the_probabilities():
    with pytest.raises(UserError, match=r"attention_dropout is 0\.1"):
        create_model(Golden("quadratic").model("factored", attention_dropout=0.1))
    create_model(Golden("quadratic").model("factored", attention_dropout=0.1, attention_dropout_on="factors"))


@pytest.mark.parametrize("encoding", ["quadratic_generalized", "learned_content", "learned_content_position"])
def test_dropout_on_factors_is_refused_where_there_are_none(encoding):
    with pytest.raises(UserError, match=f"attention_dropout_on is factors.*{encoding}"):
        create_model(Golden(encoding).model(attention_dropout_on="factors"))


def test_attention_maps_of_a_model_without_attention():
    class Linear(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            return nn.Dense(1)(x)

    x = jnp.ones((1, 2, 2, 1))
    params = Linear().init(jax.random.key(0), x)["params"]
    with pytest.raises(UserError, match="Linear has no attention"):
        attention_maps(Linear(), params, x)
