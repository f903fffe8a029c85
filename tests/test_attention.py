"""Attention layers: the factored form is the dense form, and both are a softmax over the whole grid."""

import functools

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


@pytest.mark.parametrize("encoding", ["quadratic_generalized", "learned_content", "learned_content_position"])
def test_factored_is_refused_where_it_is_not_exact(encoding):
    with pytest.raises(UserError, match=f"factored.*{encoding}"):
        create_model(Golden(encoding).model("factored"))


def test_factored_is_refused_with_attention_dropout():
    with pytest.raises(UserError, match=r"attention_dropout is 0\.1"):
        create_model(Golden("quadratic").model("factored", attention_dropout=0.1))


def test_attention_maps_of_a_model_without_attention():
    class Linear(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            return nn.Dense(1)(x)

    x = jnp.ones((1, 2, 2, 1))
    params = Linear().init(jax.random.key(0), x)["params"]
    with pytest.raises(UserError, match="Linear has no attention"):
        attention_maps(Linear(), params, x)
