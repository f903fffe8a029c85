"""How a run starts or goes on: its workdir is claimed, and its first state is random or another run's, heads chosen."""

import contextlib
import functools
import logging
from typing import NamedTuple

import jax
from etils import epath
from flax import traverse_util

from attn_cnn.errors import UserError
from attn_cnn.heads import measure
from attn_cnn.heads import surgery as surgery_lib
from attn_cnn.heads.surgery import Surgery
from attn_cnn.training import devices
from attn_cnn.training import workdir as workdir_lib
from attn_cnn.training.checkpoint import Checkpoints
from attn_cnn.training.experiment import (
    Experiment,
    TrainState,
    abstract_state,
    begins,
    create_experiment,
    random_state,
    state_of,
)
from attn_cnn.training.runs import as_left, load_config, load_run

log = logging.getLogger("attn_cnn")

DONE = {"prune": "Pruned", "reset": "Reset"}


def claim(workdir: epath.Path, experiment: Experiment, stack: contextlib.ExitStack) -> None:
    """Holds `workdir` until `stack` closes, with the config as it is now.

    Raises:
      UserError: the workdir is another process's, or holds a run of another config.
    """
    workdir_lib.claim(workdir, experiment.config, stack)
    theirs = load_config(workdir)
    workdir_lib.check_config(workdir, experiment.config, theirs)
    workdir_lib.check_data(workdir, experiment.spec)
    if experiment.config.to_dict() != theirs.to_dict():
        workdir_lib.update(workdir, experiment.config, stack)
    if workdir_lib.read_spec(workdir) is None:
        workdir_lib.write_spec(workdir, experiment.spec)


def check_start(experiment: Experiment, workdir: epath.Path) -> None:
    """Raises UserError if a new run cannot start from the one that it names, before it leaves anything in `workdir`."""
    new = not devices.everywhere((workdir / workdir_lib.CONFIG).exists()).any()
    if new and experiment.config.init_from:
        first_state(experiment)


def newest_or_first(
    experiment: Experiment, workdir: epath.Path, checkpoints: Checkpoints
) -> tuple[Experiment, int, TrainState]:
    """Returns the run with the heads that it has left, and step and state: of its newest checkpoint, or of its start.

    A start from another run is saved, since that run may be gone the next time.
    """
    experiment = as_left(experiment, workdir)
    if restored := checkpoints.restore(abstract_state(experiment)):
        return experiment, *restored
    started = first_state(experiment)
    if experiment.config.init_from:
        log_degenerate(experiment, started.degenerate)
        # The heads come first: the checkpoint is read in their shapes.
        write = functools.partial(workdir_lib.write_surgery, started.surgery, workdir)
        devices.on_every_host(lambda: write() if jax.process_index() == 0 else None)
        checkpoints.save(0, started.state)
    return started.experiment, 0, started.state


class Start(NamedTuple):
    """How a run starts.

    Attributes:
      experiment: the run, with the heads that remain.
      state: its state before the first step.
      surgery: what became of the heads that its config asks for; None: nothing.
      degenerate: of each layer, the degenerate heads of the run it starts from that were pruned or reset, with the
        reason.
    """

    experiment: Experiment
    state: TrainState
    surgery: Surgery | None
    degenerate: dict[int, dict[int, str]]


def first_state(experiment: Experiment) -> Start:
    """Returns the start of a run: random, or with the parameters of the run that `init_from` names.

    Where that run has lost heads, so has this one. Then degenerate heads are pruned or reset.

    Raises:
      UserError: that run cannot be read, or its parameters do not fit.
    """
    config = experiment.config
    if not config.init_from:
        return Start(experiment, random_state(experiment), None, {})
    workdir = workdir_lib.open_workdir(config.init_from)
    given = devices.on_every_host(lambda: load_config(workdir))  # all of them see it
    surgery = devices.on_every_host(lambda: workdir_lib.read_surgery(workdir))
    if surgery:
        same_model = given.model.name == config.model.name
        same_heads = same_model and surgery_lib.untouched(given.model) == surgery_lib.untouched(config.model)
        surgery = surgery.with_reset({}) if same_heads else None
    experiment, other = create_experiment(config, experiment.spec, surgery), load_run(config.init_from)
    state = random_state(experiment)
    variables = started_from(state.variables, other.variables, config.init_from, config.init_except)
    if config.degenerate_heads == "keep":
        return Start(experiment, state_of(experiment, variables), surgery, {})
    return without_degenerate(experiment, variables, surgery)


def without_degenerate(experiment: Experiment, variables: dict, surgery: Surgery | None) -> Start:
    """Returns the start of a run from `variables`, with degenerate heads pruned or reset as its config says."""
    config, model, params = experiment.config, experiment.model_config, variables["params"]
    degenerate = measure.degenerate(experiment.model, params, model.image_shape)
    surgery = surgery or surgery_lib.untouched(config.model)
    if config.degenerate_heads == "prune":
        surgery, params = surgery.pruned(degenerate), surgery_lib.prune(params, model, degenerate)
    else:
        surgery = surgery.with_reset(degenerate)
        params = surgery_lib.reset(params, random_state(experiment).params, model, degenerate)
    experiment = create_experiment(config, experiment.spec, surgery)
    return Start(experiment, state_of(experiment, variables | {"params": params}), surgery, degenerate)


def started_from(ours: dict, theirs: dict, workdir: str, fresh: tuple[str, ...]) -> dict:
    """Returns the variables `theirs`, of the run in `workdir`, but for those of `ours` whose paths begin with `fresh`.

    Raises:
      UserError: variables are missing, left over or of another shape, or a name in `fresh` is nobody's.
    """

    def flat(variables):
        return {path[1:]: (path, leaf) for path, leaf in traverse_util.flatten_dict(variables).items()}

    ours, theirs = flat(ours), flat(theirs)
    unknown = [name for name in fresh if not any(begins(path, (name,)) for path in ours | theirs)]
    problems = [f"config.init_except names {name}, which is no parameter" for name in unknown]
    result = {}
    for path, (whole_path, leaf) in ours.items():
        _, other = theirs.get(path, (None, None))
        if begins(path, fresh):
            other = leaf
        elif other is None:
            problems.append(f"{'/'.join(path)} is missing there")
            continue
        elif other.shape != leaf.shape:
            problems.append(f"{'/'.join(path)} has shape {other.shape} there, {leaf.shape} here")
        result[whole_path] = other
    problems += [
        f"{'/'.join(path)} is left over there" for path in theirs if path not in ours and not begins(path, fresh)
    ]
    if problems:
        raise UserError(
            f"the run in {workdir} does not fit (config.init_from); change config.model, or name what starts afresh in "
            "config.init_except:\n  " + "\n  ".join(problems)
        )
    return {"batch_stats": {}} | traverse_util.unflatten_dict(result)


def log_degenerate(experiment: Experiment, degenerate: dict[int, dict[int, str]]) -> None:
    """Logs what became of the degenerate heads of the run that this one starts from."""
    treatment = experiment.config.degenerate_heads
    for layer, heads in degenerate.items():
        for head, reason in heads.items():
            log.info("%s layer %d, head %d: %s.", DONE[treatment], layer, head, reason)
    if treatment != "keep" and not any(degenerate.values()):
        log.info("No head of %s is degenerate: all remain.", experiment.config.init_from)
