"""Paths as people, sweeps and schedulers write them, files there, and the folder for what can be made again."""

import contextlib
import os
import re
import sys
import tempfile
import uuid

from etils import epath

from attn_cnn.errors import UserError, first_line

SCHEMES = ("gs",)  # that TensorFlow, and so epath, reads without more packages


def resolve(path: epath.PathLike, what: str) -> epath.Path:
    """Returns `path` with ~ expanded; `what` names it in messages, as in "the workdir".

    Raises:
      UserError: it is empty, its home is unknown, or it is of a kind that cannot be read.
    """
    text = os.fspath(path)
    if not text.strip():
        raise UserError(f"{what} is empty; give a path.")
    if "\0" in text:
        raise UserError(f"{what} {text!r} holds a null character; give another path.")
    if scheme := re.match(r"(\w{2,}):/(?!/)", text):
        raise UserError(f"{what} is {text}, with one slash; write {scheme[1]}://{text[scheme.end() :]}.")
    scheme, separator, _ = text.partition("://")
    if separator and scheme not in SCHEMES:
        raise UserError(f"{what} {text} must be a local path, or one of {', '.join(s + '://' for s in SCHEMES)}.")
    try:
        expanded = os.fspath(epath.Path(text).expanduser())
    except RuntimeError:
        expanded = text
    if expanded.startswith("~"):
        raise UserError(f"{what} is {text}, but there is no such home; set HOME, or write the path whole.")
    return epath.Path(expanded)


def file_errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """Returns what failed reads and writes raise, OSError and, where it reads gs://, TensorFlow's own, and `others`."""
    tensorflow = sys.modules.get("tensorflow")
    return (OSError, *([tensorflow.errors.OpError] if tensorflow else ()), *others)


def write(path: epath.Path, content: bytes) -> None:
    """Writes a file, whose folder is made, whole or not at all; a link, a pipe or a device is written through.

    Raises:
      UserError: it cannot be written; a file that was there before is as it was.
    """
    temporary = path.parent / f"{path.name}.{uuid.uuid4().hex}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # epath calls a pipe a file, too
        if os.path.islink(path) or (os.path.exists(path) and not os.path.isfile(path)):
            path.write_bytes(content)
            return
        temporary.write_bytes(content)
        temporary.replace(path)
    except file_errors() as error:
        raise UserError(f"{path} cannot be written: {first_line(error)}") from None
    finally:
        with contextlib.suppress(*file_errors()):
            temporary.unlink(missing_ok=True)


def cache_folder() -> epath.Path:
    """Returns the user's cache folder for this project: decoded data, compiled programs."""
    try:
        root = epath.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # as in a container without a home
        root = epath.Path(tempfile.gettempdir())
    return root / "attn_cnn"
