"""Runs main.py as a user does, on a model small enough to test with."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from etils import epath

from attn_cnn.errors import UserError
from attn_cnn.training.metrics import read
from configs import quadratic

ROOT = Path(__file__).parent.parent
WORKDIRS = Path(__file__).parent / "workdirs"  # of earlier versions of the code
TINY = ("--config.model.layers=1", "--config.model.hidden_size=16", "--config.model.mlp_size=16")


def tiny_config(experiment=quadratic, **changes):
    """The config that the flags TINY make of an experiment on the digits; of a ResNet one just as small."""
    config = experiment.get_config("digits")
    if config.model.name == "attention":
        config.model.layers, config.model.hidden_size, config.model.mlp_size = 1, 16, 16
    else:
        config.model.width, config.optimizer.decay_epochs = 2, ()
    config.update_from_flattened_dict(changes)
    return config


def command(*arguments, config="configs/quadratic.py:digits", tiny=True):
    return [sys.executable, "main.py", f"--config={config}", *(TINY if tiny else ()), *arguments]


def environment(devices=1, **variables):
    flags = f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"} | variables


def run(
    *arguments,
    check=True,
    timeout=300,
    config="configs/quadratic.py:digits",
    tiny=True,
    devices=1,
    **variables,
):
    """Runs to the end; stdout and stderr are text."""
    return subprocess.run(
        command(*arguments, config=config, tiny=tiny),
        cwd=ROOT,
        env=environment(devices, **variables),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=check,
    )


def run_module(module, *arguments, **kwargs):
    """Runs python -m `module` to the end, which may be a failure; stdout and stderr are text."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, **kwargs)


def refusal(module, *arguments):
    """What a command (the module that is its __main__) says against its arguments before it does anything, or ""."""
    former = set(flags.FLAGS)
    module.define_flags()
    try:
        _, command = flags.FLAGS(["command", *arguments])
        module.check_flags(command)
    except UserError as error:
        return str(error)
    finally:
        flags.FLAGS.unparse_flags()
        for name in set(flags.FLAGS) - former:
            delattr(flags.FLAGS, name)
    return ""


def start(*arguments, devices=1, config="configs/quadratic.py:digits", tiny=True, variables=None, **kwargs):
    """Starts and returns the process, with more environment `variables`; stderr is to be read."""
    return subprocess.Popen(
        command(*arguments, config=config, tiny=tiny),
        cwd=ROOT,
        env=environment(devices, **(variables or {})),
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def wait_for(process, words):
    """Reads the process's log up to a line with `words`."""
    for line in process.stderr:
        if words in line:
            return
    pytest.fail(f"the process ended without {words!r}")


def scalars(workdir, tag):
    """(step, value) of every time `tag` was written, in order."""
    return [(step, value) for step, name, value in read(epath.Path(workdir) / "metrics") if name == tag]


def newest_checkpoint(workdir):
    """The step of the newest whole one, or 0."""
    return max((int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()), default=0)


def readme_cell(word):
    """The one cell of Python in the README that has `word` in it."""
    cells = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (cell,) = [cell for cell in cells if word in cell]
    return cell


def assert_same_bits(a, b):
    """Two trees of arrays are equal."""
    jax.tree.map(np.testing.assert_array_equal, a, b)


def content(workdir):
    """Every path in a workdir, and when it was written; equal before and after, nothing there has changed."""
    return sorted((path, path.stat().st_mtime_ns) for path in workdir.rglob("*"))


def fill_disk(monkeypatch, reason):
    """Lets every file take its first ten bytes and no more, and each write fail for this reason."""
    write_bytes = type(epath.Path()).write_bytes

    def write_in_part(path, content):
        write_bytes(path, content[:10])
        raise OSError(reason)

    monkeypatch.setattr(type(epath.Path()), "write_bytes", write_in_part)
