"""A run's folder: config.json, checkpoints/ and metrics/, for one process at a time.

The claim is a lock on config.json, which the operating system drops when its process ends, however it ends.
"""

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator

import ml_collections
from etils import epath

from attn_cnn import config as config_lib
from attn_cnn.errors import UserError, first_line

log = logging.getLogger("attn_cnn")

SCHEMES = ("gs",)  # that TensorFlow, and so epath, reads without more packages


def open_workdir(path: epath.PathLike) -> epath.Path:
    """The path of a workdir. Raises UserError where it cannot be reached or is of a kind that holds no checkpoints."""
    scheme, separator, _ = os.fspath(path).partition("://")
    if separator and scheme not in SCHEMES:
        raise UserError(f"the workdir {path} must be a local path, or one of {', '.join(s + '://' for s in SCHEMES)}.")
    path = epath.Path(path)
    try:
        path.exists()
    except Exception as error:  # each file system has errors of its own
        raise UserError(f"the workdir {path} cannot be used: {first_line(error)}") from None
    return path


def claim(workdir: epath.Path, config: ml_collections.ConfigDict, stack: contextlib.ExitStack) -> None:
    """Holds `workdir` for a run of `config` until `stack` closes, and writes the config where the workdir is new.

    Object stores have no locks: there, nothing is held.

    Raises:
      UserError: another process holds the workdir, another config has it, or it is not writable.
    """
    path = workdir / "config.json"
    try:
        if not path.exists():
            if (workdir / "checkpoints").exists():
                raise UserError(f"{workdir} holds checkpoints but no config.json; set another --workdir.")
            workdir.mkdir(parents=True, exist_ok=True)
            config_lib.save(config, path)
        if os.path.isfile(path):
            stack.enter_context(_locked(path))
    except UserError:
        raise
    except Exception as error:  # each file system has errors of its own
        raise UserError(f"the workdir {workdir} cannot be used: {first_line(error)}") from None
    if lines := config_lib.differences(config, config_lib.load(path)):
        raise UserError(
            f"{workdir} holds a run with another config; set another --workdir, or the fields as they were:\n  "
            + "\n  ".join(lines)
        )


@contextlib.contextmanager
def _locked(path: epath.Path) -> Iterator[None]:
    with open(path, "r+") as file:  # NFS locks no file that is open for reading only
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"another process is at work in {path.parent}; wait for it, or set another --workdir."
            raise UserError(message) from None
        except OSError as error:
            log.warning("%s cannot be locked (%s): start no second process on it.", path.parent, error)
        yield
