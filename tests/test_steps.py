"""A training step makes one update and tells its loss, penalty included; an evaluation counts each image once."""

import functools
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import program
import pytest
from flax import traverse_util

from attn_cnn.training import data, devices, steps
from attn_cnn.training.augment import normalize
from attn_cnn.training.experiment import create_experiment, random_state
from attn_cnn.training.stopping import Interrupt
from configs import quadratic_generalized

WEIGHT = 0.01
HEADS = (2, 5)


class Training:
    """An experiment on the digits, its compiled step, and what that takes."""

    def __init__(self, config):
        self.experiment = create_experiment(config)
        self.step = steps.compile_train_step(self.experiment)
        digits = data.load("digits")
        self.images, self.labels = devices.replicate((digits.train_images, digits.train_labels))
        self.places = devices.shares(config.batch_size, self.experiment.pieces)

    def inputs(self, step):
        return steps.Inputs(self.images, self.labels, devices.replicate(self.experiment.batch(step)))

    def start(self, state=None):
        """The state to start from, in buffers that a step may overwrite."""
        return devices.replicate(jax.device_get(random_state(self.experiment) if state is None else state))


@pytest.fixture(scope="module")
def training():
    return Training(program.tiny_config(log_every_steps=2))


@pytest.mark.slow
def test_a_step_returns_the_state_after_it_and_its_loss(training):
    before = random_state(training.experiment)
    state, loss = training.step(training.start(), training.inputs(0), training.places)
    assert loss.shape == () and loss.dtype == np.float32
    assert int(state.step) == 1 and int(state.first_bad_step) == 0
    assert state.window.means()["loss"] == state.epoch.means()["loss"] == float(loss)
    # The first learning rate of a run with warm-up is 0, so the first step moves the optimizer alone.
    assert jax.tree.structure(state) == jax.tree.structure(before)
    jax.tree.map(np.testing.assert_array_equal, state.params, before.params)
    former = jax.device_get(state)
    state, _ = training.step(state, training.inputs(1), training.places)
    assert all(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (state.params, former.params)), strict=True))


@pytest.mark.slow
def test_the_window_restarts_after_a_report_and_the_epochs_sums_go_on(training):
    state, losses, windows = training.start(), [], []
    for step in range(3):
        state, loss = training.step(state, training.inputs(step), training.places)
        losses.append(float(loss))
        windows.append((int(state.window.steps), state.window.means()["loss"]))
    assert windows == [(1, losses[0]), (2, pytest.approx(np.mean(losses[:2]))), (1, losses[2])]
    assert int(state.epoch.steps) == 3 and state.epoch.means()["loss"] == pytest.approx(np.mean(losses))


@pytest.mark.slow
def test_the_first_step_that_leaves_the_finite_numbers_is_remembered(training):
    state, _ = training.step(training.start(), training.inputs(0), training.places)
    broken = jax.tree.map(lambda p: p * np.nan, state.params)
    state = devices.replicate(state.replace(params=broken))
    for step in (1, 2):
        state, _ = training.step(state, training.inputs(step), training.places)
        assert int(state.first_bad_step) == 2


@pytest.mark.slow
def test_a_step_moves_nothing_between_host_and_device(training):
    inputs = training.inputs(0)  # its indices are all that a step is given by the host
    state, _ = training.step(training.start(), inputs, training.places)
    with jax.transfer_guard("disallow_explicit"):
        state, loss = training.step(state, inputs, training.places)
        jax.block_until_ready(loss)
    assert int(state.step) == 2


@pytest.mark.slow
def test_pieces_of_a_batch_take_the_memory_of_a_piece_and_give_the_same_step():
    config = program.tiny_config(quadratic_generalized)
    config.model.dropout, config.optimizer.warmup = 0.0, 0.0
    memory, states = {}, {}
    for size in (0, 10):
        config.micro_batch_size = size
        training = Training(config)
        arguments = (training.start(), training.inputs(0), training.places)
        memory[size] = training.step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
        states[size], _ = training.step(*arguments)
    assert memory[10] < memory[0] / 3
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), states[10].params, states[0].params
    )


# The penalty on condition numbers


def spreads_of(params):
    """The spreads of each layer."""
    return [np.asarray(params[f"layer_{n}"]["attention"]["spreads"], np.float64) for n in range(len(HEADS))]


def penalty_of(spreads):
    """Mean over all heads of all layers of (condition number of S S^T - 1)^2."""
    S = np.concatenate(spreads)
    return np.mean((np.linalg.cond(S @ S.swapaxes(-1, -2)) - 1) ** 2)


def stretched(path, parameter):
    """The parameter, but spreads far from the identity that they start as."""
    if path[-1].key != "spreads":
        return parameter
    noise = 0.2 * jax.random.normal(jax.random.key(1), parameter.shape)
    return parameter @ jnp.array([[1.5, 0.4], [0.0, 1.0]]) + noise


class Penalised:
    """Loss and gradient of the first batch, with and without the penalty, where nothing is random."""

    def __init__(self):
        self.with_penalty, without = (Training(self.config(penalty)) for penalty in (WEIGHT, 0.0))
        state = random_state(without.experiment)
        self.state = state.replace(params=jax.tree_util.tree_map_with_path(stretched, state.params))
        self.spreads = spreads_of(self.state.params)
        self.model, spec = without.experiment.model, without.experiment.spec
        first = without.experiment.batch(0)
        self.x, self.labels = normalize(without.images[first], spec.mean, spec.std), without.labels[first]
        self.loss, self.gradient = self.loss_and_gradient(self.with_penalty.experiment)
        self.plain_loss, self.plain_gradient = self.loss_and_gradient(without.experiment)

    @staticmethod
    def config(penalty):
        changes = {"model.layers": len(HEADS), "model.heads": HEADS, "model.dropout": 0.0, "data.crop_padding": 0}
        plain = {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0, "schedule": "step", "warmup": 0.0}
        changes |= {f"optimizer.{name}": value for name, value in plain.items()}
        return program.tiny_config(quadratic_generalized, condition_penalty=penalty, **changes)

    def loss_and_gradient(self, experiment):
        key = jax.random.key(0)
        same = {"batch_stats": {}, "x": self.x, "labels": self.labels, "key": key, "experiment": experiment}
        same |= {"counts": jnp.ones(len(self.x), bool), "parts": 1}
        gradient_of = jax.jit(jax.value_and_grad(functools.partial(steps.training_loss, **same), has_aux=True))
        (loss, _), gradient = gradient_of(self.state.params)
        return float(loss), gradient


@pytest.fixture(scope="module")
def penalised():
    return Penalised()


@pytest.mark.slow
def test_the_loss_grows_by_the_weight_times_the_mean_penalty_of_all_heads(penalised):
    penalty = penalty_of(penalised.spreads)
    assert penalty > 1
    assert penalised.loss - penalised.plain_loss == pytest.approx(WEIGHT * penalty, rel=1e-4)


@pytest.mark.slow
def test_without_the_penalty_the_loss_is_the_cross_entropy(penalised):
    apply = jax.jit(functools.partial(penalised.model.apply, train=True, rngs={"dropout": jax.random.key(0)}))
    logits = apply({"params": penalised.state.params}, penalised.x)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, penalised.labels).mean()
    assert penalised.plain_loss == pytest.approx(float(cross_entropy), rel=1e-6)


@pytest.mark.slow
def test_a_step_trains_on_the_penalty(penalised):
    training = penalised.with_penalty
    after, loss = training.step(training.start(penalised.state), training.inputs(0), training.places)
    assert float(loss) == pytest.approx(penalised.loss, rel=1e-6)
    rate = training.experiment.config.optimizer.learning_rate
    for before, now, gradient in zip(
        penalised.spreads, spreads_of(after.params), spreads_of(penalised.gradient), strict=True
    ):
        np.testing.assert_allclose(before - now, rate * gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_the_gradient_of_the_penalty_reaches_the_spreads(penalised):
    for layer, values in enumerate(penalised.spreads):
        expected, change = np.zeros(values.shape), 1e-5
        for index in np.ndindex(values.shape):
            penalties = []
            for sign in (1, -1):
                moved = [s.copy() for s in penalised.spreads]
                moved[layer][index] += sign * change
                penalties.append(penalty_of(moved))
            expected[index] = WEIGHT * (penalties[0] - penalties[1]) / (2 * change)
        gradient = spreads_of(penalised.gradient)[layer] - spreads_of(penalised.plain_gradient)[layer]
        np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_the_gradient_of_the_penalty_reaches_nothing_else(penalised):
    ours, plain = map(traverse_util.flatten_dict, (penalised.gradient, penalised.plain_gradient))
    for path, gradient in ours.items():
        if path[-1] != "spreads":
            np.testing.assert_allclose(gradient, plain[path], rtol=1e-5, atol=1e-7, err_msg="/".join(path))


# Evaluation


@pytest.fixture(scope="module")
def tested():
    """A state, and its logits of the test images in float64."""
    experiment = create_experiment(program.tiny_config())
    state, digits = random_state(experiment), data.load("digits")
    x = normalize(jnp.asarray(digits.test_images), experiment.spec.mean, experiment.spec.std)
    return state, np.asarray(jax.jit(experiment.model.apply)({"params": state.params}, x), np.float64)


@pytest.mark.parametrize("batch", [1, 7, 100, 360, 1000])
def test_evaluation_counts_each_image_once(batch, tested):
    state, logits = tested
    digits = data.load("digits")
    images, labels = digits.test_images, digits.test_labels
    if batch == 1:
        images, labels, logits = images[:20], labels[:20], logits[:20]
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    experiment = create_experiment(program.tiny_config(eval_batch_size=batch))
    evaluate = steps.create_evaluate(experiment, *devices.replicate((images, labels)), Interrupt())
    result = evaluate(devices.replicate(state))
    assert result["accuracy"] == (logits.argmax(-1) == labels).mean()
    assert result["loss"] == pytest.approx(-log_probabilities[np.arange(len(labels)), labels].mean(), rel=1e-5)


def test_an_evaluation_that_a_signal_interrupts_has_no_result(tested):
    state, _ = tested
    digits, interrupt = data.load("digits"), Interrupt()
    experiment = create_experiment(program.tiny_config())
    test_set = devices.replicate((digits.test_images, digits.test_labels))
    evaluate = steps.create_evaluate(experiment, *test_set, interrupt)
    interrupt.signal = signal.SIGTERM
    assert evaluate(devices.replicate(state)) is None
