"""Checkpoints: what is saved comes back bit for bit, and damage is noticed."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from attn_cnn.errors import UserError
from attn_cnn.training import devices
from attn_cnn.training.checkpoint import Checkpoints


def state(value):
    kernel = jax.random.normal(jax.random.key(value), (64, 64))
    return {"params": {"kernel": kernel}, "step": jnp.int32(value)}


@pytest.fixture
def directory(tmp_path):
    directory = epath.Path(tmp_path) / "checkpoints"
    with Checkpoints(directory, keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step), {"test_accuracy": 0.5})
    return directory


def restore(directory, step="newest", **kwargs):
    with Checkpoints(directory, keep=3, **kwargs) as checkpoints:
        return checkpoints.restore(jax.eval_shape(lambda: state(0)), step)


def test_the_newest_comes_back(directory):
    step, restored = restore(directory)
    assert step == 3
    jax.tree.map(np.testing.assert_array_equal, restored, state(3))


def test_none_where_none_was_written(tmp_path):
    assert restore(epath.Path(tmp_path) / "checkpoints") is None


def test_the_newest_and_the_best_are_kept(tmp_path):
    directory = epath.Path(tmp_path) / "checkpoints"
    with Checkpoints(directory, keep=2) as checkpoints:
        for step, accuracy in enumerate((0.1, 0.9, 0.3, 0.4, None, 0.5), start=1):
            metrics = None if accuracy is None else {"test_accuracy": accuracy}
            checkpoints.save(step, state(step), metrics)
            checkpoints.wait()
        assert checkpoints.metrics(2) == {"test_accuracy": 0.9}
        assert checkpoints.metrics(5) is None
    assert sorted(path.name for path in directory.iterdir()) == ["2", "5", "6"]


@pytest.fixture
def measured(tmp_path):
    """Checkpoints of which the second is the best, and the last not evaluated yet."""
    directory = epath.Path(tmp_path) / "checkpoints"
    with Checkpoints(directory, keep=3) as checkpoints:
        for step, accuracy in enumerate((0.3, 0.9, 0.4, None), start=1):
            checkpoints.save(step, state(step), None if accuracy is None else {"test_accuracy": accuracy})
    return directory


@pytest.mark.parametrize("asked, step", [("newest", 4), ("best", 2), (2, 2), (3, 3)])
def test_the_one_that_is_asked_for_comes_back(asked, step, measured):
    found, restored = restore(measured, asked, read_only=True)
    assert found == step
    jax.tree.map(np.testing.assert_array_equal, restored, state(step))


def test_where_none_was_evaluated_the_newest_is_the_best_and_said_to_be(tmp_path, caplog):
    directory = epath.Path(tmp_path) / "checkpoints"
    with Checkpoints(directory, keep=3) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step))
    assert restore(directory, "best")[0] == 2
    assert "was evaluated: the newest is taken for the best" in caplog.text


@pytest.mark.parametrize("asked", [0, 7, "oldest"])
def test_a_step_that_is_not_there_names_those_that_are(asked, measured):
    with pytest.raises(UserError, match=f"has no checkpoint of step {asked}; it has 4, 3, 2"):
        restore(measured, asked)


def test_a_damaged_one_that_was_asked_for_is_an_error(measured):
    truncate(Path(measured / "3"))
    with pytest.raises(UserError, match="no checkpoint can be read:\n.*checkpoints/3"):
        restore(measured, 3)
    assert restore(measured, 2)[0] == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"test_accuracy": null}'])
def test_damaged_metrics_of_one_checkpoint_keep_none_from_being_read(content, measured):
    (measured / "2" / "metrics" / "metrics").write_text(content)
    before = sorted(Path(measured).rglob("*"))
    assert restore(measured, "newest", read_only=True)[0] == 4
    assert restore(measured, "best", read_only=True)[0] == 3
    assert restore(measured, 2, read_only=True)[0] == 2
    assert sorted(Path(measured).rglob("*")) == before


def test_reading_changes_nothing(measured):
    truncate(Path(measured / "4"))
    before = sorted(Path(measured).rglob("*"))
    assert restore(measured, read_only=True)[0] == 3
    assert sorted(Path(measured).rglob("*")) == before


def largest_file(folder):
    return max((path for path in folder.glob("state/**/*") if path.is_file()), key=lambda p: p.stat().st_size)


def truncate(folder):
    file = largest_file(folder)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_byte(folder):
    for file in folder.glob("state/**/d/*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(bytes(content))


def remove_a_file(folder):
    largest_file(folder).unlink()


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def lie_about_the_content(folder):
    (crcs,) = [path for path in folder.glob("crcs/**/*") if path.is_file() and "kernel" in path.read_text()]
    crcs.write_text(crcs.read_text().replace('kernel": ', 'kernel": 1'))


DAMAGES = [truncate, flip_a_byte, remove_a_file, empty, lie_about_the_content]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_named_and_the_one_before_is_used(damage, directory, caplog):
    damage(Path(directory / "3"))
    step, restored = restore(directory)
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, restored, state(2))
    assert str(directory / "3") in caplog.text


@pytest.mark.parametrize("damage", DAMAGES)
def test_where_none_is_whole_it_is_an_error(damage, directory):
    for step in (1, 2, 3):
        damage(Path(directory / str(step)))
    with pytest.raises(UserError, match="no checkpoint can be read"):
        restore(directory)


def test_a_state_of_other_shapes_is_no_checkpoint_of_ours(directory):
    other = {"params": {"kernel": jnp.zeros((3, 3))}, "step": jnp.int32(0)}
    with Checkpoints(directory) as checkpoints, pytest.raises(UserError, match="no checkpoint can be read"):
        checkpoints.restore(other)


def test_a_read_that_fails_for_want_of_memory_damages_nothing(directory, monkeypatch):
    before = sorted(path.name for path in directory.iterdir())

    def fail(*_, **__):
        raise MemoryError("no memory is left")

    with Checkpoints(directory) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", fail)
        with pytest.raises(UserError, match="the checkpoint of step 3 cannot be read: .*no memory is left"):
            checkpoints.restore(state(0))
    assert sorted(path.name for path in directory.iterdir()) == before


def test_hosts_that_see_different_checkpoints_are_stopped(directory, monkeypatch):
    with Checkpoints(directory) as checkpoints:
        monkeypatch.setattr(devices, "agree", lambda seen: False)
        with pytest.raises(UserError, match="the hosts see different checkpoints"):
            checkpoints.restore(state(0))
