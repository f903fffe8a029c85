"""Metrics for TensorBoard, each step exactly once whatever happens to the process.

clu writes them, through TensorFlow; where that is not installed, as in many images for accelerators, TensorBoard's own
writer does.
"""

import io
import logging
import os
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import PIL.Image
from etils import epath
from jaxtyping import UInt8

from attn_cnn.errors import UserError, first_line
from attn_cnn.training import quiet_tensorflow

log = logging.getLogger("attn_cnn")


class Writer:
    """Writes scalars and images to event files in `directory`; on several hosts process 0 does, the others do nothing.

    First it drops what a former process wrote beyond the checkpoint of `step` (see `trim`). clu's writer lives on a
    thread of its own: importing TensorFlow takes seconds that training need not wait for.
    """

    def __init__(self, directory: epath.Path, step: int, evaluated: bool):
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="metrics")
        self._painter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="images")
        self._pending: list[Future] = []
        self._images: list[Future] = []
        writes = jax.process_index() == 0
        self._writer: Future | None = self._thread.submit(_open, directory, step, evaluated) if writes else None

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Starts to write; a failure is raised by `flush`."""
        self._submit(lambda writer: writer.write_scalars(step, scalars))

    def write_image(self, step: int, tag: str, draw: Callable[[], UInt8[np.ndarray, "height width 3"]]) -> None:
        """Starts to draw an image on a thread of its own, and to write it; a failure is raised at the end.

        `flush` does not wait for it: a process that dies may leave its last image out, never one twice.
        """
        opened = self._writer
        if opened is None:
            return

        def write():
            image = draw()[None]
            self._thread.submit(lambda: opened.result().write_images(step, {tag: image})).result()

        self._images.append(self._painter.submit(write))

    def flush(self) -> None:
        """Returns when all scalars are on disk.

        Raises:
          UserError: it cannot be written.
        """
        self._submit(lambda writer: writer.flush())
        pending, self._pending = self._pending, []
        try:
            for future in pending:
                future.result()
        except Exception as error:  # of the disk, or TensorFlow's, which has types of its own
            raise UserError(f"the metrics cannot be written: {first_line(error)}") from None

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self._painter.shutdown(cancel_futures=kind is not None)
        if kind is None:
            self._pending += self._images
            self.flush()
        self._thread.shutdown()

    def _submit(self, work: Callable[[Any], None]) -> None:
        """Starts to do something with the open writer, where there is one."""
        opened = self._writer
        if opened is not None:
            self._pending.append(self._thread.submit(lambda: work(opened.result())))


class PlainWriter:
    """Writes what clu's SummaryWriter writes, without TensorFlow, to local folders."""

    def __init__(self, directory: epath.Path):
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(os.fspath(directory))

    def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Starts to write."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()])
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def write_images(self, step: int, images: dict[str, UInt8[np.ndarray, "1 height width 3"]]) -> None:
        """Starts to write."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        for tag, (image,) in images.items():
            content = io.BytesIO()
            PIL.Image.fromarray(image).save(content, format="PNG")
            encoded = Summary.Image(
                height=image.shape[0], width=image.shape[1], colorspace=3, encoded_image_string=content.getvalue()
            )
            summary = Summary(value=[Summary.Value(tag=tag, image=encoded)])
            self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> None:
        """Returns when everything is on disk."""
        self._writer.flush()


def _open(directory: epath.Path, step: int, evaluated: bool):
    trim(directory, step, evaluated)
    try:
        quiet_tensorflow.load()
    except ImportError:
        log.info("TensorFlow is not installed; TensorBoard's own writer takes its place.")
        return PlainWriter(directory)
    from clu import metric_writers

    return metric_writers.SummaryWriter(os.fspath(directory))


def trim(directory: epath.Path, step: int, evaluated: bool) -> None:
    """Drops what the checkpoint of `step` does not know of from the event files of `directory`.

    That is every later event, a torn last record and, unless the checkpoint was `evaluated`, what evaluation wrote.
    """
    from tensorboard.summary.writer.record_writer import RecordWriter

    for path in directory.glob("events.out.tfevents.*"):
        kept = io.BytesIO()
        writer = RecordWriter(kept)
        for event in _events(path):
            of_evaluation = any(
                value.tag.startswith(("test/", "validation/", "heads/")) for value in event.summary.value
            )
            if event.step < step or (event.step == step and (evaluated or not of_evaluation)):
                writer.write(event.SerializeToString())
        temporary = path.with_name("trimmed")
        temporary.write_bytes(kept.getvalue())
        temporary.replace(path)


def read(directory: epath.Path) -> list[tuple[int, str, float]]:
    """Every scalar in the event files of `directory`, as (step, tag, value), in the order of writing."""
    from tensorboard.util.tensor_util import make_ndarray

    scalars = []
    for path in sorted(directory.glob("events.out.tfevents.*")):
        for event in _events(path):
            for v in event.summary.value:
                if v.HasField("image") or v.metadata.plugin_data.plugin_name == "images":
                    continue
                value = v.simple_value if v.HasField("simple_value") else make_ndarray(v.tensor)
                scalars.append((event.step, v.tag, float(value)))
    return scalars


def _events(path: epath.Path) -> Iterator[Any]:
    """The events of a file of records (length, its CRC, payload, its CRC), up to where it is cut or damaged."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import masked_crc32c

    content, start = path.read_bytes(), 0
    while start + 12 <= len(content):
        length, crc = struct.unpack_from("<QI", content, start)
        payload = content[start + 12 : start + 12 + length]
        (payload_crc,) = struct.unpack_from("<I", content[start + 12 + length : start + 16 + length].ljust(4))
        intact = crc == masked_crc32c(content[start : start + 8]) and payload_crc == masked_crc32c(payload)
        if not intact:
            log.warning("%s is damaged or cut at byte %d: what follows in it is dropped.", path, start)
            return
        yield Event.FromString(payload)
        start += 12 + length + 4
