"""Runs: the same on any number of devices, the same after any interruption, and each image counted once."""

import functools
import json
import random
import signal
import time

import jax
import numpy as np
import program
import pytest
from etils import epath

from attn_cnn import data, devices, train
from attn_cnn.augment import normalize
from attn_cnn.checkpoint import Checkpoints
from attn_cnn.errors import UserError
from attn_cnn.interrupt import Interrupt
from configs import quadratic, resnet18

NO_DROPOUT = ("--config.model.dropout=0.0", "--config.model.attention_dropout=0.0")


def tiny(experiment=quadratic, **changes):
    config = experiment.get_config("digits")
    if config.model.name == "attention":
        config.model.layers, config.model.hidden_size, config.model.mlp_size = 1, 16, 16
    else:
        config.model.width = 2
    config.update_from_flattened_dict(changes)
    return config


def final_state(config, workdir):
    run = train.create_run(config)
    with Checkpoints(epath.Path(workdir) / "checkpoints") as checkpoints:
        step, state = checkpoints.restore(train.abstract_state(run))
    assert step == run.total_steps
    return state


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of 12 epochs that nothing disturbs: its config, final state and workdir."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    flags = ("--config.epochs=12", "--config.checkpoint.every_epochs=1")
    program.run(f"--workdir={workdir}", *flags)
    config = tiny(epochs=12)
    config.checkpoint.every_epochs = 1
    return config, final_state(config, workdir), workdir, flags


def test_killed_at_a_random_step_it_ends_with_the_same_bits(uninterrupted, tmp_path):
    config, expected, reference, flags = uninterrupted
    workdir = tmp_path / "run"
    for epoch in (2, 5, 8):
        process = program.start(f"--workdir={workdir}", *flags)
        program.wait_for(process, f"epoch {epoch}/12")
        time.sleep(random.uniform(0, 0.2))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    done = program.run(f"--workdir={workdir}", *flags)
    assert "Resuming" in done.stderr
    assert_same_bits(final_state(config, workdir), expected)
    for tag in ("train/loss", "train/accuracy", "test/loss", "test/accuracy", "lr"):
        assert program.scalars(workdir, tag) == program.scalars(reference, tag)


def test_a_finished_run_says_so_and_does_nothing(uninterrupted):
    _, _, workdir, flags = uninterrupted
    before = sorted((p, p.stat().st_mtime_ns) for p in workdir.rglob("*"))
    done = program.run(f"--workdir={workdir}", *flags)
    assert "is finished: 168 steps, test accuracy" in done.stderr and "epoch" not in done.stderr
    assert before == sorted((p, p.stat().st_mtime_ns) for p in workdir.rglob("*"))


def test_another_config_is_refused_with_the_fields_that_differ(uninterrupted):
    _, _, workdir, flags = uninterrupted
    done = program.run(f"--workdir={workdir}", *flags, "--config.seed=1", check=False)
    assert done.returncode == 1
    assert "another config" in done.stderr and "seed: 0 then, 1 now" in done.stderr


def test_the_workdir_holds_what_it_should_and_the_log_reads(uninterrupted):
    _, _, workdir, _ = uninterrupted
    assert sorted(path.name for path in workdir.iterdir()) == ["checkpoints", "config.json", "metrics"]
    assert json.loads((workdir / "config.json").read_text())["epochs"] == 12
    steps = [step for step, _ in program.scalars(workdir, "test/accuracy")]
    assert steps == [14 * epoch for epoch in range(1, 13)]
    steps = [step for step, _ in program.scalars(workdir, "train/loss")]
    assert steps == sorted([14 * e for e in range(1, 13)] + [14 * e + 10 for e in range(12)])


def test_a_normal_run_warns_of_nothing(tmp_path):
    done = program.run(f"--workdir={tmp_path}/run", "--config.epochs=2", PYTHONWARNINGS="default::UserWarning")
    beginnings = ("Starting", "Compiled; step 1 is done.", "epoch 1/2", "epoch 2/2", f"{tmp_path}/run is finished")
    lines = [line.split(" ", 1)[1] for line in done.stderr.splitlines()]
    lines = [line for line in lines if not line.startswith("step ")]  # on a slow machine, every ten seconds
    assert len(lines) == len(beginnings) and all(map(str.startswith, lines, beginnings))
    assert done.stdout == ""


@pytest.mark.parametrize("experiment", [quadratic, resnet18])
def test_losses_are_the_same_on_one_and_on_four_devices(experiment, tmp_path):
    name = experiment.__name__.replace(".", "/") + ".py:digits"
    # The ResNet multiplies rounding errors at every step, at learning rate 0.1 and with Adam by ten.
    calm = ("--config.optimizer.name=sgd", "--config.optimizer.learning_rate=0.0001")
    flags = NO_DROPOUT if experiment is quadratic else ("--config.optimizer.decay_epochs=(1,)", *calm)
    losses = {}
    for count in (1, 4):
        workdir = tmp_path / str(count)
        program.run(
            f"--workdir={workdir}", "--config.epochs=2", "--config.log_every_steps=1", *flags,
            config=name, devices=count, tiny=experiment is quadratic,
        )  # fmt: skip
        losses[count] = np.array(program.scalars(workdir, "train/loss"))
    assert len(losses[1]) == 28
    steps = 20 if experiment is quadratic else 5
    np.testing.assert_allclose(losses[1][:steps], losses[4][:steps], rtol=1e-5)


def test_a_batch_that_the_devices_cannot_share_is_an_error(tmp_path):
    done = program.run(f"--workdir={tmp_path}/run", "--config.batch_size=101", devices=4, check=False)
    assert done.returncode == 1 and "batch_size is 101" in done.stderr and "100 or 104" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize("batch", [1, 7, 100, 360, 1000])
def test_evaluation_counts_each_image_once(batch):
    config = tiny(eval_batch_size=batch)
    run = train.create_run(config)
    state, digits = train.create_state(run), data.load("digits")
    images, labels = digits.test_images, digits.test_labels
    if batch == 1:
        images, labels = images[:20], labels[:20]
    x = normalize(jax.numpy.asarray(images), run.spec.mean, run.spec.std)
    logits = np.asarray(run.model.apply({"params": state.params}, x), np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    on_device = devices.replicate((images, labels))
    result = train.create_evaluate(run, *on_device, Interrupt())(devices.replicate(state))
    assert result["accuracy"] == (logits.argmax(-1) == labels).mean()
    assert result["loss"] == pytest.approx(-log_probabilities[np.arange(len(labels)), labels].mean(), rel=1e-5)


def test_a_step_moves_nothing_between_host_and_device():
    config = tiny()
    run, digits = train.create_run(config), data.load("digits")
    step = devices.mapped(functools.partial(train.train_step, run=run), arguments=5, donate=(0,))
    images, labels = devices.replicate((digits.train_images, digits.train_labels))
    indices = devices.replicate(train.EpochOrder(run).batch(0))  # all that a step is given by the host
    share = devices.share(config.batch_size)
    state, _ = step(devices.replicate(train.create_state(run)), images, labels, indices, share)
    with jax.transfer_guard("disallow_explicit"):
        state, votes = step(state, images, labels, indices, share)
        jax.block_until_ready(votes)
    assert int(state.step) == 2


def test_evaluation_is_the_same_on_one_and_on_four_devices(uninterrupted):
    _, _, workdir, flags = uninterrupted
    lines = [
        program.run(f"--workdir={workdir}", *flags, "--mode=evaluate", devices=n).stderr.split(" ", 1)[1]
        for n in (1, 4)
    ]
    assert "test loss" in lines[0] and lines[0] == lines[1]


def test_bfloat16_trains_and_keeps_float32_parameters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny(dtype="bfloat16", epochs=1)
    state = train.train(config, "runs/relative")
    assert train.create_run(config).model.dtype == jax.numpy.bfloat16
    assert all(p.dtype == np.float32 for p in jax.tree.leaves(state.params))
    assert (tmp_path / "runs" / "relative" / "checkpoints" / "14").is_dir()


def test_attention_dropout_makes_the_dense_form_needed():
    with pytest.raises(UserError, match="factored"):
        train.create_run(tiny(**{"model.mixing": "factored", "model.attention_dropout": 0.1}))
