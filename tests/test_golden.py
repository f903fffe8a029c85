"""The models are the paper's: same numbers from the same parameters, to 1e-5, in float32."""

import functools

import jax
import numpy as np
import optax
import pytest
from flax import traverse_util
from golden import ENCODINGS, Golden, assert_close

from attn_cnn import optim, positions
from attn_cnn.attention import attention_maps
from attn_cnn.model import create_model
from attn_cnn.torch_import import import_state_dict
from configs import quadratic

FORMS = [(e, m) for e in ENCODINGS for m in ("factored", "dense") if m == "dense" or e in positions.SEPARABLE]
both_forms = pytest.mark.parametrize("encoding, mixing", FORMS)


@functools.cache
def load(encoding, mixing):
    golden = Golden(encoding)
    config = golden.model(mixing)
    return golden, config, create_model(config), import_state_dict(golden.state_dict(), config)


def loss_of(params, model, golden, train=False):
    logits = model.apply({"params": params}, golden.images, train=train)
    return optax.softmax_cross_entropy_with_integer_labels(logits, golden.labels).mean()


@both_forms
def test_logits_and_loss(encoding, mixing):
    golden, _, model, params = load(encoding, mixing)
    logits = jax.jit(model.apply)({"params": params}, golden.images)
    assert_close(logits, golden.arrays["logits"])
    loss = jax.jit(functools.partial(loss_of, model=model, golden=golden))(params)
    assert_close(loss, golden.arrays["loss"])


@both_forms
def test_attention_probabilities(encoding, mixing):
    golden, config, model, params = load(encoding, mixing)
    maps = attention_maps(model, params, golden.images)
    assert len(maps) == config.layers
    for layer, ours in enumerate(maps):
        theirs = golden.arrays[f"probs/{layer}"]
        theirs = theirs[None] if theirs.ndim == 5 else theirs
        assert_close(ours, np.moveaxis(theirs, 3, 1), f"layer {layer}")
        np.testing.assert_allclose(ours.sum((-2, -1)), 1, rtol=1e-5)


@both_forms
def test_gradients(encoding, mixing):
    golden, config, model, params = load(encoding, mixing)
    ours = jax.jit(jax.grad(functools.partial(loss_of, model=model, golden=golden)))(params)
    ours = traverse_util.flatten_dict(ours, sep="/")
    theirs = import_state_dict(golden.state_dict("grad/"), config)
    theirs = traverse_util.flatten_dict(theirs, sep="/")
    largest = max(np.abs(gradient).max() for gradient in theirs.values())
    for name in [name for name in ours if name.endswith("key/bias")]:
        # It raises the scores of all keys alike, so softmax gives it no gradient: both are rounding errors.
        assert np.abs(ours.pop(name)).max() < 1e-6 * largest
        assert np.abs(theirs.pop(name)).max() < 1e-6 * largest
    assert_trees_close(ours, theirs)


@both_forms
def test_three_optimizer_steps(encoding, mixing):
    golden, config, model, params = load(encoding, mixing)
    settings = quadratic.get_config().optimizer
    assert settings.learning_rate == golden.settings["learning_rate"]
    assert settings.momentum == golden.settings["momentum"]
    assert settings.weight_decay == golden.settings["weight_decay"]
    optimizer = optim.create_optimizer(settings, settings.learning_rate)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state):
        loss, grads = jax.value_and_grad(functools.partial(loss_of, train=True))(params, model, golden)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    losses = []
    for _ in range(3):
        params, opt_state, loss = step(params, opt_state)
        losses.append(loss)
    assert_close(losses, golden.arrays["losses"], "losses")
    theirs = import_state_dict(golden.state_dict("after_3_steps/"), config)
    flatten = functools.partial(traverse_util.flatten_dict, sep="/")
    assert_trees_close(flatten(params), flatten(theirs))


def assert_trees_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert_close(ours[name], theirs[name], name)
