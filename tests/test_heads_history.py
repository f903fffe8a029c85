"""The numbers of heads over a run: whole at any moment, cut where a run resumes, enough to replay what heads saw."""

import functools
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import program
import pytest
from etils import epath
from golden import Golden, assert_close, small_model

from attn_cnn.attention import attention_maps
from attn_cnn.errors import UserError
from attn_cnn.heads import history, measure
from attn_cnn.model import create_model


@pytest.fixture
def workdir(tmp_path):
    """The numbers of three epochs of ten steps."""
    workdir = epath.Path(tmp_path)
    written = history.History(workdir, 0, True)
    for epoch in (1, 2, 3):
        written.append(epoch, 10 * epoch, {"entropy": np.full((2, 3), epoch / 7, np.float32)})
    return workdir


def test_what_was_written_is_read_with_the_epochs_in_front(workdir):
    numbers = history.read(workdir)
    assert numbers["epoch"].tolist() == [1, 2, 3] and numbers["step"].tolist() == [10, 20, 30]
    assert numbers["entropy"].shape == (3, 2, 3) and numbers["entropy"].dtype == np.float32
    np.testing.assert_allclose(numbers["entropy"][:, 1, 2], [1 / 7, 2 / 7, 3 / 7])


@pytest.mark.parametrize(
    "step, evaluated, kept", [(20, True, [10, 20]), (20, False, [10]), (25, True, [10, 20]), (0, True, [])]
)
def test_a_resumed_run_drops_what_its_checkpoint_does_not_know(workdir, step, evaluated, kept):
    resumed = history.History(workdir, step, evaluated)
    resumed.append(9, 99, {"entropy": np.zeros((2, 3), np.float32)})
    assert history.read(workdir)["step"].tolist() == [*kept, 99]


def test_a_number_that_came_later_is_nan_in_the_epochs_before_and_one_that_is_gone_in_those_after(workdir):
    later = history.History(workdir, 30, True)
    later.append(4, 40, {"gate": np.ones((2, 3), np.float16)})
    numbers = history.read(workdir)
    assert np.isnan(numbers["gate"][:3]).all() and (numbers["gate"][3] == 1).all()
    assert numbers["gate"].dtype == np.float16
    assert np.isnan(numbers["entropy"][3]).all() and not np.isnan(numbers["entropy"][:3]).any()


def test_a_kill_while_the_file_is_written_loses_nothing(workdir):
    before = history.read(workdir)
    kill = f"""
import os, signal, sys
sys.path.insert(0, {os.fspath(program.ROOT)!r})
import numpy as np
from etils import epath
from attn_cnn.heads import history
path = type(epath.Path("x"))
write = path.write_bytes
def half(self, content):
    write(self, content[: len(content) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
path.write_bytes = half
history.History(epath.Path({os.fspath(workdir)!r}), 30, True).append(4, 40, {{"entropy": np.ones((2, 3))}})
"""
    killed = subprocess.run([sys.executable, "-c", kill], env=program.environment(), check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (workdir / "heads.npz.writing").exists()
    for name, array in history.read(workdir).items():
        np.testing.assert_array_equal(array, before[name])
    history.History(workdir, 30, True).append(4, 40, {"entropy": np.ones((2, 3), np.float32)})
    assert history.read(workdir)["step"].tolist() == [10, 20, 30, 40]
    assert [path.name for path in workdir.iterdir()] == ["heads.npz"]


def test_a_damaged_file_is_moved_aside_with_a_word(workdir, caplog):
    path = workdir / "heads.npz"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="heads.npz is damaged"):
        history.read(workdir)
    history.History(workdir, 30, True).append(4, 40, {"entropy": np.zeros((2, 3))})
    assert "the heads' numbers begin anew" in caplog.text
    assert history.read(workdir)["step"].tolist() == [40]
    assert len(list(workdir.glob("heads.npz.damaged-*"))) == 1


def test_a_run_without_numbers_says_so(tmp_path):
    with pytest.raises(UserError, match="does not exist: the run has no heads"):
        history.read(tmp_path)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="numbers cannot be written"):
        history.History(epath.Path(tmp_path) / "file", 0, True).append(1, 10, {"entropy": np.zeros((1, 1))})


@functools.cache
def numbers_and_maps(encoding):
    """Returns a small model's numbers, as `read` would, and its maps, with heads that differ from layer to layer."""
    images = jnp.asarray(Golden("quadratic").images)
    module = create_model(small_model(encoding, heads=(3, 4)))
    params = jax.jit(module.init)(jax.random.key(0), images)["params"]
    by_layer = jax.jit(functools.partial(measure.measure, module))(params, images)
    numbers = history.appended({}, {"epoch": 1, "step": 10, **measure.stacked(by_layer, 2)})
    return numbers, jax.jit(functools.partial(attention_maps, module))(params, images)


@pytest.mark.slow
@pytest.mark.parametrize(
    "encoding, tolerance", [("quadratic", 1e-5), ("quadratic_generalized", 1e-5), ("learned", 3e-3)]
)
def test_position_only_heads_are_replayed_from_their_numbers(encoding, tolerance):
    numbers, maps = numbers_and_maps(encoding)
    for layer, A in enumerate(maps):
        assert_close(history.replay(numbers, 0, layer), A[0], tolerance=tolerance)


@pytest.mark.slow
def test_heads_that_see_the_image_are_not_replayed():
    numbers, _ = numbers_and_maps("learned_query")
    with pytest.raises(UserError, match="look where the image says"):
        history.replay(numbers, 0, 0)


@pytest.mark.slow
def test_tensorboard_gets_one_number_a_head_and_nothing_where_there_is_none():
    numbers, _ = numbers_and_maps("quadratic")
    epoch = {name: array[0] for name, array in numbers.items() if array.ndim > 1}
    scalars = history.scalars(epoch)
    assert scalars["heads/entropy/layer_1_head_3"] == numbers["entropy"][0, 1, 3]
    assert scalars["heads/center_column/layer_0_head_2"] == numbers["center"][0, 0, 2, 1]
    assert "heads/entropy/layer_0_head_3" not in scalars
    assert {tag.split("/")[1] for tag in scalars} == {
        "condition_number", "nonlocality", "entropy", "mass_3x3", "mass_5x5", "mean_shift_row", "mean_shift_column",
        "center_row", "center_column", "most_attended_shift_row", "most_attended_shift_column",
    }  # fmt: skip


@pytest.mark.parametrize("encoding", ["quadratic", "learned"])
def test_300_epochs_at_the_papers_size_are_less_than_5_mb(encoding, tmp_path):
    from configs import common

    model = create_model(common.attention("", encoding).model)
    images = jnp.zeros((1, 32, 32, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    shapes = jax.eval_shape(functools.partial(measure.measure, model), params, images)
    of_epoch = measure.stacked(jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), shapes), 6)
    repeated = {name: np.repeat(array[None], 299, 0) for name, array in of_epoch.items()}
    np.savez(tmp_path / "heads.npz", epoch=np.arange(299), step=np.arange(299), **repeated)
    history.History(epath.Path(tmp_path), 1000, True).append(300, 1000, of_epoch)
    assert history.read(tmp_path)["entropy"].shape == (300, 6, 9)
    assert (tmp_path / "heads.npz").stat().st_size < 5e6
