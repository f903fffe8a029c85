"""Optimizers and learning rates: the paper's (its appendix), SGD or Adam with cosine and warm-up or steps, and Muon.

Muon (K. Jordan et al., 2024, https://kellerjordan.github.io/posts/muon) replaces the momentum of every kernel by the
nearest matrix with orthogonal rows or columns; all other parameters take Adam's steps.
"""

from collections.abc import Collection

import jax
import jax.numpy as jnp
import ml_collections
import optax

from attn_cnn import schema
from attn_cnn.errors import UserError

STEP_FACTOR = 0.1
MUON_RMS = 0.2  # of an update over the learning rate, as Adam's: one learning rate fits both (Liu et al. 2025)

FIELDS = {
    "name": schema.choice("sgd", "adam", "muon"),
    "learning_rate": schema.number(0, 1000),
    "momentum": schema.number(0, 1, below=True),
    "weight_decay": schema.number(0, 1),
    "warmup": schema.number(0, 1, below=True),
    "schedule": schema.choice("cosine", "step"),
    "decay_epochs": schema.tuple_of(
        lambda v: all(type(e) is int and e > 0 for e in v) and sorted(set(v)) == list(v),
        "increasing whole numbers, as in (80, 150)",
    ),
}


def check(optimizer: ml_collections.ConfigDict) -> None:
    """Raises UserError if `config.optimizer` has a field that its schedule ignores."""
    if optimizer.schedule == "step" and optimizer.warmup:
        raise UserError(f"config.optimizer.warmup is {optimizer.warmup}, which the step schedule ignores; set it to 0.")
    if optimizer.schedule == "cosine" and optimizer.decay_epochs:
        raise UserError(
            f"config.optimizer.decay_epochs is {optimizer.decay_epochs}, which the cosine schedule ignores; "
            "set it to () or config.optimizer.schedule to step."
        )


def create_schedule(optimizer: ml_collections.ConfigDict, steps_per_epoch: int, epochs: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step, counted from 0.

    cosine: linear from 0 over the first `warmup` of all steps, then cosine to 0.
    step: a tenth after each of `decay_epochs`.

    Raises:
      UserError: the warm-up or a decay epoch does not fit the run.
    """
    total, rate = steps_per_epoch * epochs, optimizer.learning_rate
    if optimizer.schedule == "cosine":
        warmup = round(optimizer.warmup * total)
        if warmup >= total:
            raise UserError(f"config.optimizer.warmup is {optimizer.warmup}, which leaves no step after it; lower it.")
        return optax.warmup_cosine_decay_schedule(0.0 if warmup else rate, rate, warmup, total)
    if optimizer.decay_epochs and optimizer.decay_epochs[-1] >= epochs:
        raise UserError(
            f"config.optimizer.decay_epochs is {optimizer.decay_epochs}, but the run ends after "
            f"{epochs} epochs (config.epochs)."
        )
    boundaries = {epoch * steps_per_epoch: STEP_FACTOR for epoch in optimizer.decay_epochs}
    return optax.piecewise_constant_schedule(rate, boundaries)


def create_optimizer(
    optimizer: ml_collections.ConfigDict,
    schedule: optax.ScalarOrSchedule,
    undecayed: Collection[str] = (),
    frozen: dict | None = None,
) -> optax.GradientTransformation:
    """Returns SGD with momentum, Adam with it as beta_1, or Muon with it as its own momentum and Adam's beta_1.

    Weight decay of SGD and Adam is plain L2 added to the gradient. It spares the parameters called one of `undecayed`:
    pulling a head's position to the query pixel regularises nothing. Muon, whose steps do not depend on the gradient's
    size, shrinks the kernels themselves, by learning rate times weight decay. Where `frozen`, a mask for each
    parameter, is True, the parameter stays as it is to the last bit.
    """

    descent = _descent(optimizer, schedule, undecayed)
    if frozen is None:
        return descent
    held = optax.stateless(lambda updates, _: jax.tree.map(lambda mask, u: jnp.where(mask, 0, u), frozen, updates))
    return optax.chain(descent, held)


def _descent(
    optimizer: ml_collections.ConfigDict, schedule: optax.ScalarOrSchedule, undecayed: Collection[str]
) -> optax.GradientTransformation:
    if optimizer.name == "muon":
        return optax.contrib.muon(
            schedule,
            beta=optimizer.momentum,
            weight_decay=optimizer.weight_decay,
            adam_b1=optimizer.momentum,
            muon_weight_dimension_numbers=kernel_axes,
            consistent_rms=MUON_RMS,
        )

    def decayed(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in undecayed, params)

    moments = optax.trace(optimizer.momentum) if optimizer.name == "sgd" else optax.scale_by_adam(b1=optimizer.momentum)
    return optax.chain(
        optax.add_decayed_weights(optimizer.weight_decay, mask=decayed),
        moments,
        optax.scale_by_learning_rate(schedule),
    )


def kernel_axes(params: dict) -> dict:
    """Returns, in a tree like `params`, which axes of each kernel are inputs and which outputs; None for other arrays.

    Together they make the kernel the matrix that Muon takes it for: a value map has all heads' features as inputs, a
    map to queries or keys has them as outputs.
    """

    def axes(path, array):
        if path[-1].key != "kernel":
            return None
        inputs = 1 if path[-2].key in ("query", "key") else array.ndim - 1
        return optax.contrib.MuonDimensionNumbers(tuple(range(inputs)), tuple(range(inputs, array.ndim)))

    return jax.tree_util.tree_map_with_path(axes, params)
