"""A run's folder: config.json, checkpoints/ and metrics/, for one process at a time.

The claim is a lock that the operating system drops when its process ends, however it ends.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator

import jax
import ml_collections
from etils import epath

from attn_cnn import config as config_lib
from attn_cnn.errors import UserError


@contextlib.contextmanager
def claimed(workdir: epath.Path, config: ml_collections.ConfigDict) -> Iterator[None]:
    """Holds `workdir` for a run of `config`, and writes the config where the workdir is new.

    On several hosts process 0 holds it for all. Object stores have no locks: there, nothing is held.

    Raises:
      UserError: another process holds the workdir, another config has it, or it is not writable.
    """
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            try:
                workdir.mkdir(parents=True, exist_ok=True)
                if os.path.isdir(workdir):
                    stack.enter_context(_locked(workdir))
                check_config(workdir, config)
                if not (workdir / "config.json").exists():
                    config_lib.save(config, workdir / "config.json")
            except OSError as error:
                raise UserError(f"the workdir {workdir} cannot be used: {error}") from None
        yield


@contextlib.contextmanager
def _locked(folder: epath.Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is at work in {folder}; wait for it, or set another --workdir.") from None
    else:
        yield
    finally:
        os.close(descriptor)


def check_config(workdir: epath.Path, config: ml_collections.ConfigDict) -> None:
    """Raises UserError if `workdir` holds a run of another config."""
    path = workdir / "config.json"
    if not path.exists():
        if (workdir / "checkpoints").exists():
            raise UserError(f"{workdir} holds checkpoints but no config.json; set another --workdir.")
        return
    if lines := config_lib.differences(config, config_lib.load(path)):
        raise UserError(
            f"{workdir} holds a run with another config; set another --workdir, or the fields as they were:\n  "
            + "\n  ".join(lines)
        )
