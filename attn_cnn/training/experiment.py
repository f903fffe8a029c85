"""What follows from a config: its check, model and optimizer, the state, and the sequence of what happens in a run."""

import enum
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from etils import epath
from flax import traverse_util
from jaxtyping import Array, Int

from attn_cnn import model as model_lib
from attn_cnn import schema
from attn_cnn.errors import UserError
from attn_cnn.heads import measure
from attn_cnn.heads import surgery as surgery_lib
from attn_cnn.heads.surgery import Surgery
from attn_cnn.training import checkpoint, data, devices, optim
from attn_cnn.training import workdir as workdir_lib
from attn_cnn.training.dataset import Spec

FIELDS = {
    "seed": schema.integer(0, 2**31 - 1),
    "epochs": schema.integer(1, 100_000),
    "batch_size": schema.integer(1, 1_000_000),
    "eval_batch_size": schema.integer(1, 10_000),
    "micro_batch_size": schema.integer(0, 1_000_000, default=0),
    "log_every_steps": schema.integer(1, 1_000_000),
    "dtype": schema.choice("float32", "bfloat16"),
    "matmul_precision": schema.choice("default", "high", "highest"),
    "label_smoothing": schema.number(0, 1, below=True, default=0.0),
    "condition_penalty": schema.number(0, 1e6, default=0.0),
    "init_from": schema.text(default=""),
    "init_except": schema.tuple_of(
        lambda v: all(type(name) is str and name for name in v),
        "names of parameters, as in ('classifier',)",
        default=(),
    ),
    **surgery_lib.FIELDS,
    **{f"data.{name}": field for name, field in data.FIELDS.items()},
    **{f"optimizer.{name}": field for name, field in optim.FIELDS.items()},
    **{f"checkpoint.{name}": field for name, field in checkpoint.FIELDS.items()},
}


def checked(config: ml_collections.ConfigDict, spec: Spec | None = None) -> ml_collections.ConfigDict:
    """Returns the config, with defaults where fields are missing; `spec` is of its data, where that is loaded.

    Raises:
      UserError: the config does not describe a run; the message names field, value and choices.
    """
    config = schema.completed(config, FIELDS)
    values = schema.flatten(config)
    schema.check({k: v for k, v in values.items() if not k.startswith("model.")}, FIELDS, "config.")
    if "model" not in config:
        raise UserError("config.model is missing.")
    config.model = model_lib.checked_model(config.model)
    data.check(config, spec)
    optim.check(config.optimizer)
    check_penalty(config.condition_penalty, config.model)
    surgery_lib.check(config)
    if config.checkpoint.history_epochs % config.checkpoint.every_epochs:
        raise UserError(
            f"config.checkpoint.history_epochs is {config.checkpoint.history_epochs}, but only every "
            f"{config.checkpoint.every_epochs} epochs there is a checkpoint (every_epochs); set it to a multiple."
        )
    if config.micro_batch_size and config.model.name == "resnet18":
        raise UserError(
            f"config.micro_batch_size is {config.micro_batch_size}, but the ResNet normalises with the statistics of "
            "its whole batch, which pieces do not have; set it to 0 and lower config.batch_size."
        )
    if config.init_except and not config.init_from:
        raise UserError(
            f"config.init_except is {config.init_except}, but the run starts from no other; set config.init_from."
        )
    return config


def check_penalty(penalty: float, model: ml_collections.ConfigDict) -> None:
    """Raises UserError if there is a penalty on condition numbers, but no head of the model has one."""
    if penalty and not model_lib.has_penalty(model):
        raise UserError(
            f"config.condition_penalty is {penalty}, but no head of this model has a condition number to penalise; "
            "set it to 0."
        )


def check_name(name: str) -> None:
    """Raises UserError unless `name`, as in "model.heads", is a field of some config or holds fields."""
    model = {f"model.{field}" for fields in model_lib.model_fields().values() for field in fields}
    known = set(FIELDS) | model | {"model.name"}
    if not any(field == name or field.startswith(f"{name}.") for field in known):
        raise UserError(f"unknown field config.{name}; {schema.suggestion(name, known, 'config.')}")


def load_config(workdir: epath.Path) -> ml_collections.ConfigDict:
    """Returns the config of the run in `workdir`, with defaults for fields that came after it.

    Raises:
      UserError: there is no run, or its config was damaged or changed.
    """
    path = workdir / workdir_lib.CONFIG
    if not path.exists():
        raise UserError(f"{workdir} holds no run; train one first, or name the workdir of one.")
    config = workdir_lib.read_config(path)
    try:
        return checked(config)
    except UserError as error:
        raise UserError(f"{path} was changed: {error}") from None


class Sums(flax.struct.PyTreeNode):
    """Sums over steps of what is logged as means; they are in the state, so that a resumed run logs the same.

    The fields are float32 scalars, or what stands for them in an abstract state.
    """

    steps: Any
    loss: Any
    accuracy: Any

    def add(self, restart: Array, loss: Array, accuracy: Array) -> "Sums":
        """Returns the sums with one step more, or of that step alone where they `restart`."""
        new = Sums(jnp.float32(1), loss, accuracy)
        return jax.tree.map(lambda old, new: jnp.where(restart, 0, old) + new, self, new)

    def means(self) -> dict[str, float]:
        """Returns the means over the steps that were added."""
        return {"loss": float(self.loss / self.steps), "accuracy": float(self.accuracy / self.steps)}


class TrainState(flax.struct.PyTreeNode):
    """Everything that a run needs to go on, bit for bit.

    Attributes:
      step: steps done, int32.
      params: the model's parameters.
      batch_stats: the ResNet's running statistics.
      opt_state: the optimizer's state.
      window: sums since metrics were last written.
      epoch: sums since the epoch began.
      first_bad_step: the first step, from 1, whose loss, gradients or parameters were not finite; or 0.
    """

    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any
    window: Sums
    epoch: Sums
    first_bad_step: Any


class Experiment(NamedTuple):
    """What follows from a config alone, or from it and what became of its heads.

    Attributes:
      config: the config as it was given.
      model_config: its model, with the heads that remain.
      spec: the data set.
      model: the Flax module.
      schedule: the learning rate by step.
      optimizer: how gradients change parameters.
      steps_per_epoch: steps of an epoch.
      total_steps: steps of the run.
    """

    config: ml_collections.ConfigDict
    model_config: ml_collections.ConfigDict
    spec: Spec
    model: nn.Module
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    steps_per_epoch: int
    total_steps: int

    @property
    def evaluated_on(self) -> str:
        """What the run is evaluated on while it trains: "validation", the images that are held out, or "test"."""
        return "validation" if self.config.data.validation_fraction else "test"

    @property
    def pieces(self) -> int:
        """Equal pieces of the batch whose gradients are added up one after another."""
        return math.ceil(self.config.batch_size / (self.config.micro_batch_size or self.config.batch_size))

    def batch(self, step: int) -> Int[np.ndarray, "global_batch"]:
        """Returns the indices of the examples that the step after `step` trains on."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        order = data.epoch_order(self.config.seed, epoch, self.spec.train_size)
        return order[batch * self.config.batch_size : (batch + 1) * self.config.batch_size]


def create_experiment(
    config: ml_collections.ConfigDict, spec: Spec | None = None, surgery: Surgery | None = None
) -> Experiment:
    """Returns what follows from `config`.

    Args:
      config: the config.
      spec: what is known of its data; None: the data is loaded, where only that tells.
      surgery: what became of the heads that the config asks for; None: nothing.

    Raises:
      UserError: the config does not describe a run, or its state is larger than a device's memory.
    """
    config = checked(config, spec)
    if spec is None:
        spec = data.known_spec(config.data) or data.load_part(config.data).spec
        config = checked(config, spec)
    model = surgery_lib.operated(config.model, surgery)
    check_penalty(config.condition_penalty, model)
    steps_per_epoch = spec.train_size // config.batch_size
    schedule = optim.create_schedule(config.optimizer, steps_per_epoch, config.epochs)
    experiment = Experiment(
        config=config,
        model_config=model,
        spec=spec,
        model=model_lib.create_model(model, config.dtype, devices.AXIS),
        schedule=schedule,
        optimizer=optim.create_optimizer(
            config.optimizer, schedule, model_lib.undecayed(model), frozen_parameters(config, model, surgery)
        ),
        steps_per_epoch=steps_per_epoch,
        total_steps=steps_per_epoch * config.epochs,
    )
    devices.check_memory(sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(abstract_state(experiment))))
    return experiment


def frozen_parameters(
    config: ml_collections.ConfigDict, model: ml_collections.ConfigDict, surgery: Surgery | None
) -> dict | None:
    """Returns masks of what config.freeze keeps as it is in the parameters of `model`; None: nothing."""
    if config.freeze == "none":
        return None
    return surgery_lib.frozen(model, config.freeze, surgery, functools.partial(begins, names=config.init_except))


def begins(path: tuple[str, ...], names: tuple[str, ...]) -> bool:
    """Returns whether a parameter's path begins with one of `names`, as in ("layer_0/attention",)."""
    return any(path[: len(name.split("/"))] == tuple(name.split("/")) for name in names)


def abstract_state(experiment: Experiment) -> TrainState:
    """Returns shapes and dtypes of the state; nothing is computed."""
    return jax.eval_shape(functools.partial(random_state, experiment))


def random_state(experiment: Experiment) -> TrainState:
    """Returns the state before the first step, a function of the seed."""

    @jax.jit
    def init(key):
        return experiment.model.init(key, jnp.zeros((1, *experiment.spec.image_shape)))

    return state_of(experiment, init(jax.random.key(experiment.config.seed)))


def state_of(experiment: Experiment, variables: dict, step: int = 0) -> TrainState:
    """Returns the state of a run with the given `variables` and a fresh optimizer, as if `step` steps were done."""

    def counts_steps(part: Any) -> bool:
        return isinstance(part, optax.ScaleByScheduleState)

    @jax.jit  # every array in a buffer of its own, since a step overwrites them
    def state(variables):
        opt_state = jax.tree.map(
            lambda part: part._replace(count=jnp.int32(step)) if counts_steps(part) else part,
            experiment.optimizer.init(variables["params"]),
            is_leaf=counts_steps,
        )
        zero = Sums(*[jnp.float32(0)] * 3)
        return TrainState(
            step=jnp.int32(step),
            params=variables["params"],
            batch_stats=variables.get("batch_stats", {}),
            opt_state=opt_state,
            window=zero,
            epoch=zero,
            first_bad_step=jnp.int32(0),
        )

    return state(variables)


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
    ours = {"params": state.params, "batch_stats": state.batch_stats}
    theirs = {"params": other.params, "batch_stats": other.batch_stats}
    variables = started_from(ours, theirs, config.init_from, config.init_except)
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


class Next(enum.Enum):
    """What can come next in a run."""

    TRAIN = "train"  # a step
    REPORT = "report"  # the metrics since the last time
    EVALUATE = "evaluate"  # on the test set, or on what is held out
    SAVE = "save"  # a checkpoint


def what_happens(experiment: Experiment, step: int, evaluated: bool) -> Iterator[tuple[Next, int]]:
    """Yields what comes next, and the number of steps done when it has come, from `step` to the end of the run.

    Metrics are reported every `log_every_steps` of an epoch and at its end; an epoch ends with an evaluation and, every
    `checkpoint.every_epochs` and at the end of the run, a checkpoint.

    Args:
      experiment: the run.
      step: steps done.
      evaluated: whether the epoch that ends with `step` has been evaluated.
    """
    config, of_epoch = experiment.config, experiment.steps_per_epoch
    while True:
        if step and step % of_epoch == 0 and not evaluated:
            yield Next.EVALUATE, step
            if step // of_epoch % config.checkpoint.every_epochs == 0 or step == experiment.total_steps:
                yield Next.SAVE, step
        if step == experiment.total_steps:
            return
        step, evaluated = step + 1, False
        yield Next.TRAIN, step
        batch = (step - 1) % of_epoch + 1
        if batch % config.log_every_steps == 0 or batch == of_epoch:
            yield Next.REPORT, step


class Run(NamedTuple):
    """A run as it is found in its workdir.

    Attributes:
      model: the Flax module.
      params: its parameters.
      batch_stats: the ResNet's running statistics, else {}.
      config: the run's config, its model with the heads that remain.
      mean: mean of each channel of the images, scaled to [0, 1], for `augment.normalize`.
      std: standard deviation of each channel.
      step: steps that were done.
      spec: what else is known of the run's data: the classes' names, the number of images.
    """

    model: nn.Module
    params: Any
    batch_stats: Any
    config: ml_collections.ConfigDict
    mean: tuple[float, ...]
    std: tuple[float, ...]
    step: int
    spec: Spec


def load_run(workdir: epath.PathLike, step: int | str = "newest") -> Run:
    """Opens the run in `workdir`; nothing there changes.

    Args:
      workdir: the folder of a run.
      step: "newest", "best" (by accuracy on the test set, or on what is held out), or the step of a checkpoint.

    Raises:
      UserError: there is no run, or no such checkpoint of it, or it cannot be read.
    """
    workdir = workdir_lib.open_workdir(workdir)
    experiment = create_experiment(
        load_config(workdir), workdir_lib.read_spec(workdir), workdir_lib.read_surgery(workdir)
    )
    step, state = restore(experiment, workdir, step)
    config = experiment.config.copy_and_resolve_references()
    with config.ignore_type():
        config.model = experiment.model_config
    return Run(
        model=model_lib.create_model(config.model, config.dtype),
        params=state.params,
        batch_stats=state.batch_stats,
        config=config,
        mean=experiment.spec.mean,
        std=experiment.spec.std,
        step=step,
        spec=experiment.spec,
    )


def restore(experiment: Experiment, workdir: epath.Path, step: int | str = "newest") -> tuple[int, TrainState]:
    """Reads a checkpoint of the run in `workdir`; nothing there changes.

    Raises:
      UserError: there is none, or none that can be read.
    """
    with checkpoint.Checkpoints(workdir / workdir_lib.CHECKPOINTS, read_only=True) as checkpoints:
        restored = checkpoints.restore(abstract_state(experiment), step)
    if restored is None:
        raise UserError(f"{workdir} holds no checkpoint yet; train until its first one.")
    return restored
