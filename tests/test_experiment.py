"""A config alone says what happens in a run and from which parameters, and a workdir alone opens it again."""

import itertools
import shutil
from pathlib import Path

import jax
import numpy as np
import optax
import program
import pytest
from etils import epath
from flax import traverse_util

import attn_cnn
from attn_cnn import predict, report, train
from attn_cnn.errors import UserError
from attn_cnn.training import data, runs, start
from attn_cnn.training import workdir as workdir_lib
from attn_cnn.training.checkpoint import Checkpoints
from attn_cnn.training.experiment import Next, create_experiment, random_state, what_happens
from attn_cnn.training.runs import load_config, load_run

# What happens in a run


@pytest.fixture(scope="module")
def digits():
    return create_experiment(program.tiny_config())


def small(digits, of_epoch, epochs, log_every_steps, every_epochs):
    """An experiment of few steps."""
    changes = {"epochs": epochs, "log_every_steps": log_every_steps, "checkpoint.every_epochs": every_epochs}
    config = program.tiny_config(**changes)
    return digits._replace(config=config, steps_per_epoch=of_epoch, total_steps=of_epoch * epochs)


def test_a_run_of_three_epochs_written_out(digits):
    run = small(digits, of_epoch=3, epochs=3, log_every_steps=2, every_epochs=2)
    assert [(what.value, step) for what, step in what_happens(run, 0, evaluated=True)] == [
        ("train", 1),
        ("train", 2),
        ("report", 2),
        ("train", 3),
        ("report", 3),
        ("evaluate", 3),
        ("train", 4),
        ("train", 5),
        ("report", 5),
        ("train", 6),
        ("report", 6),
        ("evaluate", 6),
        ("save", 6),
        ("train", 7),
        ("train", 8),
        ("report", 8),
        ("train", 9),
        ("report", 9),
        ("evaluate", 9),
        ("save", 9),
    ]


SMALL_RUNS = list(itertools.product((1, 2, 5), (1, 3), (1, 2, 4), (1, 2, 5)))


@pytest.mark.parametrize("of_epoch, epochs, log_every_steps, every_epochs", SMALL_RUNS)
def test_every_run_trains_each_step_once_and_ends_evaluated_and_saved(
    digits, of_epoch, epochs, log_every_steps, every_epochs
):
    events = list(what_happens(small(digits, of_epoch, epochs, log_every_steps, every_epochs), 0, evaluated=True))

    def steps_of(what):
        return [step for event, step in events if event is what]

    last = of_epoch * epochs
    assert steps_of(Next.TRAIN) == list(range(1, last + 1))
    assert events[-2:] == [(Next.EVALUATE, last), (Next.SAVE, last)]
    assert steps_of(Next.EVALUATE) == [epoch * of_epoch for epoch in range(1, epochs + 1)]
    saved = [epoch for epoch in range(1, epochs + 1) if epoch % every_epochs == 0 or epoch == epochs]
    assert steps_of(Next.SAVE) == [epoch * of_epoch for epoch in saved]
    within = [batch for batch in range(1, of_epoch + 1) if batch % log_every_steps == 0 or batch == of_epoch]
    assert steps_of(Next.REPORT) == [epoch * of_epoch + batch for epoch in range(epochs) for batch in within]
    order = list(Next)
    assert events == sorted(events, key=lambda event: (event[1], order.index(event[0])))


@pytest.mark.parametrize("of_epoch, epochs, log_every_steps, every_epochs", SMALL_RUNS)
def test_a_resumed_run_does_what_was_left_to_do(digits, of_epoch, epochs, log_every_steps, every_epochs):
    run = small(digits, of_epoch, epochs, log_every_steps, every_epochs)
    whole = list(what_happens(run, 0, evaluated=True))
    for done, evaluated in itertools.product(range(1, run.total_steps + 1), (False, True)):
        at_its_end = () if evaluated else (Next.EVALUATE, Next.SAVE)
        left = [(what, step) for what, step in whole if step > done or (step == done and what in at_its_end)]
        assert list(what_happens(run, done, evaluated)) == left


# A run, opened


@pytest.fixture(params=["quadratic_heads_by_layer", "resnet18"])
def workdir(request, tmp_path):
    return epath.Path(shutil.copytree(program.WORKDIRS / request.param, tmp_path / "run"))


def test_load_run_is_at_hand_in_the_package():
    assert attn_cnn.load_run is load_run


def test_a_loaded_run_is_what_its_workdir_says(workdir, caplog):
    before = program.content(Path(workdir))
    run = load_run(workdir)
    assert not caplog.records  # a notebook shows what libraries warn of
    assert run._fields == ("model", "params", "batch_stats", "config", "mean", "std", "step", "spec")
    assert run.config.to_dict() == load_config(workdir).to_dict()
    assert (run.mean, run.std) == (data.SPECS["digits"].mean, data.SPECS["digits"].std)
    assert run.step == program.newest_checkpoint(workdir)
    assert bool(run.batch_stats) == (run.config.model.name == "resnet18")
    _, state = runs.restore(create_experiment(run.config), workdir)
    program.assert_same_bits((run.params, run.batch_stats), (state.params, state.batch_stats))
    assert program.content(Path(workdir)) == before


@pytest.fixture(scope="module")
def three_checkpoints(digits, tmp_path_factory):
    """A workdir of steps 14, 28 and 42, of which 28 is the best; and their states."""
    workdir = epath.Path(tmp_path_factory.mktemp("checkpoints")) / "run"
    state = random_state(digits)
    states = {
        step: state.replace(step=np.int32(step), params=jax.tree.map(lambda p, step=step: p + step, state.params))
        for step in (14, 28, 42)
    }
    workdir_lib.create(workdir, digits.config, digits.spec, states[14], {"test_accuracy": 0.2})
    with Checkpoints(workdir / workdir_lib.CHECKPOINTS, keep=3) as checkpoints:
        checkpoints.save(28, states[28], {"test_accuracy": 0.9})
        checkpoints.save(42, states[42], {"test_accuracy": 0.5})
    return workdir, states


@pytest.mark.parametrize("asked, found", [("newest", 42), ("best", 28), (14, 14)])
def test_a_run_is_loaded_at_its_newest_its_best_or_a_given_step(three_checkpoints, asked, found):
    workdir, states = three_checkpoints
    run = load_run(workdir, step=asked)
    assert run.step == found
    program.assert_same_bits(run.params, states[found].params)


@pytest.mark.slow
@pytest.mark.parametrize("asked, found", [("newest", 42), ("best", 28), (14, 14)])
def test_a_run_is_evaluated_at_its_newest_its_best_or_a_given_step(three_checkpoints, asked, found):
    workdir, _ = three_checkpoints
    run = load_run(workdir, step=found)
    test = data.load("digits")
    scores = predict.logits(run, test.test_images)
    loss = optax.softmax_cross_entropy_with_integer_labels(scores, test.test_labels).mean()
    evaluated = train.evaluate(run.config, workdir, asked)
    assert evaluated["loss"] == pytest.approx(float(loss), rel=1e-4)
    assert evaluated["accuracy"] == np.mean(scores.argmax(-1) == test.test_labels)


def test_a_step_without_checkpoint_is_answered_with_those_that_there_are(three_checkpoints):
    with pytest.raises(UserError, match="no checkpoint of step 15; it has 42, 28, 14"):
        load_run(three_checkpoints[0], step=15)


def test_a_workdir_without_run_says_so(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/empty holds no run"):
        load_run(tmp_path / "empty")


def test_a_run_that_has_no_checkpoint_yet_says_so(tmp_path):
    workdir_lib.write_config(program.tiny_config(), epath.Path(tmp_path) / workdir_lib.CONFIG)
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        load_run(tmp_path)


# A run that starts from another


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The workdir of a run that has come to step 28."""
    return shutil.copytree(program.WORKDIRS / "quadratic", tmp_path_factory.mktemp("other") / "run")


def start_from(other, **changes):
    config = program.tiny_config(init_from=str(other), seed=5, **changes)
    return start.first_state(create_experiment(config)).state


def test_it_starts_with_the_other_runs_parameters_and_all_else_fresh(other):
    state, fresh = start_from(other), random_state(create_experiment(program.tiny_config(seed=5)))
    assert load_run(other).step == 28
    program.assert_same_bits(state.params, load_run(other).params)
    program.assert_same_bits(state.replace(params=fresh.params), fresh)  # step 0, moments, schedule, sums


@pytest.mark.slow
def test_a_resnet_starts_with_the_other_runs_statistics_too(tmp_path):
    workdir = shutil.copytree(program.WORKDIRS / "resnet18", tmp_path / "run")
    config, run = load_config(epath.Path(workdir)), load_run(workdir)
    config.init_from, config.seed = str(workdir), 5
    state = start.first_state(create_experiment(config)).state
    assert int(state.step) == 0
    program.assert_same_bits((state.params, state.batch_stats), (run.params, run.batch_stats))


def test_what_init_except_names_starts_afresh_and_nothing_else(other):
    state = start_from(other, init_except=("classifier",))
    theirs, fresh = load_run(other).params, random_state(create_experiment(program.tiny_config(seed=5))).params
    assert np.any(np.asarray(theirs["classifier"]["kernel"]) != np.asarray(fresh["classifier"]["kernel"]))
    program.assert_same_bits(state.params, theirs | {"classifier": fresh["classifier"]})


def test_a_part_of_a_layer_starts_afresh_too(other):
    state = start_from(other, init_except=("layer_0/attention/spreads",))
    theirs = traverse_util.flatten_dict(load_run(other).params, sep="/")
    for name, value in traverse_util.flatten_dict(state.params, sep="/").items():
        assert np.array_equal(value, theirs[name]) == (name != "layer_0/attention/spreads"), name


@pytest.mark.slow
def test_parameters_that_do_not_fit_are_named_unless_they_start_afresh(other):
    larger = {"model.hidden_size": 24, "model.layers": 2}
    with pytest.raises(UserError) as mismatch:
        start_from(other, **larger)
    message = str(mismatch.value)
    assert str(other) in message and "config.init_except" in message
    assert "classifier/kernel has shape (16, 10) there, (24, 10) here" in message
    assert "layer_1/attention/centers is missing there" in message
    assert "layer_0/mlp_in/bias" not in message and "layer_0/attention/spreads" not in message  # these fit
    everything = ("patch_embedding", "layer_0", "layer_1", "classifier")
    assert start_from(other, **larger, init_except=everything).params["classifier"]["kernel"].shape == (24, 10)


def test_parameters_that_only_the_other_run_has_are_named(tmp_path):
    other = shutil.copytree(program.WORKDIRS / "quadratic_heads_by_layer", tmp_path / "other")
    with pytest.raises(UserError, match="layer_2/attention/centers is left over there"):
        start_from(other)


def test_an_unknown_name_in_init_except_is_named(other):
    with pytest.raises(UserError, match="init_except names clasifier, which is no parameter"):
        start_from(other, init_except=("clasifier",))


def test_another_run_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/nowhere holds no run"):
        start_from(tmp_path / "nowhere")


@pytest.mark.slow
def test_once_started_and_killed_before_its_first_epoch_it_needs_the_other_run_no_more(tmp_path, caplog):
    other = shutil.copytree(program.WORKDIRS / "quadratic", tmp_path / "other")
    theirs, workdir = load_run(other).params, tmp_path / "run"
    flags = ("--config.epochs=20", "--config.checkpoint.every_epochs=20", f"--config.init_from={other}")
    process = program.start(f"--workdir={workdir}", *flags)
    program.wait_for(process, "Compiled")
    process.kill()
    process.wait()
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["0"]
    shutil.rmtree(other)
    program.assert_same_bits(load_run(workdir).params, theirs)
    caplog.set_level("INFO", "attn_cnn")
    config = program.tiny_config(**{"epochs": 20, "checkpoint.every_epochs": 20, "init_from": str(other)})
    assert int(train.train(config, workdir).step) == 280
    assert f"Starting {workdir}: 280 steps" in caplog.text
    assert [step for step, _ in program.scalars(workdir, "test/loss")] == [14 * epoch for epoch in range(1, 21)]


# A number of heads for each layer


@pytest.mark.slow
def test_layers_with_heads_of_their_own_number_train_resume_evaluate_and_are_described(tmp_path):
    changes = {"model.layers": 3, "model.heads": (4, 0, 9), "epochs": 2, "checkpoint.every_epochs": 1}
    config, workdir = program.tiny_config(**changes), tmp_path / "run"
    state = train.train(config, workdir)
    shutil.rmtree(workdir / "checkpoints" / "28")
    program.assert_same_bits(train.train(config, workdir), state)
    run = load_run(workdir)
    assert run.config.model.heads == (4, 0, 9) and run.step == 28
    attention = [run.params[f"layer_{n}"]["attention"] for n in range(3)]
    assert [layer["spreads"].shape for layer in attention if "spreads" in layer] == [(4,), (9,)]
    assert list(attention[1]) == ["value"] and list(attention[1]["value"]) == ["bias"]
    test_loss = train.evaluate(config, workdir)["loss"]
    assert test_loss == pytest.approx(program.scalars(workdir, "test/loss")[-1][1], rel=1e-6)
    description = report.describe(config.model)
    assert "layer_2/attention/centers" in description and "layer_1/attention/centers" not in description
