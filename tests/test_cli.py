"""The command line: a mistake ends in one message and a non-zero status, before anything is compiled."""

import program
import pytest

MISTAKES = {
    "scale": (["--config=configs/quadratic.py:huge"], "unknown scale 'huge'"),
    "file": (["--config=configs/nothing.py"], "configs/nothing.py is no config; configs holds learned.py"),
    "field": (["--config=configs/quadratic.py", "--config.foo=1"], "unknown field config.foo"),
    "family": (["--config=configs/resnet18.py", "--config.model.heads=3"], "has no field 'heads'"),
    "type": (["--config=configs/quadratic.py", "--config.seed=abc"], "--config.seed=abc"),
    "value": (["--config=configs/quadratic.py", "--config.model.patch=3"], "choose one of 1, 2, 4"),
    "mode": (["--config=configs/quadratic.py", "--mode=fly"], "train|evaluate|describe"),
    "profile": (["--config=configs/quadratic.py", "--mode=describe", "--profile"], "--profile traces training"),
    "none": ([], "--config must have a value"),
    "nothing to evaluate": (
        ["--config=configs/quadratic.py:digits", "--mode=evaluate", "--workdir=/nonexistent/run"],
        "holds no run to evaluate",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_message(mistake):
    arguments, message = MISTAKES[mistake]
    command = [program.sys.executable, "main.py", *arguments]
    done = program.subprocess.run(command, cwd=program.ROOT, env=program.environment(), capture_output=True, text=True)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_describe_prints_the_totals():
    done = program.run("--mode=describe", config="configs/learned.py:digits", tiny=False)
    assert "180,874" in done.stdout and "paper's way  5.6M" in done.stdout
    assert done.stderr == ""


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
