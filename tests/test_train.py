"""Runs are the same on any number of devices, and the same after any interruption."""

import json
import random
import signal
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import program
import pytest
from etils import epath

from attn_cnn import train
from attn_cnn.errors import UserError
from attn_cnn.training import experiment as experiment_lib
from attn_cnn.training.checkpoint import Checkpoints


def final_state(config, workdir):
    experiment = experiment_lib.create_experiment(config)
    with Checkpoints(epath.Path(workdir) / "checkpoints") as checkpoints:
        step, state = checkpoints.restore(experiment_lib.abstract_state(experiment))
    assert step == experiment.total_steps
    return state


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


class Finished(NamedTuple):
    config: Any
    state: Any
    workdir: Any
    flags: tuple[str, ...]
    output: Any  # of the process


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of 12 epochs that nothing disturbs."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    flags = ("--config.epochs=12", "--config.checkpoint.every_epochs=1")
    output = program.run(f"--workdir={workdir}", *flags, PYTHONWARNINGS="default::UserWarning")
    config = program.tiny_config(**{"epochs": 12, "checkpoint.every_epochs": 1})
    return Finished(config, final_state(config, workdir), workdir, flags, output)


@pytest.mark.slow
def test_killed_at_a_random_step_it_ends_with_the_same_bits(uninterrupted, tmp_path):
    workdir, flags = tmp_path / "run", uninterrupted.flags
    for epoch in (2, 5, 8):
        process = program.start(f"--workdir={workdir}", *flags)
        program.wait_for(process, f"epoch {epoch}/12")
        time.sleep(random.uniform(0, 0.2))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    done = program.run(f"--workdir={workdir}", *flags)
    assert "Resuming" in done.stderr
    assert_same_bits(final_state(uninterrupted.config, workdir), uninterrupted.state)
    for tag in ("train/loss", "train/accuracy", "test/loss", "test/accuracy", "lr"):
        assert program.scalars(workdir, tag) == program.scalars(uninterrupted.workdir, tag)


@pytest.mark.slow
def test_a_finished_run_says_so_and_does_nothing(uninterrupted):
    workdir = uninterrupted.workdir
    before = program.content(workdir)
    done = program.run(f"--workdir={workdir}", *uninterrupted.flags)
    assert "is finished: 168 steps, test accuracy" in done.stderr and "epoch" not in done.stderr
    assert before == program.content(workdir)


@pytest.mark.slow
def test_another_config_is_refused_with_the_fields_that_differ(uninterrupted):
    flags = (*uninterrupted.flags, "--config.seed=1")
    done = program.run(f"--workdir={uninterrupted.workdir}", *flags, check=False)
    assert done.returncode == 1
    assert "another config" in done.stderr and "seed: 0 then, 1 now" in done.stderr


@pytest.mark.slow
def test_the_workdir_holds_what_it_should_and_the_log_reads(uninterrupted):
    workdir = uninterrupted.workdir
    assert sorted(path.name for path in workdir.iterdir()) == ["checkpoints", "config.json", "metrics"]
    assert json.loads((workdir / "config.json").read_text())["epochs"] == 12
    steps = [step for step, _ in program.scalars(workdir, "test/accuracy")]
    assert steps == [14 * epoch for epoch in range(1, 13)]
    steps = [step for step, _ in program.scalars(workdir, "train/loss")]
    assert steps == sorted([14 * e for e in range(1, 13)] + [14 * e + 10 for e in range(12)])


@pytest.mark.slow
def test_a_normal_run_warns_of_nothing(uninterrupted):
    epochs = [f"epoch {epoch}/12" for epoch in range(1, 13)]
    beginnings = ("Starting", "Compiled; step 1 is done.", *epochs, f"{uninterrupted.workdir} is finished")
    lines = [line.split(" ", 1)[1] for line in uninterrupted.output.stderr.splitlines()]
    lines = [line for line in lines if not line.startswith("step ")]  # on a slow machine, every ten seconds
    assert len(lines) == len(beginnings) and all(map(str.startswith, lines, beginnings))
    assert uninterrupted.output.stdout == ""


@pytest.mark.slow
def test_evaluation_is_the_same_on_one_and_on_four_devices(uninterrupted):
    flags = (f"--workdir={uninterrupted.workdir}", *uninterrupted.flags, "--mode=evaluate")
    lines = [program.run(*flags, devices=n).stderr.split(" ", 1)[1] for n in (1, 4)]
    assert "test loss" in lines[0] and lines[0] == lines[1]


@pytest.mark.slow
def test_losses_of_a_resnet_are_the_same_on_one_and_on_four_devices(tmp_path):
    # It multiplies rounding errors at every step, at learning rate 0.1 and with Adam by ten.
    calm = ("--config.optimizer.name=sgd", "--config.optimizer.learning_rate=0.0001")
    size = ("--config.model.width=4", "--config.epochs=1", "--config.optimizer.decay_epochs=()")
    losses = {}
    for count in (1, 4):
        flags = (f"--workdir={tmp_path / str(count)}", "--config.log_every_steps=1", *size, *calm)
        program.run(*flags, config="configs/resnet18.py:digits", devices=count, tiny=False)
        losses[count] = np.array(program.scalars(tmp_path / str(count), "train/loss"))
    assert len(losses[1]) == 14
    np.testing.assert_allclose(losses[1][:5], losses[4][:5], rtol=1e-5)


@pytest.mark.slow
def test_a_batch_that_the_devices_cannot_share_is_an_error(tmp_path):
    done = program.run(f"--workdir={tmp_path}/run", "--config.batch_size=101", devices=4, check=False)
    assert done.returncode == 1 and "batch_size is 101" in done.stderr and "100 or 104" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_bfloat16_trains_and_keeps_float32_parameters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = program.tiny_config(dtype="bfloat16", epochs=1)
    state = train.train(config, "runs/relative")
    assert experiment_lib.create_experiment(config).model.dtype == jax.numpy.bfloat16
    assert all(p.dtype == np.float32 for p in jax.tree.leaves(state.params))
    assert (tmp_path / "runs" / "relative" / "checkpoints" / "14").is_dir()


def test_attention_dropout_makes_the_dense_form_needed():
    config = program.tiny_config(**{"model.mixing": "factored", "model.attention_dropout": 0.1})
    with pytest.raises(UserError, match="factored"):
        experiment_lib.create_experiment(config)
