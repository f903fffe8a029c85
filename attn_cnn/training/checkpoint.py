"""Checkpoints with orbax: written in the background, whole or not at all, and checked when read.

Each holds the state as a plain tree of arrays and a CRC of every array, since orbax's own format does not notice
every flipped byte.
"""

import contextlib
import functools
import json
import logging
import uuid
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import serialization, traverse_util
from orbax.checkpoint.checkpoint_managers import preservation_policy

from attn_cnn import schema
from attn_cnn.errors import UserError, first_line
from attn_cnn.training import devices

log = logging.getLogger("attn_cnn")

FIELDS = {
    "every_epochs": schema.integer(1, 100_000),
    "keep": schema.integer(1, 1000),
    "history_epochs": schema.integer(0, 100_000, default=0),
}


class Checkpoints:
    """The checkpoints of one workdir, named by step: the newest `keep`, and the best by what was evaluated.

    With `history_steps` those whose step is a multiple of it stay, too.

    It is a context manager, and leaving it waits for the last write. With `read_only` nothing on disk changes.
    """

    def __init__(self, directory: epath.Path, keep: int = 1, read_only: bool = False, history_steps: int = 0):
        self.directory = directory = directory.resolve()  # orbax takes absolute paths only
        newest = preservation_policy.LatestN(keep)
        best = preservation_policy.BestN(get_metric_fn=accuracy, n=1, keep_checkpoints_without_metrics=False)
        history = [preservation_policy.EveryNSteps(history_steps)] if history_steps else []
        if read_only:
            # Without the metrics, of which orbax would not open a damaged one.
            options = ocp.CheckpointManagerOptions(
                read_only=True, create=False, save_interval_steps=0, lightweight_initialize=True
            )
        else:
            options = ocp.CheckpointManagerOptions(
                best_fn=accuracy,  # without it orbax does not write the metrics
                preservation_policy=preservation_policy.AnyPreservationPolicy([newest, best, *history]),
                cleanup_tmp_directories=True,
            )
            devices.on_every_host(self._drop_damaged_metrics)
        with _explained("opened", directory), _quiet() if read_only else contextlib.nullcontext():
            self._manager = ocp.CheckpointManager(directory, options=options)
        self._read_only = read_only

    def save(self, step: int, state: Any, metrics: dict[str, float] | None = None) -> None:
        """Starts to write `state`; the previous write, if it still goes on, is waited for.

        Where the step's checkpoint is there already, it lacks but the metrics of an evaluation that was interrupted.

        Raises:
          UserError: this or the previous write fails.
        """
        if step == self.latest_step():
            if metrics is not None:
                self._add_metrics(step, metrics)
            return
        tree = serialization.to_state_dict(state)
        crcs = {name: _crc(array) for name, array in _flat(tree).items()}
        if jax.process_count() > 1:
            tree = jax.tree.map(ocp.utils.fully_replicated_host_local_array_to_global_array, tree)
        items = ocp.args.Composite(state=ocp.args.StandardSave(tree), crcs=ocp.args.JsonSave(crcs))
        with _explained("written", self.directory):
            if not self._manager.save(step, args=items, metrics=metrics):
                raise RuntimeError(f"orbax declined to save step {step}")

    def latest_step(self) -> int | None:
        """Returns the newest checkpoint's step, or None."""
        return self._manager.latest_step()

    def metrics(self, step: int) -> dict[str, float] | None:
        """Returns what was measured when the checkpoint of `step` was written; None: nothing, or nothing readable."""
        try:
            metrics = json.loads((self.directory / str(step) / "metrics" / "metrics").read_text())
            accuracy(metrics)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return metrics

    def restore(self, state: Any, step: int | str = "newest") -> tuple[int, Any] | None:
        """Returns (step, state) of a checkpoint; None where none was ever finished.

        The newest is the newest that is whole: newer ones, damaged, are moved aside, so that the run can write theirs
        again.

        Args:
          state: gives the structure; its arrays may be abstract.
          step: "newest", "best" (by the accuracy that the run was evaluated on), or a step.

        Raises:
          UserError: no checkpoint is whole on every host, or they may not be read, or there is none of that step.
        """
        steps = self._agreed_steps()
        target = serialization.to_state_dict(state)
        target = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), target)
        damages = {}
        for candidate in self._chosen(steps, step) if steps else ():
            tree, damage = devices.on_every_host(functools.partial(self._read, candidate, target))
            if devices.everywhere(damage is not None).any():
                damages[candidate] = (
                    f"{self.directory / str(candidate)}: {damage or 'damaged as another host reads it'}"
                )
                log.warning("Damaged checkpoint: %s", damages[candidate])
                continue
            self._move_aside(damages)
            return candidate, serialization.from_state_dict(state, jax.tree.map(jnp.asarray, tree))
        if damages:
            raise UserError("no checkpoint can be read:\n  " + "\n  ".join(damages.values()))
        return None

    def _agreed_steps(self) -> list[int]:
        """Returns the steps of all checkpoints, newest first.

        Raises:
          UserError: the hosts do not see the same ones, as where a shared disk is slow to show what was written.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if not devices.agree(json.dumps(steps).encode()):
            raise UserError(f"the hosts see different checkpoints in {self.directory}; start all of them again.")
        return steps

    def _chosen(self, steps: list[int], step: int | str) -> list[int]:
        """Returns the steps to try, in order."""
        if step == "newest":
            return steps
        if step == "best":
            accuracies = {s: accuracy(metrics) for s in steps if (metrics := self.metrics(s))}
            if not accuracies:
                log.warning("No checkpoint in %s was evaluated: the newest is taken for the best.", self.directory)
                return steps[:1]
            return [max(accuracies, key=lambda s: accuracies[s])]
        if step not in steps:
            raise UserError(f"{self.directory} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}.")
        return [step]

    def wait(self) -> None:
        """Returns when everything saved is on disk.

        Raises:
          UserError: it could not be written.
        """
        with _explained("written", self.directory):
            self._manager.wait_until_finished()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        with _explained("written", self.directory) if kind is None else contextlib.suppress(Exception):
            self._manager.close()

    def _read(self, step: int, target: dict) -> tuple[dict | None, str | None]:
        """Returns the state's arrays, or what is damaged."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target), crcs=ocp.args.JsonRestore())
        try:
            items = self._manager.restore(step, args=args)
            _check(_flat(items["state"]), _flat(target), items["crcs"])
        except (PermissionError, MemoryError, TimeoutError, ConnectionError) as error:  # the file may be whole
            raise UserError(f"the checkpoint of step {step} cannot be read: {first_line(error)}") from None
        except Exception as error:  # orbax raises whatever the damaged file led to
            return None, first_line(error)
        return items["state"], None

    def _add_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Gives a checkpoint the metrics item that orbax would have written with it."""

        def write():
            with _explained("written", self.directory):
                temporary = self.directory / str(step) / "metrics.tmp"
                temporary.mkdir(exist_ok=True)
                (temporary / "metrics").write_text(json.dumps(metrics))
                temporary.rename(self.directory / str(step) / "metrics")

        devices.on_every_host(lambda: write() if jax.process_index() == 0 else None)
        self._manager.reload()

    def _drop_damaged_metrics(self) -> None:
        """Moves aside what is no JSON, since it would keep orbax from opening any checkpoint.

        Without its metrics a step is evaluated anew.
        """
        if jax.process_index() > 0 or not self.directory.exists():
            return
        for item in self.directory.glob("*/metrics"):
            step = item.parent.name
            if step.isdigit() and self.metrics(int(step)) is None:
                log.warning("%s is damaged: the step is evaluated anew.", item)
                with _explained("opened", self.directory):
                    item.rename(item.with_name(f"metrics.damaged-{uuid.uuid4().hex[:8]}"))

    def _move_aside(self, steps: Iterable[int]) -> None:
        if not steps or self._read_only:
            return

        def move():
            with _explained("moved aside", self.directory):
                for step in steps:
                    (self.directory / str(step)).rename(self.directory / f"{step}.damaged-{uuid.uuid4().hex[:8]}")

        devices.on_every_host(lambda: move() if jax.process_index() == 0 else None)
        self._manager.reload()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps orbax from warning that what is opened to be read cannot be written."""
    orbax = logging.getLogger("absl")
    level = orbax.level
    orbax.setLevel("ERROR")
    try:
        yield
    finally:
        orbax.setLevel(level)


@contextlib.contextmanager
def _explained(done: str, directory: epath.Path) -> Iterator[None]:
    """Raises a failure of orbax, which may be of any type, as a message."""
    try:
        yield
    except Exception as error:
        raise UserError(f"the checkpoints in {directory} cannot be {done}: {first_line(error)}") from error


def accuracy(metrics: dict[str, float]) -> float:
    """Returns the accuracy among the metrics of a checkpoint: on the images that were held out, or the test set's."""
    return float(metrics["validation_accuracy" if "validation_accuracy" in metrics else "test_accuracy"])


def _flat(tree: dict) -> dict[str, Any]:
    return {"/".join(path): leaf for path, leaf in traverse_util.flatten_dict(tree).items()}


def _check(arrays: dict[str, Any], target: dict[str, Any], crcs: dict[str, int]) -> None:
    for name, array in arrays.items():
        if (array.shape, array.dtype) != (target[name].shape, target[name].dtype):
            wanted = f"{target[name].dtype}{list(target[name].shape)}"
            raise ValueError(f"{name} is {array.dtype}{list(array.shape)} instead of {wanted}")
        if _crc(array) != crcs.get(name):
            raise ValueError(f"{name} does not have the content that was saved")


def _crc(array: Any) -> int:
    array = np.ascontiguousarray(array)
    return zlib.crc32(array.view(np.uint8).reshape(-1), zlib.crc32(repr((array.shape, array.dtype)).encode()))
