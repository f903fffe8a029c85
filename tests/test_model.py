"""The classifier: its patches, its parameters, its initialisation, its dtypes."""

import importlib

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from golden import Golden
from test_config import EXPERIMENTS

from attn_cnn import positions
from attn_cnn.errors import UserError
from attn_cnn.model import create_model, patches
from configs import learned, quadratic, quadratic_generalized, resnet18

IMAGES = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))


def init(config, **kwargs):
    model = create_model(config.model, **kwargs)
    return model, jax.jit(model.init)(jax.random.key(0), IMAGES)


def flat(params):
    return traverse_util.flatten_dict(params, sep="/")


def test_patches_are_ordered_by_row_column_channel():
    images = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    grid = patches(images, 2)
    assert grid.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(grid[1, 1, 2], images[1, 2:4, 4:6].reshape(-1))


def test_linear_layers_start_uniform_in_the_inverse_root_of_fan_in():
    _, variables = init(quadratic.get_config("digits"))
    params = flat(variables["params"])
    for name, fan_in in {"value": 9 * 64}.items():
        for leaf in ("kernel", "bias"):
            values = params[f"layer_0/attention/{name}/{leaf}"]
            assert np.abs(values).max() <= fan_in**-0.5
            assert np.abs(values).max() > 0.9 * fan_in**-0.5
    assert np.abs(params["layer_0/mlp_out/kernel"]).max() <= 128**-0.5
    assert np.std(params["layer_0/mlp_out/kernel"]) == pytest.approx(128**-0.5 / 3**0.5, rel=0.05)


def test_positions_start_as_the_paper_says():
    config = quadratic.get_config("digits")
    config.model.heads = 1000
    config.model.hidden_size = 2
    _, variables = init(config)
    attention = variables["params"]["layer_0"]["attention"]
    assert np.std(attention["centers"]) == pytest.approx(2, rel=0.1)
    assert np.mean(attention["spreads"]) == pytest.approx(1, abs=0.002)
    assert np.std(attention["spreads"]) == pytest.approx(0.01, rel=0.1)
    config = quadratic_generalized.get_config("digits")
    config.model.heads = 1000
    config.model.hidden_size = 2
    spreads = init(config)[1]["params"]["layer_0"]["attention"]["spreads"]
    np.testing.assert_allclose(spreads.mean(0), np.eye(2), atol=0.002)
    assert np.std(spreads - np.eye(2)) == pytest.approx(0.01, rel=0.1)


def test_embeddings_start_as_unit_normals():
    table = init(learned.get_config("digits"))[1]["params"]["layer_0"]["attention"]["row_embeddings"]
    assert table.shape == (7, 64)
    assert np.std(table) == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize("encoding", positions.LEARNED)
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


def test_tables_of_another_width():
    config = learned.get_config("digits")
    config.model.embedding_size = 20
    params = flat(init(config)[1]["params"])
    assert params["layer_1/attention/row_embeddings"].shape == (7, 20)
    assert params["layer_1/attention/row_head_keys/kernel"].shape == (20, 9)
    config.model.encoding = "learned_query"
    with pytest.raises(UserError, match="embedding_size is 20.*must be 32"):
        create_model(config.model)


@pytest.mark.parametrize("encoding", positions.ENCODINGS)
def test_bfloat16_computes_close_to_float32_from_float32_parameters(encoding):
    golden = Golden(encoding)
    reference = create_model(golden.model())
    model = create_model(golden.model(), dtype="bfloat16")
    params = model.init(jax.random.key(0), golden.images)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))
    logits = jax.jit(model.apply)(params, golden.images)
    expected = jax.jit(reference.apply)(params, golden.images)
    assert logits.dtype == jnp.float32
    assert 0 < np.abs(logits - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_in_bfloat16_the_loss_of_every_config_is_within_a_thousandth_and_its_gradients_within_3_percent(experiment):
    config = importlib.import_module(f"configs.{experiment}").get_config("digits")
    images = jax.random.normal(jax.random.key(0), (8, *config.model.image_shape))
    variables = create_model(config.model).init(jax.random.key(1), images)

    def loss_and_gradients(dtype):
        model = create_model(config.model, dtype)

        def loss(params):
            logits = model.apply(variables | {"params": params}, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(8)).mean()

        value, gradients = jax.jit(jax.value_and_grad(loss))(variables["params"])
        return value, jax.flatten_util.ravel_pytree(gradients)[0]

    (loss, gradients), (expected, expected_gradients) = map(loss_and_gradients, ("bfloat16", "float32"))
    assert abs(loss - expected) < 1e-3 * expected
    assert jnp.linalg.norm(gradients - expected_gradients) < 0.03 * jnp.linalg.norm(expected_gradients)


def test_resnet_halves_the_grid_three_times_and_keeps_statistics():
    model, variables = init(resnet18.get_config("digits"))
    logits, new = model.apply(variables, IMAGES, train=False, mutable=["batch_stats"])
    assert logits.shape == (2, 10)
    np.testing.assert_array_equal(new["batch_stats"]["norm1"]["mean"], variables["batch_stats"]["norm1"]["mean"])
    _, new = model.apply(variables, IMAGES, train=True, mutable=["batch_stats"])
    assert np.abs(new["batch_stats"]["norm1"]["mean"]).max() > 0
