"""The command line: a mistake ends in one message and a non-zero status, before anything is compiled."""

import subprocess
import sys

import jax
import program
import pytest

from attn_cnn import cli

MISTAKES = {
    "scale": (["--config=configs/quadratic.py:huge"], "unknown scale 'huge'"),
    "file": (
        ["--config=configs/nothing.py"],
        "configs/nothing.py is no config; configs holds convolution.py, gated.py",
    ),
    "field": (["--config=configs/quadratic.py", "--config.foo=1"], "unknown field config.foo"),
    "family": (["--config=configs/resnet18.py", "--config.model.heads=3"], "has no field 'heads'"),
    "type": (["--config=configs/quadratic.py", "--config.seed=abc"], "--config.seed=abc"),
    "value": (["--config=configs/quadratic.py", "--config.model.patch=3"], "choose one of 1, 2, 4"),
    "mode": (["--config=configs/quadratic.py", "--mode=fly"], "train|evaluate|describe"),
    "profile": (
        ["--config=configs/quadratic.py", "--mode=describe", "--profile"],
        "--profile goes with --mode=train, not with --mode=describe",
    ),
    "none": ([], "--config must have a value"),
    "dashes": (["--config=configs/quadratic.py:digits", "config.epochs=1"], "write --config.epochs=1"),
    "space": (
        ["--config=configs/learned.py:digits", "--config.model.share_tables", "False"],
        "write --config.model.share_tables=False",
    ),
    "word": (["--config=configs/quadratic.py:digits", "hello"], "'hello' is not understood"),
    "folder": (["--config=quadratic:digits"], "did you mean --config=configs/quadratic.py:digits?"),
    "typo": (["--config=configs/quadratik.py"], "did you mean --config=configs/quadratic.py?"),
    "abbreviation": (
        ["--config=configs/quadratic.py", "--config.optimizer.lr=1"],
        "did you mean config.optimizer.learning_rate?",
    ),
    "empty workdir": (["--config=configs/quadratic.py:digits", "--workdir="], "the workdir is empty"),
    "no step": (
        ["--config=configs/quadratic.py:digits", "--mode=evaluate", "--workdir=runs", "--step=last"],
        "--step is 'last'; it must be newest, best, or the step of a checkpoint",
    ),
    "step of training": (
        ["--config=configs/quadratic.py:digits", "--step=3"],
        "--step goes with --mode=evaluate or --mode=predict, not with",
    ),
    "images of training": (
        ["--config=configs/quadratic.py:digits", "--images=a.png"],
        "--images goes with --mode=predict, not with --mode=train",
    ),
    "nothing to evaluate": (
        ["--config=configs/quadratic.py:digits", "--mode=evaluate", "--workdir=/nonexistent/run"],
        "holds no run; train one first",
    ),
}
QUICK = ("field", "type", "value")  # each takes a second to start Python


@pytest.mark.parametrize("mistake", [pytest.param(m, marks=() if m in QUICK else pytest.mark.slow) for m in MISTAKES])
def test_a_mistake_ends_in_one_message(mistake):
    arguments, message = MISTAKES[mistake]
    command = [sys.executable, "main.py", *arguments]
    done = subprocess.run(command, cwd=program.ROOT, env=program.environment(), capture_output=True, text=True)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_mistake_inside_a_config_is_told_with_its_place(tmp_path):
    (tmp_path / "mine.py").write_text("import numpy as np\n\n\ndef get_config():\n    return np.foo\n")
    command = [sys.executable, "main.py", f"--config={tmp_path / 'mine.py'}"]
    done = subprocess.run(command, cwd=program.ROOT, env=program.environment(), capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "mine.py, line 5: AttributeError: module 'numpy' has no attribute 'foo'" in done.stderr


def test_a_device_that_is_full_is_told_what_helps(monkeypatch):
    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nStack")

    monkeypatch.setattr(cli.app, "run", full)
    with pytest.raises(SystemExit, match=r"set config\.micro_batch_size to a part of the batch.* allocate 9 bytes\.$"):
        cli.run(print)
    with pytest.raises(SystemExit, match=r"use a device with more, or the CPU .* allocate 9 bytes\.$"):
        cli.run(print, config=False)


@pytest.mark.slow
def test_describe_prints_the_totals():
    done = program.run("--mode=describe", config="configs/learned.py:digits", tiny=False)
    assert "180,874" in done.stdout and "paper's way  5.6M" in done.stdout
    assert done.stderr == ""


@pytest.mark.slow
def test_every_layer_may_have_its_own_heads():
    done = program.run("--mode=describe", "--config.model.heads=(9,4,9)", tiny=False)
    kernels = ["(9, 64, 64)", "(4, 64, 64)", "(9, 64, 64)"]
    for layer, shape in enumerate(kernels):
        (line,) = [line for line in done.stdout.splitlines() if f"layer_{layer}/attention/value/kernel" in line]
        assert shape in line


@pytest.mark.slow
def test_convolutions_may_take_the_place_of_attention():
    done = program.run("--mode=describe", "--config.model.layer=convolution", tiny=False)
    lines = [line for line in done.stdout.splitlines() if "/convolution/kernel" in line]
    assert len(lines) == 3 and all("(3, 3, 64, 64)" in line for line in lines)
    assert "/attention/" not in done.stdout


@pytest.mark.slow
def test_the_offline_message_comes_within_seconds(tmp_path):
    # A proxy that refuses stands in for a machine without network.
    done = program.run(
        f"--workdir={tmp_path}/run",
        config="configs/quadratic.py:small",
        tiny=False,
        check=False,
        timeout=15,
        TFDS_DATA_DIR=str(tmp_path),
        HTTPS_PROXY="http://127.0.0.1:9",
        https_proxy="http://127.0.0.1:9",
    )
    assert done.returncode == 1 and "cifar10 was not found" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
