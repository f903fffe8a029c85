"""Metrics for TensorBoard, through clu, each step exactly once whatever happens to the process."""

import io
import os
import struct
from concurrent.futures import Future, ThreadPoolExecutor

from etils import epath


class Writer:
    """Writes scalars to event files in `directory`, after dropping what a former run wrote beyond `step`.

    clu's writer lives on a thread of its own: importing TensorFlow takes seconds that training need not wait for.
    """

    def __init__(self, directory: epath.Path, step: int):
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="metrics")
        self._writer = self._thread.submit(_open, directory, step)
        self._pending: list[Future] = []

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._pending.append(
            self._thread.submit(lambda: self._writer.result().write_scalars(step, scalars))
        )

    def flush(self) -> None:
        """Returns when everything written is on disk; raises what went wrong in writing."""
        for future in self._pending:
            future.result()
        self._pending.clear()
        self._thread.submit(lambda: self._writer.result().flush()).result()

    def close(self) -> None:
        self.flush()
        self._thread.submit(lambda: self._writer.result().close()).result()
        self._thread.shutdown()


def _open(directory: epath.Path, step: int):
    trim(directory, step)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    from clu import metric_writers

    return metric_writers.SummaryWriter(os.fspath(directory))


def trim(directory: epath.Path, step: int) -> None:
    """Drops every event beyond `step`, and a torn last record, from the event files of `directory`."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    for path in directory.glob("events.out.tfevents.*"):
        records = [Event.FromString(record) for record in _records(path.read_bytes())]
        kept = io.BytesIO()
        writer = RecordWriter(kept)
        for event in records:
            if event.step <= step:
                writer.write(event.SerializeToString())
        temporary = path.with_name("trimmed")
        temporary.write_bytes(kept.getvalue())
        temporary.replace(path)


def _records(data: bytes):
    """The payloads of a TFRecord file: length, its CRC, payload, its CRC; stops where the file was cut."""
    start = 0
    while start + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        if start + 12 + length + 4 > len(data):
            return
        yield data[start + 12 : start + 12 + length]
        start += 12 + length + 4
