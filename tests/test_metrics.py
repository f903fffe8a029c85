"""Metrics: on disk when flushed, and each step once however often the process began."""

import pytest
from etils import epath

from attn_cnn.errors import UserError
from attn_cnn.training import metrics

pytestmark = pytest.mark.slow  # TensorFlow is imported


@pytest.fixture
def directory(tmp_path):
    directory = epath.Path(tmp_path) / "metrics"
    with metrics.Writer(directory, 0, True) as writer:
        for step in (10, 20, 30):
            writer.write(step, {"train/loss": step / 7})
        writer.write(20, {"test/loss": 0.5})
    return directory


def steps(directory):
    return [(step, tag) for step, tag, _ in metrics.read(directory)]


def test_what_was_written_is_read(directory):
    step, tag, value = metrics.read(directory)[0]
    assert (step, tag) == (10, "train/loss") and value == pytest.approx(10 / 7)
    assert len(metrics.read(directory)) == 4


def test_a_resumed_run_drops_what_its_checkpoint_does_not_know(directory):
    with metrics.Writer(directory, 20, True) as writer:
        writer.write(30, {"train/loss": 1.0})
    assert steps(directory) == [(10, "train/loss"), (20, "train/loss"), (20, "test/loss"), (30, "train/loss")]
    assert metrics.read(directory)[-1][2] == 1.0


def test_a_checkpoint_before_its_evaluation_does_not_know_its_test_metrics(directory):
    metrics.trim(directory, 20, evaluated=False)
    assert steps(directory) == [(10, "train/loss"), (20, "train/loss")]


def test_a_torn_record_is_dropped(directory):
    (file,) = directory.glob("events*")
    file.write_bytes(file.read_bytes()[:-5])
    metrics.trim(directory, 30, evaluated=True)
    assert steps(directory) == [(10, "train/loss"), (20, "train/loss"), (30, "train/loss")]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    directory = epath.Path(tmp_path) / "file" / "metrics"
    with pytest.raises(UserError, match="cannot be written"), metrics.Writer(directory, 0, True) as writer:
        writer.write(1, {"loss": 1.0})
