"""The models are the paper's: same numbers from the same parameters, to 1e-5, in float32."""

import functools

import jax
import numpy as np
import optax
import pytest
from flax import traverse_util
from golden import ENCODINGS, Golden, assert_close, assert_trees_close

from attn_cnn.attention import attention_maps
from attn_cnn.encodings import encoding_class
from attn_cnn.model import create_model
from attn_cnn.torch_import import import_state_dict
from attn_cnn.training.optim import create_optimizer
from configs import quadratic

FORMS = [(e, m) for e in ENCODINGS for m in ("factored", "dense") if m == "dense" or encoding_class(e).separable]
both_forms = pytest.mark.parametrize("encoding, mixing", FORMS)
each_encoding_quickly = pytest.mark.parametrize(
    "encoding, mixing",
    [pytest.param(e, m, marks=pytest.mark.slow if (e, "factored") in FORMS and m == "dense" else ()) for e, m in FORMS],
)


@functools.cache
def load(encoding, mixing):
    golden = Golden(encoding)
    config = golden.model(mixing)
    return golden, config, create_model(config), import_state_dict(golden.state_dict(), config)


def loss_of(params, model, golden, train=False):
    logits = model.apply({"params": params}, golden.images, train=train)
    return optax.softmax_cross_entropy_with_integer_labels(logits, golden.labels).mean()


@each_encoding_quickly
def test_logits_and_loss_are_the_papers(encoding, mixing):
    golden, _, model, params = load(encoding, mixing)

    @jax.jit
    def logits_and_loss(params):
        return model.apply({"params": params}, golden.images), loss_of(params, model, golden)

    logits, loss = logits_and_loss(params)
    assert_close(logits, golden.arrays["logits"])
    assert_close(loss, golden.arrays["loss"])


@pytest.mark.slow
@both_forms
def test_attention_probabilities_are_the_papers(encoding, mixing):
    golden, config, model, params = load(encoding, mixing)
    maps = attention_maps(model, params, golden.images)
    assert len(maps) == config.layers
    for layer, ours in enumerate(maps):
        theirs = golden.arrays[f"probs/{layer}"]
        theirs = theirs[None] if theirs.ndim == 5 else theirs
        assert_close(ours, np.moveaxis(theirs, 3, 1), f"layer {layer}")
        np.testing.assert_allclose(ours.sum((-2, -1)), 1, rtol=1e-5)


@pytest.mark.slow
@both_forms
def test_gradients_are_the_papers(encoding, mixing):
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


@pytest.mark.slow
@both_forms
def test_three_optimizer_steps_end_at_the_papers_parameters(encoding, mixing):
    golden, config, model, params = load(encoding, mixing)
    settings = quadratic.get_config().optimizer
    assert settings.learning_rate == golden.settings["learning_rate"]
    assert settings.momentum == golden.settings["momentum"]
    assert settings.weight_decay == golden.settings["weight_decay"]
    optimizer = create_optimizer(settings, settings.learning_rate, encoding_class(encoding).undecayed)
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
    assert_trees_close(params, theirs)
