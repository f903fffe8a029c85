"""What the commands share: the --config flag, the log, and errors that read as one message."""

import contextlib
import itertools
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable

import jax
from absl import app, flags
from etils import epath
from ml_collections import config_flags

from attn_cnn import cache, model
from attn_cnn.errors import Stopped, UserError
from attn_cnn.training import experiment


def run(main: Callable) -> None:
    """Runs `main` as absl's app.run does, with the flag --config, checked, in FLAGS.config.

    A UserError is printed alone and exits with 1, a run that a signal stopped with 128 + its number.
    """
    config_flags.DEFINE_config_file("config", None, "A file of configs/, with a scale after a colon.")
    flags.mark_flag_as_required("config")
    try:
        app.run(main, flags_parser=_parse)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        if "RESOURCE_EXHAUSTED" in reason:
            sys.exit(f"error: out of memory; lower config.batch_size or the model's sizes. {reason}")
        if jax.process_count() == 1:
            raise
        print(f"error: another host is lost; start all again, and the run resumes. {reason}", file=sys.stderr)
        os._exit(1)  # leaving in order would wait for that host
    except Stopped as stopped:
        logging.getLogger("attn_cnn").info("%s", stopped)
        sys.exit(128 + stopped.signal)


def default_workdir() -> str:
    """Returns runs/<config name>[_<scale>] for what --config was given, as in configs/quadratic.py:digits."""
    return workdir_for(config_flags.get_config_filename(flags.FLAGS["config"]))


def workdir_for(config_argument: str) -> str:
    """Returns the default workdir of a config with its scale."""
    path, _, scale = config_argument.partition(":")
    return "runs/" + "_".join(filter(None, (epath.Path(path).stem, scale)))


def _parse(argv: list[str]) -> list[str]:
    for argument, following in itertools.pairwise([*argv, ""]):
        if named := re.match(r"--?config\.([^=]+)", argument):
            experiment.check_name(named[1])
        elif given := re.fullmatch(r"--?config(?:=(.*))?", argument):
            _check_file(following if given[1] is None else given[1])
    try:
        rest = app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:
        models = "; ".join(f"{name}: {', '.join(sorted(f))}" for name, f in model.model_fields().items())
        raise UserError(
            f"this config has no field {str(error).strip(chr(34))}. The fields of each model are {models}."
        ) from None
    experiment.checked(flags.FLAGS.config)
    _configure_log()
    _silence_orbax()
    _configure_compilation_cache()
    return rest


def _check_file(argument: str) -> None:
    path = epath.Path(argument.partition(":")[0])
    if not _is_config(path):
        known = ", ".join(sorted(p.name for p in path.parent.glob("*.py") if _is_config(p)))
        raise UserError(f"{path} is no config; {path.parent} holds {known or 'none'}.")


def _is_config(path: epath.Path) -> bool:
    return path.is_file() and b"def get_config" in path.read_bytes()


def _configure_log() -> None:
    """Logs our lines at INFO, and of the libraries, which share absl's log, what stops a run (or --verbosity asks)."""
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = flags.FLAGS["verbosity"].default = -3
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log = logging.getLogger("attn_cnn")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def _silence_orbax() -> None:
    """Keeps orbax from printing the stacks of a failed write, which is raised where it is waited for."""
    threads, callbacks = threading.excepthook, sys.unraisablehook

    def in_thread(failure):
        if not type(failure.thread).__module__.startswith("orbax"):
            threads(failure)

    def in_callback(failure):
        if str(failure.exc_value) != "Event loop is closed":
            callbacks(failure)

    threading.excepthook, sys.unraisablehook = in_thread, in_callback
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def _configure_compilation_cache() -> None:
    """Keeps compiled programs, so that the next start need not wait; JAX_COMPILATION_CACHE_DIR says where."""
    if jax.config.jax_compilation_cache_dir is None:
        folder = cache.folder() / "xla"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
