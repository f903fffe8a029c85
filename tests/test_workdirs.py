"""Workdirs that earlier versions of the code left half-way are evaluated, resumed and opened as they were by that code.

Those in workdirs/ are named by experiment. All but quadratic_pruned are older than data.json; quadratic_heads_by_layer
has layers with heads of their own number. expected.json holds what the code that made each measured, there and at the
end of the run.
"""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import program
import pytest
from etils import epath

import attn_cnn
from attn_cnn import train
from attn_cnn.training import data
from attn_cnn.training.augment import normalize
from attn_cnn.training.runs import load_config


@pytest.fixture(params=sorted(program.WORKDIRS.iterdir()), ids=lambda path: path.name)
def workdir(request, tmp_path):
    return epath.Path(shutil.copytree(request.param, tmp_path / "run"))


@pytest.fixture
def expected(workdir):
    return json.loads((workdir / "expected.json").read_text())


@pytest.mark.slow
def test_it_is_evaluated_and_resumed_with_the_results_of_the_code_that_made_it(workdir, expected):
    config = load_config(workdir)
    assert train.evaluate(config, workdir) == pytest.approx(expected["halfway"], rel=1e-5)
    state = train.train(config, workdir)
    assert int(state.step) == 56
    assert train.evaluate(config, workdir) == pytest.approx(expected["end"], rel=1e-3)
    assert [step for step, _ in program.scalars(workdir, "test/accuracy")] == [14, 28, 42, 56]


@pytest.mark.slow
def test_load_run_opens_it_and_changes_nothing(workdir, expected):
    before = program.content(Path(workdir))
    run = attn_cnn.load_run(workdir)
    assert (workdir / "checkpoints" / str(run.step)).is_dir()
    digits = data.load("digits")
    variables = {"params": run.params, "batch_stats": run.batch_stats}
    logits = jax.jit(run.model.apply)(variables, normalize(jnp.asarray(digits.test_images), run.mean, run.std))
    assert np.mean(logits.argmax(-1) == digits.test_labels) == pytest.approx(expected["halfway"]["accuracy"])
    assert program.content(Path(workdir)) == before
