"""The classifier: its patches, its layers of any kind, its parameters and how they start, its types of number."""

import functools
import importlib

import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden import Golden, assert_close, flat, small_model
from test_config import EXPERIMENTS

from attn_cnn.attention import attention_maps
from attn_cnn.encodings import ENCODINGS, LearnedEncoding
from attn_cnn.errors import UserError
from attn_cnn.layers import LinearMap
from attn_cnn.model import (
    EncoderLayer,
    abstract_variables,
    checked_model,
    create_model,
    grids,
    has_penalty,
    patches,
)
from configs import learned, quadratic, resnet18

LEARNED = [name for name, encoding in ENCODINGS.items() if issubclass(encoding, LearnedEncoding)]
IMAGES = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))


def init(config, **kwargs):
    model = create_model(config.model, **kwargs)
    return model, jax.jit(model.init)(jax.random.key(0), IMAGES)


def test_patches_are_ordered_by_row_column_channel():
    images = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    grid = patches(images, 2)
    assert grid.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(grid[1, 1, 2], images[1, 2:4, 4:6].reshape(-1))


@pytest.mark.slow
def test_linear_layers_start_uniform_in_the_inverse_root_of_fan_in():
    config = quadratic.get_config("digits")
    config.model.layers = 1
    _, variables = init(config)
    params = flat(variables["params"])
    bound = (9 * 64) ** -0.5
    for leaf in ("kernel", "bias"):
        assert 0.9 * bound < np.abs(params[f"layer_0/attention/value/{leaf}"]).max() <= bound
    assert np.abs(params["layer_0/mlp_out/kernel"]).max() <= 128**-0.5
    assert np.std(params["layer_0/mlp_out/kernel"]) == pytest.approx(128**-0.5 / 3**0.5, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", LEARNED)
def test_shared_tables_reach_every_layer(encoding):
    config = learned.get_config("digits")
    config.model.encoding = encoding
    config.model.share_tables = True
    model, variables = init(config)
    tables = [name for name in flat(variables["params"]) if name.endswith("_embeddings")]
    assert sorted(tables) == ["column_embeddings", "row_embeddings"]
    _, collected = model.apply(variables, IMAGES, mutable=["intermediates"])
    changed = variables["params"] | {"row_embeddings": variables["params"]["row_embeddings"] + 1.0}
    changed["row_embeddings"] = changed["row_embeddings"].at[0].add(5.0)
    _, after = model.apply({"params": changed}, IMAGES, mutable=["intermediates"])
    for layer in range(config.model.layers):
        maps = [c["intermediates"][f"layer_{layer}"]["attention"]["probabilities"][0] for c in (collected, after)]
        assert np.abs(maps[0] - maps[1]).max() > 1e-3


def test_tables_may_have_another_width_but_with_the_query_not():
    config = learned.get_config("digits")
    config.model.embedding_size = 20
    params = flat(abstract_variables(config.model)["params"])
    assert params["layer_1/attention/row_embeddings"].shape == (7, 20)
    assert params["layer_1/attention/row_head_keys/kernel"].shape == (20, 9)
    config.model.encoding = "learned_query"
    with pytest.raises(UserError, match="embedding_size is 20.*must be 32"):
        create_model(config.model)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_in_bfloat16_the_loss_of_every_config_is_within_a_thousandth_and_its_gradients_within_3_percent(experiment):
    config = importlib.import_module(f"configs.{experiment}").get_config("digits")
    images = jax.random.normal(jax.random.key(0), (8, *config.model.image_shape))
    variables = jax.jit(create_model(config.model, "bfloat16").init)(jax.random.key(1), images)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(variables))

    def loss_and_gradients(dtype):
        model = create_model(config.model, dtype)

        def loss(params):
            logits = model.apply(variables | {"params": params}, images)
            assert logits.dtype == jnp.float32
            return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(8)).mean()

        value, gradients = jax.jit(jax.value_and_grad(loss))(variables["params"])
        return value, jax.flatten_util.ravel_pytree(gradients)[0]

    (loss, gradients), (expected, expected_gradients) = map(loss_and_gradients, ("bfloat16", "float32"))
    assert abs(loss - expected) < 1e-3 * expected
    assert 0 < jnp.linalg.norm(gradients - expected_gradients) < 0.03 * jnp.linalg.norm(expected_gradients)


def test_layers_have_as_many_heads_as_they_are_given_and_those_with_heads_have_maps():
    config = small_model("quadratic", layers=3, heads=(4, 0, 9))
    images, model = Golden("quadratic").images, create_model(config)
    params = abstract_variables(config)["params"]
    maps = jax.eval_shape(functools.partial(attention_maps, model), params, images)
    assert [m.shape for m in maps] == [(1, n, 6, 6, 6, 6) for n in (4, 9)]
    for i, heads in enumerate((4, 0, 9)):
        layer = params[f"layer_{i}"]["attention"]
        assert layer["value"]["bias"].shape == (12,)
        if heads:
            assert layer["value"]["kernel"].shape == (heads, 12, 12) and layer["centers"].shape == (heads, 2)
    assert flat(params["layer_1"]["attention"]).keys() == {"value/bias"}


@pytest.mark.slow
def test_a_layer_without_heads_passes_its_bias_on():
    images, model = Golden("quadratic").images, create_model(small_model("quadratic", layers=3, heads=(4, 0, 9)))
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    apply = jax.jit(model.apply)
    changed = params | {"layer_1": params["layer_1"] | {"attention": {"value": {"bias": jnp.arange(12.0)}}}}
    assert np.abs(apply({"params": changed}, images) - apply({"params": params}, images)).max() > 1e-3


@pytest.mark.parametrize("layer", ["convolution", ("attention", "convolution")])
def test_a_layer_can_be_a_convolution(layer):
    config = small_model("learned", layer=layer, kernel_size=2, heads=9)
    images, model = Golden("quadratic").images, create_model(config)
    params = abstract_variables(config)["params"]
    kinds = layer if type(layer) is tuple else (layer, layer)
    for i, kind in enumerate(kinds):
        assert ("attention" in params[f"layer_{i}"], "convolution" in params[f"layer_{i}"]) == (
            kind == "attention",
            kind == "convolution",
        )
    assert flat(params)["layer_1/convolution/convolution/kernel"].shape == (2, 2, 12, 12)
    assert jax.eval_shape(model.apply, {"params": params}, images).shape == (2, 10)
    maps = kinds.count("attention")
    if maps:
        assert len(jax.eval_shape(functools.partial(attention_maps, model), params, images)) == maps
    else:
        with pytest.raises(UserError, match="no attention layers"):
            jax.eval_shape(functools.partial(attention_maps, model), params, images)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_grid_that_halves_gives_each_layer_its_own_grid_and_size(encoding):
    config = small_model(encoding, layers=3, hidden_size=(12, 16, 16), mlp_size=(8, 20, 8), merge_before=(1,))
    images, model = Golden("quadratic").images, create_model(config)
    assert grids(checked_model(config)) == [(6, 6), (3, 3), (3, 3)]
    params = abstract_variables(config)["params"]
    assert params["merge_1"]["kernel"].shape == (4 * 12, 16)
    assert [params[f"layer_{i}"]["mlp_in"]["kernel"].shape for i in range(3)] == [(12, 8), (16, 20), (16, 8)]
    assert params["classifier"]["kernel"].shape == (16, 10)
    maps = jax.eval_shape(functools.partial(attention_maps, model), params, images)
    heads = config.heads
    assert [m.shape[1:] for m in maps] == [(heads, 6, 6, 6, 6), (heads, 3, 3, 3, 3), (heads, 3, 3, 3, 3)]
    assert jax.eval_shape(model.apply, {"params": params}, images).shape == (2, 10)


@pytest.mark.slow
def test_a_grid_halves_by_a_convolution_of_stride_2():
    images, model = Golden("quadratic").images, create_model(small_model("quadratic", layers=2, merge_before=(1,)))
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    _, collected = model.apply({"params": params}, images, capture_intermediates=True)
    before, after = (collected["intermediates"][name]["__call__"][0] for name in ("layer_0", "merge_1"))
    kernel = params["merge_1"]["kernel"].reshape(2, 2, 12, 12)
    strided = jax.lax.conv_general_dilated(before, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    assert_close(after, strided + params["merge_1"]["bias"])


def test_tables_are_shared_by_layers_of_one_size_only():
    sizes = {"hidden_size": (12, 16), "merge_before": (1,)}
    with pytest.raises(UserError, match="layers of several sizes .* share no tables; set it to False"):
        create_model(small_model("learned", share_tables=True, **sizes))
    create_model(small_model("learned", share_tables=True, merge_before=(1,)))


@pytest.mark.slow
def test_an_encoder_layer_is_its_formula_with_any_mixer():
    class Shift(nn.Module):
        """A mixer that looks at the pixel above."""

        @nn.compact
        def __call__(self, x, then: LinearMap, tables=None, *, train=False):
            return then(jnp.roll(x, 1, axis=1))

    layer, x = EncoderLayer(Shift, mlp_size=7, dropout=0.0), jax.random.normal(jax.random.key(0), (2, 3, 4, 6))
    params = jax.jit(layer.init)(jax.random.key(1), x)["params"]

    def dense(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"]

    def norm(x):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)

    y = norm(x + dense("attention_output", np.roll(x, 1, axis=1)))
    hidden = dense("mlp_in", y)
    gelu = hidden * 0.5 * (1 + jax.scipy.special.erf(hidden / 2**0.5))
    assert_close(layer.apply({"params": params}, x), norm(y + dense("mlp_out", gelu)))


@pytest.mark.parametrize("field, value", [("heads", (4, 9, 4)), ("layer", ("attention", "attention", "convolution"))])
def test_a_tuple_that_is_not_one_value_for_each_layer_is_refused(field, value):
    with pytest.raises(UserError, match=rf"model\.{field} is .*layers is 2; give one for each layer, or one for all"):
        create_model(small_model("quadratic", **{field: value}))


def test_only_a_model_with_heads_of_full_covariance_has_a_penalty():
    generalized = {"layer": "attention", "encoding": "quadratic_generalized"}
    assert has_penalty(small_model(**generalized))
    assert has_penalty(small_model(**generalized | {"heads": (0, 4)}))
    assert not has_penalty(small_model(**generalized | {"heads": 0}))
    assert not has_penalty(small_model(**generalized | {"layer": "convolution"}))
    assert not has_penalty(small_model(**generalized | {"layer": ("attention", "convolution"), "heads": (0, 4)}))
    assert not has_penalty(small_model(**generalized | {"encoding": "quadratic"}))
    assert not has_penalty(resnet18.get_config().model)


@pytest.mark.slow
def test_resnet_halves_the_grid_three_times_and_keeps_statistics():
    model, variables = init(resnet18.get_config("digits"))
    logits, new = model.apply(variables, IMAGES, train=False, mutable=["batch_stats"])
    assert logits.shape == (2, 10)
    np.testing.assert_array_equal(new["batch_stats"]["norm1"]["mean"], variables["batch_stats"]["norm1"]["mean"])
    _, new = model.apply(variables, IMAGES, train=True, mutable=["batch_stats"])
    assert np.abs(new["batch_stats"]["norm1"]["mean"]).max() > 0
