"""A run's folder: config.json, data.json, heads.json, checkpoints/ and metrics/, for one process at a time.

The claim is a lock on config.json, which the operating system drops when its process ends, however it ends.
"""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import uuid
from collections.abc import Iterator
from typing import Any

import ml_collections
from etils import epath

from attn_cnn import paths, schema
from attn_cnn.errors import UserError, first_line
from attn_cnn.heads.surgery import Surgery
from attn_cnn.training.checkpoint import Checkpoints
from attn_cnn.training.dataset import Spec

log = logging.getLogger("attn_cnn")

CONFIG = "config.json"
DATA = "data.json"
CHECKPOINTS = "checkpoints"
SURGERY = "heads.json"  # the heads that remain of those in config.json, where some were pruned or reset

# Fields that may differ when a run resumes: they change no result, but for micro_batch_size, which, like the number of
# devices, changes rounding and what dropout draws.
MAY_DIFFER = frozenset(
    {
        "data.dir",
        "checkpoint.keep",
        "checkpoint.every_epochs",
        "checkpoint.history_epochs",
        "figures.every_epochs",
        "log_every_steps",
        "eval_batch_size",
        "micro_batch_size",
    }
)


def open_workdir(path: epath.PathLike) -> epath.Path:
    """Returns the path of a workdir.

    Raises:
      UserError: it cannot be reached, or is of a kind that holds no checkpoints.
    """
    path = paths.resolve(path, "the workdir")
    if "[" in os.fspath(path.absolute()):  # orbax would take it for a pattern
        raise UserError(
            f"the workdir {path} has a [ in its path, which checkpoints cannot have; set another --workdir."
        )
    try:
        path.exists()
    except Exception as error:  # each file system has errors of its own
        raise UserError(f"the workdir {path} cannot be used: {first_line(error)}") from None
    return path


def claim(workdir: epath.Path, config: ml_collections.ConfigDict, stack: contextlib.ExitStack) -> None:
    """Holds `workdir` for a run of `config` until `stack` closes, and writes the config where the workdir is new.

    Object stores have no locks: there, nothing is held.

    Raises:
      UserError: another process holds the workdir, or it is not writable.
    """
    path = workdir / CONFIG
    try:
        if not path.exists():
            if (workdir / CHECKPOINTS).exists():
                raise UserError(f"{workdir} holds checkpoints but no {CONFIG}; set another --workdir.")
            workdir.mkdir(parents=True, exist_ok=True)
            write_config(config, path)
        if os.path.isfile(path):
            stack.enter_context(_locked(path))
    except UserError:
        raise
    except Exception as error:  # each file system has errors of its own
        raise UserError(f"the workdir {workdir} cannot be used: {first_line(error)}") from None


@contextlib.contextmanager
def _locked(path: epath.Path) -> Iterator[None]:
    rival = f"another process is at work in {path.parent}; wait for it, or set another --workdir."
    with open(path, "r+") as file:  # NFS locks no file that is open for reading only
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(rival) from None
        except OSError as error:
            log.warning("%s cannot be locked (%s): start no second process on it.", path.parent, error)
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):  # replaced (see `update`) since it was opened
            raise UserError(rival)
        yield


def update(workdir: epath.Path, config: ml_collections.ConfigDict, stack: contextlib.ExitStack) -> None:
    """Replaces the config of a workdir that is held; the new file is held until `stack` closes.

    Raises:
      UserError: it cannot be written.
    """
    path = workdir / CONFIG
    temporary = path.with_name(f"{CONFIG}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(as_json(config))
        if os.path.isfile(temporary):
            stack.enter_context(_locked(temporary))  # before it has the name, or a rival could hold it first
        temporary.replace(path)
    except paths.file_errors() as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"the config in {workdir} cannot be written: {first_line(error)}") from None


def as_json(config: ml_collections.ConfigDict) -> str:
    """Returns the text of config.json."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def check_new(workdir: epath.Path) -> None:
    """Raises UserError if the workdir holds a run already."""
    if (workdir / CONFIG).exists() or any((workdir / CHECKPOINTS).glob("[0-9]*")):
        raise UserError(f"{workdir} holds a run already; set another --workdir.")


def create(
    workdir: epath.Path,
    config: ml_collections.ConfigDict,
    spec: Spec,
    state: Any,
    metrics: dict[str, float] | None = None,
    surgery: Surgery | None = None,
) -> None:
    """Makes `workdir` a run of `config` that has come to `state`, with `metrics` if that was evaluated.

    Of its heads, `surgery` says which the state has.

    Raises:
      UserError: the workdir holds a run already, or cannot be written.
    """
    check_new(workdir)
    with Checkpoints(workdir / CHECKPOINTS) as checkpoints:
        checkpoints.save(int(state.step), state, metrics)
    write_spec(workdir, spec)
    write_surgery(surgery, workdir)
    try:
        # The config comes last: a run without a checkpoint would start from random weights.
        write_config(config, workdir / CONFIG)
    except paths.file_errors() as error:
        raise UserError(f"the config in {workdir} cannot be written: {first_line(error)}") from None
    if (workdir / CONFIG).read_text() != as_json(config):
        raise UserError(f"another process made a run in {workdir} at the same time; set another --workdir.")


def write_config(config: ml_collections.ConfigDict, path: epath.Path) -> None:
    """Writes the config as JSON, whole or not at all, unless another process was first."""
    text = as_json(config)
    if not os.path.isdir(path.parent):  # an object store, which writes files whole
        path.write_text(text)
        return
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(text)
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            if not path.exists():
                temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_spec(workdir: epath.Path, spec: Spec) -> None:
    """Writes what is known of the run's data, so that the run means the same where that data is not.

    Raises:
      UserError: it cannot be written.
    """
    paths.write(workdir / DATA, spec.to_json().encode())


def read_spec(workdir: epath.Path) -> Spec | None:
    """Returns what is known of the data of the run in `workdir`, or None where the run is older than the file.

    Raises:
      UserError: the file is damaged.
    """
    path = workdir / DATA
    if not path.exists():
        return None
    try:
        return Spec.from_json(path.read_text())
    except paths.file_errors(ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not describe the run's data: {first_line(error)}") from None


def check_config(
    workdir: epath.Path,
    ours: ml_collections.ConfigDict,
    theirs: ml_collections.ConfigDict,
    only: tuple[str, ...] = ("",),
) -> None:
    """Raises UserError if the config of the run in `workdir`, `theirs`, has `differences` from `ours`."""
    if lines := differences(ours, theirs, only):
        raise UserError(
            f"{workdir} holds a run with another config; set another --workdir, or the fields as they were:\n  "
            + "\n  ".join(lines)
        )


def check_data(workdir: epath.Path, spec: Spec, only: tuple[str, ...] = ("",)) -> None:
    """Raises UserError if the run in `workdir` is of other data than `spec`, in fields beginning with one of `only`."""
    if theirs := read_spec(workdir):
        a, b = dataclasses.asdict(spec), dataclasses.asdict(theirs)
        lines = [f"{n}: {b[n]!r} then, {a[n]!r} now" for n in a if n.startswith(only) and a[n] != b[n]]
        if lines:
            raise UserError(
                f"the data is not what the run in {workdir} is of; set config.data as it was, or another --workdir:\n  "
                + "\n  ".join(lines)
            )


def read_config(path: epath.Path) -> ml_collections.ConfigDict:
    """Reads what `write_config` wrote; whether it describes a run is not checked.

    Raises:
      UserError: the file is no JSON, or holds no fields.
    """
    try:
        return config_of(json.loads(path.read_text()))
    except paths.file_errors(RecursionError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a config: {first_line(error)}") from None


def config_of(plain: dict[str, Any]) -> ml_collections.ConfigDict:
    """Returns the config that JSON, which has lists in the place of tuples, holds as `plain`."""

    def tuples(value):
        if isinstance(value, dict):
            return {k: tuples(v) for k, v in value.items()}
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    return ml_collections.ConfigDict(tuples(plain))


def read_surgery(workdir: epath.Path) -> Surgery | None:
    """Returns what became of the heads that the run's config asks for; None: nothing.

    Raises:
      UserError: the file is damaged.
    """
    path = workdir / SURGERY
    if not path.exists():
        return None
    try:
        fields = json.loads(path.read_text())
        return Surgery(*(tuple(tuple(map(int, heads)) for heads in fields[name]) for name in Surgery._fields))
    except paths.file_errors(KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not say which heads remain: {first_line(error)}") from None


def write_surgery(surgery: Surgery | None, workdir: epath.Path) -> None:
    """Writes what `read_surgery` reads, whole or not at all.

    Raises:
      UserError: it cannot be written.
    """
    path = workdir / SURGERY
    if surgery is not None:
        paths.write(path, (json.dumps(surgery._asdict()) + "\n").encode())
        return
    try:
        path.unlink(missing_ok=True)
    except paths.file_errors() as error:
        raise UserError(f"{path} cannot be removed: {first_line(error)}") from None


def differences(
    ours: ml_collections.ConfigDict, theirs: ml_collections.ConfigDict, only: tuple[str, ...] = ("",)
) -> list[str]:
    """Returns the fields (beginning with one of `only`) in which two configs differ, as lines to read.

    Those of `MAY_DIFFER` are left out, and so is where files of data lie.
    """
    a, b = (_without_place(schema.flatten(config)) for config in (ours, theirs))
    names = sorted(n for n in (set(a) | set(b)) - MAY_DIFFER if n.startswith(only))
    return [f"{n}: {b.get(n)!r} then, {a.get(n)!r} now" for n in names if a.get(n) != b.get(n)]


def _without_place(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns a config's fields with the kind of data alone where config.data.name is a place, as folder:PATH."""
    kind, colon, _ = str(fields.get("data.name")).partition(":")
    return fields | {"data.name": kind} if colon and kind in ("folder", "npz") else fields
