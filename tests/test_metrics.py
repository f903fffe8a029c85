"""Metrics: on disk when flushed, and each step once however often the process began."""

import io
import threading

import numpy as np
import PIL.Image
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


IMAGE = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)


def images(directory):
    """(step, tag, pixels) of every image in the event files."""
    found = []
    for path in sorted(directory.glob("events*")):
        for event in metrics._events(path):
            for value in event.summary.value:
                encoded = value.image.encoded_image_string or (value.tensor.string_val or [b"", b"", b""])[2]
                if encoded:
                    found.append((event.step, value.tag, np.asarray(PIL.Image.open(io.BytesIO(encoded)))))
    return found


@pytest.mark.parametrize("tensorflow", [True, False], ids=["with TensorFlow", "without"])
def test_an_image_is_written_with_the_scalars_beside_it(tmp_path, monkeypatch, tensorflow):
    if not tensorflow:
        monkeypatch.setattr(metrics, "_open", lambda directory, *_: metrics.PlainWriter(directory))
    directory = epath.Path(tmp_path)
    with metrics.Writer(directory, 0, True) as writer:
        writer.write_image(10, "heads/attention", lambda: IMAGE)
        writer.write(10, {"test/loss": 0.5})
    ((step, tag, pixels),) = images(directory)
    assert (step, tag) == (10, "heads/attention")
    np.testing.assert_array_equal(pixels, IMAGE)
    assert steps(directory) == [(10, "test/loss")]


def test_drawing_holds_up_neither_scalars_nor_their_flush(tmp_path):
    directory, released = epath.Path(tmp_path), threading.Event()

    def draw():
        released.wait()
        return IMAGE

    with metrics.Writer(directory, 0, True) as writer:
        writer.write_image(10, "heads/attention", draw)
        writer.write(10, {"test/loss": 0.5})
        writer.flush()
        assert steps(directory) == [(10, "test/loss")] and not images(directory)
        released.set()
    assert len(images(directory)) == 1


def test_a_checkpoint_before_its_evaluation_does_not_know_its_image(tmp_path):
    directory = epath.Path(tmp_path)
    with metrics.Writer(directory, 0, True) as writer:
        writer.write_image(10, "heads/attention", lambda: IMAGE)
    metrics.trim(directory, 10, evaluated=False)
    assert not images(directory)
