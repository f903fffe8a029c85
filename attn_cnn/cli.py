"""What the commands share: the --config flag, the log, and errors that read as one message."""

import contextlib
import functools
import itertools
import logging
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
from absl import app, flags
from etils import epath
from ml_collections import config_flags

from attn_cnn import model, paths, schema
from attn_cnn.errors import Stopped, UserError, first_line
from attn_cnn.training import experiment


def run(main: Callable, arguments: tuple[str, ...] = (), config: bool = True) -> None:
    """Runs `main` as absl's app.run does, after checking FLAGS.config.

    A UserError is printed alone and exits with 1, a run that a signal stopped with 128 + its number.

    Args:
      main: is given the command line without its flags.
      arguments: names of what must stand there beside the flags, as in ("CHECKPOINT",).
      config: whether the command takes --config.
    """
    if config:
        config_flags.DEFINE_config_file("config", None, "A file of configs/, with a scale after a colon.")
        flags.mark_flag_as_required("config")
    try:
        app.run(main, flags_parser=functools.partial(_parse, arguments=arguments))
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)  # so that a shell's loop over runs stops, too
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        if "RESOURCE_EXHAUSTED" in reason:
            advice = (
                "set config.micro_batch_size to a part of the batch (for a ResNet, lower config.batch_size), or lower "
                "config.eval_batch_size if it was an evaluation"
            )
            otherwise = "use a device with more, or the CPU (JAX_PLATFORMS=cpu)"
            sys.exit(f"error: out of memory; {advice if config else otherwise}. {reason}")
        if jax.process_count() == 1:
            raise
        print(f"error: a host or device is lost; start all again, and the run resumes. {reason}", file=sys.stderr)
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


def define_step() -> None:
    """Defines the flag --step, of commands that read a run."""
    flags.DEFINE_string("step", "newest", 'Which checkpoint: "newest", "best" by its measured accuracy, or a step.')


def step() -> int | str:
    """Returns what --step was given, as `load_run` takes it; raises UserError where that is no step."""
    value = flags.FLAGS.step
    if value in ("newest", "best"):
        return value
    if not value.isdigit():
        raise UserError(f"--step is {value!r}; it must be newest, best, or the step of a checkpoint.")
    return int(value)


def check_command(chosen: str, commands: Sequence[str], goes_with: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError if `chosen` is none of the `commands`, or a flag was given that does not go with it."""
    if chosen not in commands:
        raise UserError(f"{chosen!r} is no command; the commands are {', '.join(commands)}.")
    check_goes_with(chosen, goes_with)


def check_goes_with(chosen: str, goes_with: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError if a flag was given that goes with other commands than the `chosen` one.

    Args:
      chosen: the command, as it is written.
      goes_with: the commands that a flag goes with, by its name; a flag that is not named goes with all.
    """
    for name, takers in goes_with.items():
        if chosen not in takers:
            refuse((name,), f"goes with {' or '.join(takers)}, not with {chosen}")


def check_source(reader: str, of_runs: Iterable[str]) -> None:
    """Raises UserError unless just one of --workdir and --maps was given, or a flag that --maps does not go with was.

    Args:
      reader: what reads it, for the message, as in "report".
      of_runs: names of the flags that go with --workdir alone.
    """
    of_run, of_file = bool(flags.FLAGS.workdir), flags.FLAGS.maps is not None
    if not of_run and not of_file:
        raise UserError(f"{reader} needs --workdir=RUN, or --maps=FILE in its place.")
    if of_run and of_file:
        raise UserError(f"{reader} is of --workdir or of --maps, and both are given; leave one of them out.")
    if of_file:
        refuse(of_runs, "goes with --workdir, not with --maps")


def refuse(names: Iterable[str], reason: str) -> None:
    """Raises UserError if one of the flags was given, since it `reason`, as in "goes with report, not with prune"."""
    for name in names:
        if flags.FLAGS[name].present:
            raise UserError(f"--{name} {reason}.")


def _parse(argv: list[str], arguments: tuple[str, ...]) -> list[str]:
    for argument, following in itertools.pairwise([*argv, ""]):
        if named := re.match(r"--?config\.([^=]+)", argument):
            experiment.check_name(named[1])
        elif given := re.fullmatch(r"--?config(?:=(.*))?", argument):
            _check_file(following if given[1] is None else given[1])
    try:
        rest = app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:
        field = str(error).strip("\"'")
        if not any(field in word.partition("=")[0].split(".") for word in argv):
            frames = traceback.extract_tb(error.__traceback__)
            place = next((f for f in reversed(frames) if f.name in ("get_config", "<module>")), frames[-1])
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"the config cannot be read; {place.filename}, line {place.lineno}: {reason}") from None
        models = [name for name, fields in model.model_fields().items() if field in fields]
        raise UserError(
            f"this config has no field {field!r}"
            + (f"; configs whose config.model.name is {' or '.join(models)} have it." if models else ".")
        ) from None
    _check_arguments(argv, rest[1:], arguments)
    if "config" in flags.FLAGS:
        experiment.checked(flags.FLAGS.config)
    _configure_log()
    _silence_orbax()
    _configure_compilation_cache()
    return rest


def _check_arguments(argv: list[str], given: list[str], wanted: tuple[str, ...]) -> None:
    """Raises UserError unless just `wanted` was given beside the flags; absl hands on what it does not understand."""
    if len(given) < len(wanted):
        raise UserError(f"{wanted[len(given)]} is missing; the command takes {' and '.join(wanted)} beside its flags.")
    for word in given[len(wanted) :]:
        before, name = argv[argv.index(word) - 1], word.partition("=")[0]
        if before.startswith("--") and "=" not in before:
            raise UserError(f"{word!r} stands alone after {before}; write {before}={word}.")
        if "=" in word and (name in flags.FLAGS or name.startswith("config.")):
            raise UserError(f"{word!r} is not understood; write --{word}.")
        raise UserError(f"{word!r} is not understood; flags begin with --, as in --workdir=runs/mine.")


def _check_file(argument: str) -> None:
    name, colon, scale = argument.partition(":")
    path = paths.resolve(name, "--config")
    if _is_config(path):
        return
    folder = path.parent if path.parent != epath.Path(".") else epath.Path("configs")
    known = {p.stem: p for p in sorted(folder.glob("*.py")) if _is_config(p)}
    if meant := schema.nearest(path.stem, known):
        raise UserError(f"{path} is no config; did you mean --config={known[meant]}{colon}{scale}?")
    raise UserError(f"{path} is no config; {folder} holds {', '.join(p.name for p in known.values()) or 'none'}.")


def _is_config(path: epath.Path) -> bool:
    return path.is_file() and b"def get_config" in path.read_bytes()


def _configure_log() -> None:
    """Logs our lines at INFO, and of the libraries, which share absl's log, what stops a run (or --verbosity asks)."""
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = flags.FLAGS["verbosity"].default = -3  # type: ignore[assignment]  # absl gives no type
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
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]  # options are made at run time
        folder = paths.cache_folder() / "xla"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
