"""Runs are the same on any number of devices, and the same after any interruption."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import program
import pytest
from etils import epath

from attn_cnn import train
from attn_cnn.errors import UserError
from attn_cnn.heads import history
from attn_cnn.training import experiment as experiment_lib
from attn_cnn.training.checkpoint import Checkpoints
from configs import quadratic

FILES = ["checkpoints", "config.json", "data.json", "heads.npz", "metrics"]


def final_state(config, workdir):
    experiment = experiment_lib.create_experiment(config)
    with Checkpoints(epath.Path(workdir) / "checkpoints") as checkpoints:
        step, state = checkpoints.restore(experiment_lib.abstract_state(experiment))
    assert step == experiment.total_steps
    return state


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
    program.assert_same_bits(final_state(uninterrupted.config, workdir), uninterrupted.state)
    for tag in ("train/loss", "train/accuracy", "test/loss", "test/accuracy", "lr"):
        assert program.scalars(workdir, tag) == program.scalars(uninterrupted.workdir, tag)
    tag = "heads/nonlocality/layer_0_head_8"
    assert (
        program.scalars(workdir, tag) == program.scalars(uninterrupted.workdir, tag)
        and len(program.scalars(workdir, tag)) == 12
    )
    numbers, expected = history.read(workdir), history.read(uninterrupted.workdir)
    assert numbers["step"].tolist() == [14 * epoch for epoch in range(1, 13)]
    program.assert_same_bits(numbers, expected)


@pytest.mark.slow
def test_a_finished_run_says_so_and_does_nothing(uninterrupted):
    workdir = uninterrupted.workdir
    before = program.content(workdir)
    done = program.run(f"--workdir={workdir}", *uninterrupted.flags)
    assert "is finished: 168 steps, test accuracy" in done.stderr and "epoch" not in done.stderr
    assert before == program.content(workdir)


@pytest.mark.slow
def test_another_config_is_refused_with_the_fields_that_differ(uninterrupted):
    config = uninterrupted.config.copy_and_resolve_references()
    config.seed = 1
    with pytest.raises(UserError, match="another config(?s:.*)seed: 0 then, 1 now"):
        train.train(config, uninterrupted.workdir)


@pytest.mark.slow
def test_fields_that_cannot_change_the_results_may_differ_and_the_config_on_disk_follows(uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted.workdir, workdir)
    config = uninterrupted.config.copy_and_resolve_references()
    config.update_from_flattened_dict({"checkpoint.keep": 2, "eval_batch_size": 7, "micro_batch_size": 50})
    program.assert_same_bits(train.train(config, workdir), uninterrupted.state)
    assert json.loads((workdir / "config.json").read_text()) == json.loads(config.to_json())
    assert sorted(path.name for path in workdir.iterdir()) == FILES


@pytest.mark.slow
def test_the_workdir_holds_what_it_should_and_the_log_reads(uninterrupted):
    workdir = uninterrupted.workdir
    assert sorted(path.name for path in workdir.iterdir()) == FILES
    assert json.loads((workdir / "config.json").read_text())["epochs"] == 12
    steps = [step for step, _ in program.scalars(workdir, "test/accuracy")]
    assert steps == [14 * epoch for epoch in range(1, 13)]
    steps = [step for step, _ in program.scalars(workdir, "train/loss")]
    assert steps == sorted([14 * e for e in range(1, 13)] + [14 * e + 10 for e in range(12)])


@pytest.mark.slow
def test_a_normal_run_warns_of_nothing(uninterrupted):
    epochs = [f"epoch {epoch}/12" for epoch in range(1, 13)]
    beginnings = (
        "On 1 CPU device",
        "Starting",
        "Compiled; step 1 is done.",
        *epochs,
        f"{uninterrupted.workdir} is finished",
    )
    lines = [line.split(" ", 1)[1] for line in uninterrupted.output.stderr.splitlines()]
    lines = [line for line in lines if not line.startswith("step ")]  # on a slow machine, every ten seconds
    assert len(lines) == len(beginnings) and all(map(str.startswith, lines, beginnings))
    assert uninterrupted.output.stdout == ""


@pytest.mark.slow
def test_evaluation_is_the_same_on_one_and_on_four_devices(uninterrupted):
    flags = (f"--workdir={uninterrupted.workdir}", *uninterrupted.flags, "--mode=evaluate")
    lines = [program.run(*flags, devices=n).stderr.split(" ", 1)[1] for n in (1, 4)]
    assert "test loss" in lines[0] and lines[0] == lines[1]


def losses(experiment, devices, workdir, *flags):
    """The losses of every step of an epoch, and that of the test set after it."""
    flags += ("--config.epochs=1", "--config.log_every_steps=1")
    if experiment == "quadratic":
        flags += (*program.TINY, "--config.model.dropout=0.0", "--config.model.attention_dropout=0.0")
    else:  # it multiplies rounding errors at every step, at learning rate 0.1 and with Adam by ten
        calm = ("--config.optimizer.name=sgd", "--config.optimizer.learning_rate=0.0001")
        flags += ("--config.model.width=2", "--config.optimizer.decay_epochs=()", *calm)
    program.run(f"--workdir={workdir}", *flags, config=f"configs/{experiment}.py:digits", devices=devices, tiny=False)
    return [value for tag in ("train/loss", "test/loss") for _, value in program.scalars(workdir, tag)]


@pytest.fixture(scope="module")
def of_one_device(tmp_path_factory):
    """A function that returns the losses of an experiment on one device."""
    return functools.cache(lambda experiment: losses(experiment, 1, tmp_path_factory.mktemp(experiment)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "experiment, devices, flags",
    [
        ("quadratic", 3, ()),
        ("quadratic", 8, ()),
        ("quadratic", 3, ("--config.micro_batch_size=30",)),
        ("resnet18", 3, ()),
    ],
)
def test_any_number_of_devices_takes_any_batch_with_the_losses_of_one(
    experiment, devices, flags, of_one_device, tmp_path
):
    """The batch of 100 leaves 3 and 8 devices shares of different sizes, and the test set of 360 images, too."""
    several, one = losses(experiment, devices, tmp_path, *flags), of_one_device(experiment)
    assert len(one) == 15
    np.testing.assert_allclose(several, one, rtol=1e-5)


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


@pytest.mark.slow
def test_it_trains_evaluates_and_writes_metrics_where_tensorflow_is_not_installed(tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        "hidden = ('tensorflow', 'tensorflow_datasets')\n"
        "PathFinder.find_spec = classmethod(\n"
        "    lambda cls, name, *rest: None if name.split('.')[0] in hidden else find(name, *rest)\n"
        ")\n"
    )
    flags = (f"--workdir={tmp_path}/run", "--config.epochs=1")
    done = program.run(*flags, PYTHONPATH=str(hidden))
    assert done.stderr.count("TensorFlow is not installed") == 1
    losses = program.scalars(tmp_path / "run", "train/loss")
    assert [step for step, _ in losses] == [10, 14]
    assert "test loss" in program.run(*flags, "--mode=evaluate", PYTHONPATH=str(hidden)).stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a ümlaut*?", "trailing/"])
def test_a_workdir_may_have_any_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = program.tiny_config(quadratic, epochs=1)
    state = train.train(config, name)
    again = train.train(config, tmp_path / name)
    jax.tree.map(np.testing.assert_array_equal, state.params, again.params)
    assert train.evaluate(config, tmp_path / name)["accuracy"] > 0


@pytest.mark.slow
def test_a_workdir_behind_a_link_or_in_the_home_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = program.tiny_config(quadratic, epochs=1)
    state = train.train(config, "~/run")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    again = train.train(config, tmp_path / "link")
    jax.tree.map(np.testing.assert_array_equal, state.params, again.params)
    assert not (tmp_path / "~").exists()


@pytest.mark.slow
def test_two_runs_in_one_process_one_of_them_in_a_thread_log_once_each(tmp_path, caplog):
    config = program.tiny_config(quadratic, epochs=1)
    with caplog.at_level("INFO", "attn_cnn"):
        train.train(config, tmp_path / "first")
        thread = threading.Thread(target=train.train, args=(config, tmp_path / "second"))
        thread.start()
        thread.join()
    for name in ("first", "second"):
        assert sum(f"{name} is finished" in message for message in caplog.messages) == 1


@pytest.mark.slow
def test_a_home_that_cannot_be_written_is_no_matter(tmp_path):
    done = program.run(f"--workdir={tmp_path}/run", "--config.epochs=1", HOME="/proc/self", XDG_CACHE_HOME="")
    assert "is finished" in done.stderr and "arning" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "use",
    [
        "import tensorflow as tf; tf.ones((64, 64)) @ tf.ones((64, 64))",
        "import torch; torch.ones(64, 64) @ torch.ones(64, 64)",
    ],
    ids=["tensorflow", "torch"],
)
def test_a_notebook_may_have_used_another_framework_before(use, tmp_path):
    pytest.importorskip(use.split(";")[0].split()[1])
    train_it = f"train.train(program.tiny_config(epochs=1), {str(tmp_path / 'run')!r})"
    lines = (use, "import logging; logging.basicConfig()", 'logging.getLogger("attn_cnn").setLevel("INFO")')
    script = "\n".join((*lines, "import program; from attn_cnn import train", train_it))
    path = os.pathsep.join(map(str, (program.ROOT, program.ROOT / "tests")))
    environment = program.environment(PYTHONPATH=path)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.count("is finished") == 1
    assert [step for step, _ in program.scalars(tmp_path / "run", "train/loss")] == [10, 14]
