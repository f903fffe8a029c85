"""Where what can be made again is kept between runs: decoded data, compiled programs."""

import os

from etils import epath


def folder() -> epath.Path:
    """Returns the user's cache folder for this project."""
    return epath.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "attn_cnn"
