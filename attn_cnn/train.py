"""Training and evaluation, from config to checkpoints: the front of `training/`, to be read from top to bottom."""

import contextlib
import functools
import logging
import signal

import jax
import ml_collections
from etils import epath

from attn_cnn.errors import Stopped, UserError
from attn_cnn.heads.history import History
from attn_cnn.training import checkpoint, cluster, data, devices
from attn_cnn.training import workdir as workdir_lib
from attn_cnn.training.checkpoint import Checkpoints
from attn_cnn.training.dataset import Dataset
from attn_cnn.training.experiment import Experiment, TrainState, checked, create_experiment, precision_of, what_happens
from attn_cnn.training.loop import Loop
from attn_cnn.training.metrics import Writer
from attn_cnn.training.progress import progress_line, words
from attn_cnn.training.runs import as_left, load_config, restore
from attn_cnn.training.start import check_start, claim, newest_or_first
from attn_cnn.training.steps import create_evaluate
from attn_cnn.training.stopping import Interrupt
from attn_cnn.training.tracing import Profile

log = logging.getLogger("attn_cnn")


def train(config: ml_collections.ConfigDict, workdir: epath.PathLike, profile: bool = False) -> TrainState:
    """Trains to the end, from the newest checkpoint in `workdir` if there is one, and returns the last state.

    With `profile` a trace of a few steps goes to `workdir`/profile.

    Raises:
      UserError: the config, the data set or the workdir is not usable, or the loss is not finite.
      Stopped: one of `stopping.SIGNALS` came to this host or to another; a checkpoint of that very step is written.
    """
    config, workdir = checked(config), workdir_lib.open_workdir(workdir)
    cluster.log_devices()
    check_same_config(config)
    dataset = load_data(config)
    experiment = create_experiment(config, dataset.spec)
    with contextlib.ExitStack() as stack:
        stack.enter_context(precision_of(experiment.config))
        interrupt = stack.enter_context(Interrupt())
        check_start(experiment, workdir)
        devices.on_every_host(lambda: claim(workdir, experiment, stack) if jax.process_index() == 0 else None)
        check_same_workdir(workdir)
        checkpoints = stack.enter_context(open_checkpoints(experiment, workdir))
        experiment, step, state = newest_or_first(experiment, workdir, checkpoints)
        # A checkpoint without metrics was written on the way: at the end of an epoch, before its evaluation.
        evaluated = step == 0 or checkpoints.metrics(step) is not None
        if step == experiment.total_steps and evaluated:
            accuracy = checkpoint.accuracy(checkpoints.metrics(step))
            if profile:
                log.warning("No step is left to trace; give --profile another --workdir.")
        else:
            log.info("%s %d steps.", beginning(workdir, step), experiment.total_steps)
            writer = stack.enter_context(Writer(workdir / "metrics", step, evaluated))
            heads = devices.on_every_host(functools.partial(open_history, workdir, step, evaluated))
            profiler = stack.enter_context(Profile(workdir / "profile" if profile else None))
            bar = stack.enter_context(progress_line(step, experiment.total_steps))
            loop = Loop(experiment, state, dataset, checkpoints, writer, heads, interrupt, profiler, bar)
            loop.run(what_happens(experiment, step, evaluated))
            state, accuracy = loop.state, loop.test["accuracy"]
    steps, split = experiment.total_steps, experiment.evaluated_on
    log.info("%s is finished: %d steps, %s accuracy %.4f.", workdir, steps, split, accuracy)
    return state


def beginning(workdir: epath.Path, step: int) -> str:
    """Returns the words with which the log says that a run begins, or goes on after `step`."""
    return f"Resuming {workdir} at step {step} of" if step else f"Starting {workdir}:"


def open_checkpoints(experiment: Experiment, workdir: epath.Path) -> Checkpoints:
    """Returns the checkpoints of a run, which keep as many as its config says."""
    config = experiment.config.checkpoint
    history_steps = config.history_epochs * experiment.steps_per_epoch
    return Checkpoints(workdir / workdir_lib.CHECKPOINTS, config.keep, history_steps=history_steps)


def open_history(workdir: epath.Path, step: int, evaluated: bool) -> History | None:
    """Returns the numbers of the run's heads so far; on several hosts process 0 has them."""
    return History(workdir, step, evaluated) if jax.process_index() == 0 else None


def load_data(config: ml_collections.ConfigDict) -> Dataset:
    """Loads the data set on every host; first on process 0, so that where they share a disk only one prepares it."""
    load = functools.partial(data.load_part, config.data)
    first = devices.on_every_host(lambda: load() if jax.process_index() == 0 else None)
    dataset = devices.on_every_host(lambda: first or load())
    check_same_data(dataset)
    return dataset


def check_same_config(config: ml_collections.ConfigDict) -> None:
    """Raises UserError unless all hosts were given the same config."""
    if not devices.agree(config.to_json().encode()):
        raise UserError("the hosts were given different configs; start all of them with the same command.")


def check_same_data(dataset: Dataset) -> None:
    """Raises UserError unless all hosts loaded the same images and labels, in the same order."""
    *arrays, spec = dataset
    if not devices.agree(spec.to_json().encode(), *arrays):
        raise UserError("the hosts loaded different data; give all of them the same files, in the same order.")


def check_same_workdir(workdir: epath.Path) -> None:
    """Raises UserError unless all hosts see the workdir, which the first has claimed."""
    if not devices.everywhere((workdir / workdir_lib.CONFIG).exists()).all():
        raise UserError(f"not all hosts see {workdir}, where the first wrote; set --workdir to what all of them reach.")


def check_same_run(config: ml_collections.ConfigDict, workdir: epath.Path, only: tuple[str, ...]) -> None:
    """Raises UserError unless `workdir` holds a run like `config` in the fields that begin with one of `only`."""
    if not (workdir / workdir_lib.CONFIG).exists():
        raise UserError(f"{workdir} holds no run; train one first, or set --workdir.")
    workdir_lib.check_config(workdir, config, load_config(workdir), only)


def evaluate(
    config: ml_collections.ConfigDict, workdir: epath.PathLike, step: int | str = "newest"
) -> dict[str, float]:
    """Returns loss and accuracy of a checkpoint in `workdir` ("newest", "best" or a step) on the test set.

    That is the test set also where a part of the training set was held out.

    Raises:
      UserError: there is no checkpoint, or it is of another config.
      Stopped: one of `stopping.SIGNALS` came.
    """
    config, workdir = checked(config), workdir_lib.open_workdir(workdir)
    fields = ("model.", "data.", "dtype", "matmul", "optimizer.name", "freeze")
    devices.on_every_host(lambda: check_same_run(config, workdir, fields))
    config.data.validation_fraction = 0.0
    dataset = load_data(config)
    parts = ("image_shape", "mean", "std", "names")
    devices.on_every_host(lambda: workdir_lib.check_data(workdir, dataset.spec, only=parts))
    experiment = as_left(create_experiment(config, dataset.spec), workdir)
    step, state = restore(experiment, workdir, step)
    images, labels = devices.replicate((dataset.test_images, dataset.test_labels))
    with Interrupt() as interrupt, precision_of(experiment.config):
        results = create_evaluate(experiment, images, labels, interrupt)(devices.replicate(state))
    if results is None:
        raise Stopped("evaluation stopped.", interrupt.signal or signal.SIGTERM)
    log.info("%s, step %d: %s", workdir, step, words("test", results))
    return results
