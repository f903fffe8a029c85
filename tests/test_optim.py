"""Learning rates and weight decay are the paper's; Muon takes each kernel for the matrix that it is."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from golden import small_model

from attn_cnn import model
from attn_cnn.errors import UserError
from attn_cnn.training import optim
from configs import gated, quadratic, quadratic_generalized, resnet18


def test_cosine_rises_for_a_twentieth_of_the_steps_and_falls_to_zero():
    schedule = optim.create_schedule(quadratic.get_config().optimizer, 500, 300)
    assert schedule(0) == 0
    assert schedule(3750) == pytest.approx(0.05)
    assert schedule(7500) == pytest.approx(0.1)
    middle = 7500 + (150_000 - 7500) // 2
    assert schedule(middle) == pytest.approx(0.05)
    assert schedule(149_999) == pytest.approx(0, abs=1e-9)
    assert schedule(20_000) == pytest.approx(0.05 * (1 + math.cos(math.pi * 12_500 / 142_500)))


def test_steps_divide_by_ten_after_their_epochs():
    schedule = optim.create_schedule(resnet18.get_config().optimizer, 500, 300)
    epochs = [0, 79, 80, 149, 150, 249, 250, 299]
    rates = [float(schedule(epoch * 500)) for epoch in epochs]
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3, 1e-4, 1e-4], rtol=1e-5)


def test_a_decay_beyond_the_run_is_an_error():
    with pytest.raises(UserError, match=r"\(80, 150, 250\), but the run ends after 200"):
        optim.create_schedule(resnet18.get_config().optimizer, 500, 200)


def update(optimizer_config, params, gradients, undecayed=()):
    optimizer = optim.create_optimizer(optimizer_config, 0.5, undecayed)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    return optax.apply_updates(params, updates)


@pytest.mark.parametrize(
    "experiment, spared",
    [
        (quadratic, {"centers", "spreads"}),
        (quadratic_generalized, {"centers", "spreads"}),
        (gated, {"centers", "spreads", "gates"}),
        (resnet18, set()),
    ],
)
def test_weight_decay_is_added_to_the_gradient_of_all_but_a_heads_place_and_gate(experiment, spared):
    config = experiment.get_config()
    config.optimizer.weight_decay = 0.1
    params = {name: jnp.array(2.0) for name in ("centers", "spreads", "gates", "kernel", "bias", "scale")}
    gradients = {name: jnp.array(1.0) for name in params}
    after = update(config.optimizer, {"layer": params}, {"layer": gradients}, model.undecayed(config.model))
    for name, value in after["layer"].items():
        decay = 0.0 if name in spared else 0.1 * 2
        assert value == pytest.approx(2 - 0.5 * (1 + decay)), name


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_momentum_is_of_both_optimizers(name):
    config = quadratic.get_config().optimizer
    config.name, config.momentum, config.weight_decay = name, 0.5, 0.0
    optimizer, params = optim.create_optimizer(config, 0.5), {"kernel": jnp.array(2.0)}
    _, state = optimizer.update({"kernel": jnp.array(1.0)}, optimizer.init(params), params)
    updates, _ = optimizer.update({"kernel": jnp.array(0.0)}, state, params)
    # SGD goes on with half of the gradient; of Adam's moments, 0.25 / (1 - 0.5^2) and 0.999e-3 / (1 - 0.999^2).
    expected = 0.5 * 0.5 if name == "sgd" else 0.5 * (1 / 3) / math.sqrt(0.999e-3 / (1 - 0.999**2))
    assert updates["kernel"] == pytest.approx(-expected, rel=1e-4)


def test_adam_moves_by_the_learning_rate():
    config = quadratic.get_config().optimizer
    config.name = "adam"
    after = update(config, {"kernel": jnp.array(2.0)}, {"kernel": jnp.array(123.0)})
    assert after["kernel"] == pytest.approx(1.5, rel=1e-5)


def test_muon_takes_each_kernel_for_the_matrix_from_all_its_inputs_to_all_its_outputs():
    model_config = small_model("learned_content", layer=("attention", "convolution"))
    axes = traverse_util.flatten_dict(optim.kernel_axes(model.abstract_variables(model_config)["params"]), sep="/")
    of_attention = "layer_0/attention"
    assert axes[f"{of_attention}/value/kernel"] == ((0, 1), (2,))  # heads and their features to features
    assert axes[f"{of_attention}/query/kernel"] == axes[f"{of_attention}/key/kernel"] == ((0,), (1, 2))
    assert axes["layer_1/convolution/convolution/kernel"] == ((0, 1, 2), (3,))
    assert axes["layer_1/mlp_in/kernel"] == axes["classifier/kernel"] == ((0,), (1,))
    others = {name for name, kernel_axes in axes.items() if kernel_axes is None}
    assert (
        others == {name for name in axes if not name.endswith("/kernel")} and f"{of_attention}/row_embeddings" in others
    )


@pytest.mark.parametrize("shape", [(4, 6), (3, 2, 5), (3, 3, 2, 20)])
def test_muon_moves_a_kernel_along_a_matrix_with_orthogonal_rows_or_columns(shape):
    config = quadratic.get_config().optimizer
    config.name, config.weight_decay = "muon", 0.0
    gradient = jax.random.normal(jax.random.key(0), shape)
    moved = update(config, {"layer": {"kernel": jnp.zeros(shape)}}, {"layer": {"kernel": gradient}})["layer"]["kernel"]
    matrix = np.asarray(moved).reshape(-1, shape[-1]) / (
        0.5 * optim.MUON_RMS * max(np.prod(shape[:-1]), shape[-1]) ** 0.5
    )
    singular = np.linalg.svd(matrix, compute_uv=False)
    assert np.all((singular > 0.6) & (singular < 1.3))  # Muon's iteration comes no closer to 1
    assert np.vdot(moved, gradient) < 0


def test_muon_decays_kernels_alone_and_moves_all_else_as_adam_does():
    config = quadratic.get_config().optimizer
    config.name, config.weight_decay = "muon", 0.1
    params = {"layer": {"kernel": jnp.eye(3), "bias": jnp.array(2.0), "centers": jnp.array(2.0)}}
    still = update(config, params, jax.tree.map(jnp.zeros_like, params))["layer"]
    np.testing.assert_allclose(still["kernel"], (1 - 0.5 * 0.1) * np.eye(3), atol=1e-6)
    assert still["bias"] == still["centers"] == 2
    moved = update(config, params, jax.tree.map(jnp.ones_like, params))["layer"]
    assert 1 < moved["bias"] < 2 and moved["centers"] == moved["bias"]
