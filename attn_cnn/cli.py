"""What the commands share: the --config flag, the log, and errors that read as one message."""

import logging
import re
import sys
from collections.abc import Callable

from absl import app, flags
from etils import epath
from ml_collections import config_flags

from attn_cnn import config as config_lib
from attn_cnn.errors import Stopped, UserError

config_flags.DEFINE_config_file("config", None, "A file of configs/, with a scale after a colon.")
flags.mark_flag_as_required("config")


def run(main: Callable) -> None:
    """absl's app.run, with a checked config in FLAGS.config; a UserError is printed alone and exits with 1, a run that
    a signal stopped with 128 + its number."""
    try:
        app.run(main, flags_parser=_parse)
    except UserError as error:
        sys.exit(f"error: {error}")
    except Stopped as stopped:
        logging.getLogger("attn_cnn").info("%s", stopped)
        sys.exit(128 + stopped.signal)


def config_name() -> str:
    """What --config was given, scale included."""
    return config_flags.get_config_filename(flags.FLAGS["config"])


def _parse(argv: list[str]) -> list[str]:
    for argument in argv:
        if named := re.match(r"--?config\.([^=]+)", argument):
            config_lib.check_name(named[1])
        if given := re.match(r"--?config=([^:]*)", argument):
            path = epath.Path(given[1])
            if not path.is_file():
                known = ", ".join(sorted(p.name for p in path.parent.glob("*.py"))) or "nothing"
                raise UserError(f"there is no config {path}; {path.parent} holds {known}.")
    try:
        rest = app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:
        raise UserError(f"this config has no field {str(error).strip(chr(34))}.") from None
    config_lib.check(flags.FLAGS.config)
    _configure_log()
    return rest


def _configure_log() -> None:
    """Our lines at INFO; of the libraries, which share absl's log, what stops a run (or what --verbosity asks)."""
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = flags.FLAGS["verbosity"].default = -2
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log = logging.getLogger("attn_cnn")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
