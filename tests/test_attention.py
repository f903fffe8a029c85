"""Attention layers: in every form they are a softmax over the whole grid, with dropout and memory as they promise."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from golden import assert_close, assert_trees_close, small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_cnn import mixing
from attn_cnn.attention import SelfAttention, attention_maps
from attn_cnn.encodings import ENCODINGS
from attn_cnn.errors import UserError
from attn_cnn.layers import LinearMap
from attn_cnn.mixing import Device
from attn_cnn.model import create_model
from configs import resnet18

SEPARABLE = [name for name, encoding in ENCODINGS.items() if encoding.separable]
CONTENT = ["learned_content", "learned_content_position", "gated"]
ONE_OF_EACH_KIND = ["quadratic", pytest.param("learned_content", marks=pytest.mark.slow), "gated"]

SPREADS = st.sampled_from([0.0, 1e-3, 0.1, 1.0, 3.0, 1e3])
CENTERS = st.sampled_from([-1e3, -7.5, -1.0, 0.0, 0.3, 2.0, 50.0])


def in_blocks_of(values):
    """Returns a device that takes this many values at once."""
    return Device("gpu", values * mixing.BYTES_PER_BLOCK_VALUE)


@pytest.mark.slow
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

    dense = layers["dense"].apply({"params": params}, x)
    factored, collected = layers["factored"].apply({"params": params}, x, mutable=["intermediates"])
    expected = reference.softmax(reference.quadratic_scores(reference.shifts(height, width), centers, spreads))
    probabilities = collected["intermediates"]["probabilities"][0][0]
    np.testing.assert_allclose(probabilities.sum((-2, -1)), 1, rtol=1e-5)
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    formula = reference.attend(expected, x, params["value"])
    np.testing.assert_allclose(factored, formula, atol=1e-4)
    np.testing.assert_allclose(dense, formula, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", SEPARABLE)
def test_factored_and_dense_agree_on_a_grid_that_is_not_square(encoding):
    x = jax.random.normal(jax.random.key(0), (3, 4, 7, 6))
    layer = functools.partial(SelfAttention, encoding, heads=5, max_side=7)
    params = layer().init(jax.random.key(1), x)["params"]

    def loss(params, mixing):
        return jnp.sin(layer(mixing=mixing).apply({"params": params}, x)).sum()

    factored, dense = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, m) for m in ("factored", "dense"))
    assert_trees_close(factored, dense)


@pytest.fixture
def forms(monkeypatch):
    """A function from a layer to the forms that it mixes in."""
    calls = set()
    for form in (mixing.Factors, mixing.Whole):
        mix = form.mix
        monkeypatch.setattr(form, "mix", lambda A, x, form=form, mix=mix: (calls.add(form.__name__), mix(A, x))[1])

    def forms(layer, train):
        calls.clear()
        x = jax.ShapeDtypeStruct((1, 4, 4, 6), jnp.float32)
        params = jax.eval_shape(layer.init, jax.random.key(0), x)
        calls.clear()
        rngs = {"dropout": jax.random.key(0)}
        jax.eval_shape(lambda params, x: layer.apply(params, x, train=train, rngs=rngs), params, x)
        return set(calls)

    return forms


def test_auto_is_factored_unless_dropout_falls_on_the_probabilities(forms):
    layer = functools.partial(SelfAttention, "quadratic", 2)
    assert forms(layer(), train=True) == {"Factors"}
    assert forms(layer(dropout=0.5), train=False) == {"Factors"}
    assert forms(layer(dropout=0.5), train=True) == {"Whole"}
    assert forms(layer(dropout=0.5, dropout_on="factors"), train=True) == {"Factors"}
    assert forms(layer(mixing="dense"), train=True) == {"Whole"}


def test_the_positional_half_of_gated_attention_is_factored_unless_dropout_falls_on_the_probabilities(forms):
    layer = functools.partial(SelfAttention, "gated", 2)
    assert forms(layer(), train=True) == {"Factors", "Whole"}
    assert forms(layer(dropout=0.5), train=False) == {"Factors", "Whole"}
    assert forms(layer(dropout=0.5), train=True) == {"Whole"}
    assert forms(layer(mixing="dense"), train=True) == {"Whole"}


def test_dropout_falls_on_the_probabilities():
    layer = SelfAttention("quadratic", 1, dropout=0.5)
    x = jnp.ones((2, 4, 4, 1))
    params = {"centers": jnp.zeros((1, 2)), "spreads": jnp.zeros(1)}
    params["value"] = {"kernel": jnp.ones((1, 1, 1)), "bias": jnp.zeros(1)}
    y = jax.jit(functools.partial(layer.apply, train=True))({"params": params}, x, rngs={"dropout": jax.random.key(0)})
    kept = y * 16 / 2  # uniform attention over 16 pixels, the kept ones scaled by 1 / (1 - rate)
    np.testing.assert_allclose(kept, np.round(kept), atol=1e-4)
    assert kept.min() > 0 and kept.max() < 16 and kept.std() > 0
    np.testing.assert_array_equal(y[0], y[1])  # one mask for the whole batch


@pytest.mark.slow
@pytest.mark.parametrize("encoding", SEPARABLE)
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


@pytest.mark.slow
@pytest.mark.parametrize("heads", [2, 0])
@pytest.mark.parametrize("side", [2, 8])  # 4 pixels are fewer, and 64 more, than the 12 rows of the kernel of two heads
def test_an_output_map_is_applied_whether_composed_with_the_value_or_not(heads, side):
    layer = SelfAttention("quadratic", heads)
    then = LinearMap(*(jax.random.normal(jax.random.key(3), shape) for shape in ((6, 5), (5,))))
    x = jax.random.normal(jax.random.key(0), (1, side, side, 6))
    params = jax.jit(layer.init)(jax.random.key(1), x)
    both, alone = jax.jit(lambda params, x: (layer.apply(params, x, then), layer.apply(params, x)))(params, x)
    assert_close(both, alone @ then.kernel + then.bias)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_layer_without_heads_adds_its_bias_alone(encoding):
    layer = SelfAttention(encoding, heads=0)
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 6))
    params = layer.init(jax.random.key(1), x)["params"]
    assert params["value"]["bias"].shape == (6,)
    assert sum(p.size for p in jax.tree.leaves(params)) == 6
    y, collected = layer.apply({"params": params}, x, mutable=["intermediates", "losses"])
    np.testing.assert_array_equal(y, jnp.broadcast_to(params["value"]["bias"], x.shape))
    assert not collected


def temporaries(x, *args, **kwargs):
    """Bytes that a layer's values and gradients need beside arguments and results."""
    layer = SelfAttention(*args, **kwargs)
    params = jax.eval_shape(layer.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype))
    gradient = jax.grad(lambda params, x: jnp.square(layer.apply(params, x)).sum(), (0, 1))
    return jax.jit(gradient).lower(params, x).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("mixing", ["factored", "dense"])
def test_memory_does_not_grow_with_the_heads(mixing):
    x = jax.ShapeDtypeStruct((64, 8, 8, 8), jnp.float32)
    few, many = (temporaries(x, "quadratic", heads, mixing=mixing, device=in_blocks_of(2 * 8**4)) for heads in (2, 16))
    assert many < 1.2 * few


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["learned_query", *CONTENT])
def test_the_probabilities_of_a_batch_are_never_there_at_once(encoding):
    x = jax.ShapeDtypeStruct((64, 16, 16, 8), jnp.float32)
    assert temporaries(x, encoding, 8) < 4 * 64 * 8 * 16**4 / 4


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_block_changes_nothing_but_the_order_of_sums(encoding):
    images, heads, image = 5, 6, (3, 4, 12)
    x = jax.random.normal(jax.random.key(0), (images, *image))
    params = jax.jit(SelfAttention(encoding, heads, max_side=4).init)(jax.random.key(1), x)
    for dropout_on in ("probabilities", "factors") if encoding in SEPARABLE else ("probabilities",):

        def values(block, dropout_on=dropout_on):
            device = in_blocks_of(block)
            layer = SelfAttention(encoding, heads, max_side=4, dropout=0.3, dropout_on=dropout_on, device=device)

            def loss(params, x):
                return jnp.sin(layer.apply(params, x, train=True, rngs={"dropout": jax.random.key(2)})).sum()

            return jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)

        together = values(4 * images * heads * math.prod(image))
        for blocks in (1, 3, 4 * 2 * heads):  # one head of one image, three heads of one, all heads of two
            assert_trees_close(values(blocks * math.prod(image)), together)


def test_each_head_has_a_mask_of_its_own():
    layer = SelfAttention("quadratic", heads=2, dropout=0.5)
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 3))
    value = jax.random.normal(jax.random.key(1), (3, 3))
    params = {"centers": jnp.zeros((2, 2)), "spreads": jnp.ones(2)}  # two heads whose outputs cancel
    params["value"] = {"kernel": jnp.stack([value, -value]), "bias": jnp.zeros(3)}
    np.testing.assert_allclose(jax.jit(layer.apply)({"params": params}, x), 0, atol=1e-6)
    y = jax.jit(functools.partial(layer.apply, train=True))({"params": params}, x, rngs={"dropout": jax.random.key(0)})
    assert np.abs(y).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["learned_query", *CONTENT])
def test_each_image_has_a_mask_of_its_own_where_probabilities_depend_on_it(encoding):
    layer = SelfAttention(encoding, heads=2, dropout=0.5)
    x = jnp.repeat(jax.random.normal(jax.random.key(0), (1, 4, 4, 6)), 3, axis=0)
    params = jax.jit(layer.init)(jax.random.key(1), x)
    y = jax.jit(functools.partial(layer.apply, train=True))(params, x, rngs={"dropout": jax.random.key(0)})
    assert min(np.abs(y[0] - y[1]).max(), np.abs(y[1] - y[2]).max()) > 0.01


@pytest.mark.parametrize("encoding", ["quadratic_generalized", *CONTENT])
def test_factored_is_refused_where_it_is_not_exact(encoding):
    with pytest.raises(UserError, match=f"factored.*{encoding}"):
        create_model(small_model(encoding, mixing="factored"))


def test_factored_is_refused_with_dropout_on_the_probabilities():
    with pytest.raises(UserError, match=r"attention_dropout is 0\.1"):
        create_model(small_model("quadratic", mixing="factored", attention_dropout=0.1))
    create_model(small_model("quadratic", mixing="factored", attention_dropout=0.1, attention_dropout_on="factors"))


@pytest.mark.parametrize("encoding", ["quadratic_generalized", *CONTENT])
def test_dropout_on_factors_is_refused_where_there_are_none(encoding):
    with pytest.raises(UserError, match=f"attention_dropout_on is factors.*{encoding}"):
        create_model(small_model(encoding, attention_dropout_on="factors"))


# --- Gated attention -------------------------------------------------------------------------------------------------


@functools.cache
def gated_start():
    """Returns grids, and the parameters that a gated layer starts with."""
    x = jax.random.normal(jax.random.key(0), (2, 4, 5, 6))
    return x, jax.jit(SelfAttention("gated", 3).init)(jax.random.key(1), x)["params"]


def gated():
    """Returns grids, and parameters of a gated layer with gates that differ."""
    x, params = gated_start()
    return x, params | {"gates": jnp.array([-2.0, 0.5, 3.0])}


@pytest.mark.slow
def test_gates_start_at_1():
    np.testing.assert_array_equal(gated_start()[1]["gates"], [1, 1, 1])


def test_gated_attention_is_its_formula():
    x, params = gated()
    scores = reference.quadratic_scores(reference.shifts(4, 5), params["centers"], params["spreads"])
    content = reference.softmax(reference.content_scores(x, params["query"], params["key"]))
    g = 1 / (1 + np.exp(-np.asarray(params["gates"], np.float64)))[:, None, None, None, None]
    expected = (1 - g) * content + g * reference.softmax(scores)
    for form in ("auto", "dense"):
        layer = SelfAttention("gated", 3, mixing=form)
        y, collected = jax.jit(functools.partial(layer.apply, mutable=["intermediates"]))({"params": params}, x)
        assert_close(collected["intermediates"]["probabilities"][0], expected)
        assert_close(y, reference.attend(expected, x, params["value"]))


@pytest.mark.slow
def test_gated_attention_has_the_gradients_of_its_dense_form():
    x, params = gated()

    def gradients(form):
        layer = SelfAttention("gated", 3, mixing=form)
        return jax.jit(jax.grad(lambda *args: jnp.sin(layer.apply(*args)).sum(), (0, 1)))({"params": params}, x)

    ours, dense = gradients("auto"), gradients("dense")
    for of_params, _ in (ours, dense):  # softmax gives the key's bias no gradient: both are rounding errors
        assert np.abs(of_params["params"]["key"].pop("bias")).max() < 1e-5
    assert_trees_close(ours, dense)
    assert all(np.abs(gradient).max() > 1e-3 for gradient in jax.tree.leaves(ours))


# --- Where layers are used -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ONE_OF_EACH_KIND)
def test_a_layer_exported_for_any_batch_computes_what_the_layer_does(encoding):
    layer = SelfAttention(encoding, heads=2, max_side=4)
    grids = jax.random.normal(jax.random.key(0), (3, 4, 4, 6))
    params = jax.jit(layer.init)(jax.random.key(1), grids)
    shape = jax.export.symbolic_shape("b, 4, 4, 6")
    exported = jax.export.export(jax.jit(layer.apply))(params, jax.ShapeDtypeStruct(shape, jnp.float32))
    expected = jax.jit(layer.apply)(params, grids)
    for batch in (1, 3):
        assert_close(exported.call(params, grids[:batch]), expected[:batch])


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ONE_OF_EACH_KIND)
def test_a_layer_works_in_another_module_under_jit_and_vmap_and_grad(encoding):
    class Twice(nn.Module):
        """One attention layer, applied twice."""

        @nn.compact
        def __call__(self, x):
            layer = SelfAttention(encoding, heads=2, max_side=4)
            return layer(nn.relu(layer(x)))

    x = jax.random.normal(jax.random.key(0), (3, 2, 3, 4, 6))
    params = jax.jit(Twice().init)(jax.random.key(1), x[0])
    (params_alone,) = params["params"].values()
    layer = SelfAttention(encoding, heads=2, max_side=4)

    def by_hand(params, x):
        return layer.apply({"params": params}, nn.relu(layer.apply({"params": params}, x)))

    expected = jnp.stack([jax.jit(by_hand)(params_alone, grids) for grids in x])
    assert_close(jax.jit(jax.vmap(Twice().apply, (None, 0)))(params, x), expected)
    of_each = jax.jit(jax.vmap(jax.grad(lambda x, params: jnp.sin(Twice().apply(params, x)).sum()), (0, None)))(
        x, params
    )
    of_all = jax.jit(jax.grad(lambda x: sum(jnp.sin(by_hand(params_alone, grids)).sum() for grids in x)))(x)
    assert_close(of_each, of_all)


@pytest.mark.parametrize("layer", ["convolution", "attention"])
def test_attention_maps_of_a_resnet_are_refused(layer):
    config = resnet18.get_config("digits")
    config.model.width, config.model.layer = 2, layer
    model, x = create_model(config.model), jnp.ones((1, 8, 8, 1))
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    with pytest.raises(UserError, match="ResNet18 needs statistics beside its parameters"):
        jax.eval_shape(lambda params: attention_maps(model, params, x), params)


@pytest.mark.parametrize(
    "words, message",
    [
        ({"start": "Grid"}, "SelfAttention.start is 'Grid'; it must be one of random, grid, impulse"),
        ({"content_start": "mimetik"}, "SelfAttention.content_start is 'mimetik'; it must be one of random, mimetic"),
        ({"mixing": "dence"}, "SelfAttention.mixing is 'dence'; it must be one of auto, factored, dense"),
        ({"dropout_on": "factor"}, "SelfAttention.dropout_on is 'factor'; it must be one of probabilities, factors"),
        ({"start": "grid"}, "start is grid, .* but heads is 8; the nearest squares are 4 and 9"),
    ],
)
def test_a_layer_alone_names_the_word_that_it_does_not_know(words, message):
    with pytest.raises(UserError, match=message):
        SelfAttention("quadratic", heads=8, **words).init(jax.random.key(0), jnp.ones((1, 4, 4, 3)))


@pytest.mark.parametrize(
    "encoding, attributes, message",
    [
        ("quadratic", {"embedding_size": 8}, "SelfAttention.embedding_size is 8, which the quadratic encoding ignores"),
        (
            "learned",
            {"start": "grid"},
            "SelfAttention.start is grid, which the learned encoding ignores; set it to ran",
        ),
        ("quadratic", {"init_spread": 3.0}, "SelfAttention.init_spread is 3.0, which a random start ignores"),
        ("learned_query", {}, "the number of features is 3; the learned_query encoding halves each query"),
        ("quadratic_generalized", {"mixing": "factored"}, "SelfAttention.mixing is factored, but the quadratic_gen"),
        (
            "quadratic",
            {"mixing": "factored", "dropout": 0.1},
            r"SelfAttention.dropout is 0.1\) breaks .* or SelfAttention.dropout_on to factors",
        ),
    ],
)
def test_a_layer_alone_says_what_it_cannot_use_by_the_names_of_its_attributes(encoding, attributes, message):
    with pytest.raises(UserError, match=message):
        SelfAttention(encoding, heads=9, **attributes).init(jax.random.key(0), jnp.ones((1, 4, 4, 3)))


def test_attention_maps_of_a_model_without_attention():
    class Linear(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            return nn.Dense(1)(x)

    x = jnp.ones((1, 2, 2, 1))
    params = Linear().init(jax.random.key(0), x)["params"]
    with pytest.raises(UserError, match="Linear has no attention"):
        attention_maps(Linear(), params, x)
