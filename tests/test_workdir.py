"""A run's folder: made whole, held by one process at a time, never another run's."""

import contextlib
import fcntl
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from attn_cnn.errors import UserError
from attn_cnn.training import experiment as experiment_lib
from attn_cnn.training import runs
from attn_cnn.training import workdir as workdir_lib
from configs import quadratic


@pytest.fixture(scope="module")
def experiment():
    config = quadratic.get_config("digits")
    config.update_from_flattened_dict({"model.layers": 1, "model.hidden_size": 8, "model.mlp_size": 8, "epochs": 2})
    return experiment_lib.create_experiment(config)


@pytest.fixture(scope="module")
def state(experiment):
    rng, shapes = np.random.default_rng(0), experiment_lib.abstract_state(experiment)
    state = jax.tree.map(lambda leaf: jnp.asarray(9 * rng.random(leaf.shape), leaf.dtype), shapes)
    return state.replace(step=jnp.int32(14))


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path) / "runs" / "made"


def held(workdir, config):
    stack = contextlib.ExitStack()
    workdir_lib.claim(workdir, config, stack)
    return stack


def test_a_workdir_that_was_made_holds_the_state(experiment, state, workdir):
    workdir_lib.create(workdir, experiment.config, experiment.spec, state, {"test_accuracy": 0.5})
    assert workdir_lib.differences(runs.load_config(workdir), experiment.config) == []
    step, restored = runs.restore(experiment, workdir)
    assert step == 14
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    run = runs.load_run(workdir)
    assert run.step == 14 and run.config.to_dict() == experiment.config.to_dict()


@pytest.mark.parametrize("leaving", [{"config.json"}, {"checkpoints"}, {"config.json", "checkpoints"}])
def test_a_workdir_that_holds_a_run_is_not_made_again(leaving, experiment, state, workdir):
    workdir_lib.create(workdir, experiment.config, experiment.spec, state)
    for path in workdir.iterdir():
        if path.name not in leaving:
            path.rmtree() if path.is_dir() else path.unlink()
    before = sorted(path.name for path in workdir.iterdir())
    with pytest.raises(UserError, match="made holds a run already; set another --workdir"):
        workdir_lib.create(workdir, experiment.config, experiment.spec, state)
    assert sorted(path.name for path in workdir.iterdir()) == before == sorted(leaving)


def test_a_new_workdir_is_claimed_with_its_config(experiment, workdir):
    with held(workdir, experiment.config):
        assert json.loads((workdir / "config.json").read_text())["model"]["hidden_size"] == 8
    assert [path.name for path in workdir.iterdir()] == ["config.json"]


def test_one_process_at_a_time_holds_a_workdir(experiment, workdir):
    with held(workdir, experiment.config), pytest.raises(UserError, match="another process is at work in .*made"):
        held(workdir, experiment.config)
    held(workdir, experiment.config).close()


def test_a_config_that_is_there_is_not_written_over(experiment, workdir):
    held(workdir, experiment.config).close()
    held(workdir, quadratic.get_config()).close()
    assert workdir_lib.read_config(workdir / "config.json").to_dict() == experiment.config.to_dict()


def test_checkpoints_without_a_config_are_nobodys(experiment, workdir):
    (workdir / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="holds checkpoints but no config.json; set another --workdir"):
        held(workdir, experiment.config)


def test_a_workdir_that_cannot_be_made_is_named(experiment, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run cannot be used"):
        held(epath.Path(tmp_path) / "file" / "run", experiment.config)


def test_a_workdir_lies_on_a_disk_or_in_a_bucket(tmp_path):
    assert workdir_lib.open_workdir(str(tmp_path)) == epath.Path(tmp_path)
    with pytest.raises(UserError, match="s3://bucket/run must be a local path, or one of gs://"):
        workdir_lib.open_workdir("s3://bucket/run")


def test_a_bracket_in_the_path_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"has a \[ in its path"):
        workdir_lib.open_workdir(tmp_path / "[x]")


def test_a_workdir_whose_config_was_replaced_while_it_was_claimed_is_another_processs(
    experiment, tmp_path, monkeypatch
):
    workdir, flock = epath.Path(tmp_path) / "run", fcntl.flock
    with contextlib.ExitStack() as stack:
        workdir_lib.claim(workdir, experiment.config, stack)

    def replaced_first(file, how):
        (workdir / "new").write_text(workdir_lib.as_json(experiment.config))
        (workdir / "new").replace(workdir / "config.json")
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", replaced_first)
    with contextlib.ExitStack() as stack, pytest.raises(UserError, match="another process is at work"):
        workdir_lib.claim(workdir, experiment.config, stack)
