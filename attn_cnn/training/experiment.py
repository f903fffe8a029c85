"""What follows from a config: its check, model and optimizer, the state, and the sequence of what happens in a run."""

import contextlib
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
from jaxtyping import Array, Int

from attn_cnn import model as model_lib
from attn_cnn import schema
from attn_cnn.errors import UserError
from attn_cnn.heads import surgery as surgery_lib
from attn_cnn.heads.surgery import Surgery
from attn_cnn.training import checkpoint, data, devices, optim
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
    "figures.every_epochs": schema.integer(0, 100_000, default=0),
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
    if config.figures.every_epochs and not model_lib.has_heads(config.model):
        raise UserError(
            f"config.figures.every_epochs is {config.figures.every_epochs}, but this model has no heads to draw; "
            "set it to 0."
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


def precision_of(config: ml_collections.ConfigDict) -> contextlib.AbstractContextManager[None]:
    """Returns the context in which matrix products are as precise as a run's config says."""
    return jax.default_matmul_precision(config.matmul_precision)


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

    @property
    def variables(self) -> dict[str, Any]:
        """What the model is applied to."""
        return {"params": self.params, "batch_stats": self.batch_stats}


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
    model = surgery_lib.with_remaining_heads(config.model, surgery)
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
