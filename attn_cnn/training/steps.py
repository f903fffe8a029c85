"""The training and the evaluation step, written for one device and compiled for all.

The data lies on the devices as uint8. A step gathers its examples by index, augments and normalises them; nothing but
the indices goes from host to device.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from attn_cnn.heads.measure import IMAGES, Numbers, measure, stacked
from attn_cnn.model import has_heads, kinds_and_heads
from attn_cnn.training import augment, devices
from attn_cnn.training.experiment import Experiment, TrainState
from attn_cnn.training.stopping import Interrupt, Vote


class Inputs(NamedTuple):
    """What a step is given, the same on every device.

    Attributes:
      images: a whole split of the data set.
      labels: its labels.
      indices: for training, the examples of the global batch; for evaluation, the first example of the batch.
    """

    images: UInt8[Array, "examples height width channels"]
    labels: Int[Array, "examples"]
    indices: Int[Array, "*global_batch"]


def train_step(
    state: TrainState, inputs: Inputs, places: Int[Array, "pieces share"], *, experiment: Experiment
) -> tuple[TrainState, Float[Array, ""]]:
    """Makes one update from this device's `places` in the batch, with gradients summed over devices.

    Places of -1 are no images: they count for nothing. Returns the state after the step, and the loss.
    """
    config = experiment.config
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    sums = functools.partial(gradients, pieces=len(places), state=state, inputs=inputs, key=key, experiment=experiment)
    if len(places) == 1:
        grads, loss, accuracy, batch_stats = sums(places[0], 0)
    else:
        grads, loss, accuracy, batch_stats = sum_over_pieces(sums, (places, jnp.arange(len(places))))
    grads, loss, accuracy = jax.lax.psum((grads, loss, accuracy), devices.AXIS)
    with jax.named_scope("optimizer"):
        updates, opt_state = experiment.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    bad = ~jnp.isfinite(loss + optax.tree.norm(grads) + optax.tree.norm(params))
    batch_of_epoch = state.step % experiment.steps_per_epoch
    state = state.replace(
        step=state.step + 1,
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        window=state.window.add(batch_of_epoch % config.log_every_steps == 0, loss, accuracy),
        epoch=state.epoch.add(batch_of_epoch == 0, loss, accuracy),
        first_bad_step=jnp.where((state.first_bad_step == 0) & bad, state.step + 1, state.first_bad_step),
    )
    return state, loss


def sum_over_pieces(of_piece: Callable[..., Any], pieces: Any) -> Any:
    """Returns the sum of `of_piece(*piece)`, a tree, over the leading axis of `pieces`, one piece after another."""

    def add(total, piece):
        return jax.tree.map(jnp.add, total, of_piece(*piece)), None

    first = jax.eval_shape(of_piece, *jax.tree.map(lambda a: a[0], pieces))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), first)
    return jax.lax.scan(add, zeros, pieces)[0]


def gradients(
    places: Int[Array, "share"],
    piece: Int[Array, ""] | int,
    *,
    pieces: int,
    state: TrainState,
    inputs: Inputs,
    key: Key[Array, ""],
    experiment: Experiment,
) -> tuple[dict, Float[Array, ""], Float[Array, ""], dict]:
    """Returns what the images at `places` add to the batch's gradients, loss and accuracy, and new batch statistics.

    Places of -1 are no images; `piece` is the number of this piece, of `pieces` on each device.
    """
    config, spec = experiment.config, experiment.spec
    counts = places >= 0
    batch = inputs.indices[jnp.where(counts, places, 0)]
    augment_key, dropout_key = jax.random.split(key)
    with jax.named_scope("augmentation"):
        x = augment.augment(augment_key, inputs.images[batch], places, config.data.crop_padding, config.data.flip)
        x = augment.normalize(x, spec.mean, spec.std)
    dropout_key = jax.random.fold_in(dropout_key, jax.lax.axis_index(devices.AXIS))
    if pieces > 1:
        dropout_key = jax.random.fold_in(dropout_key, piece)
    loss_of = functools.partial(
        training_loss,
        batch_stats=state.batch_stats,
        x=x,
        labels=inputs.labels[batch],
        counts=counts,
        parts=jax.lax.axis_size(devices.AXIS) * pieces,
        key=dropout_key,
        experiment=experiment,
    )
    (loss, (accuracy, batch_stats)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    return grads, loss, accuracy, batch_stats


def training_loss(
    params: dict,
    batch_stats: dict,
    x: Float[Array, "share height width channels"],
    labels: Int[Array, "share"],
    counts: Bool[Array, "share"],
    parts: int,
    key: Key[Array, ""],
    experiment: Experiment,
) -> tuple[Float[Array, ""], tuple[Float[Array, ""], dict]]:
    """Returns what the images that count add to the batch's mean loss and accuracy, and new batch statistics.

    The penalty on condition numbers belongs to no image: each of the `parts` that the batch is in adds its share of it.
    """
    weight, batch_size = experiment.config.condition_penalty, experiment.config.batch_size
    counted: dict[str, Any] = {"counts": counts} if batch_stats else {}
    logits, new = experiment.model.apply(
        {"params": params, "batch_stats": batch_stats},
        x,
        train=True,
        mutable=["batch_stats", "losses"] if weight else ["batch_stats"],
        rngs={"dropout": key},
        **counted,
    )
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), experiment.config.label_smoothing)
    losses = optax.softmax_cross_entropy(logits, targets)
    loss = jnp.sum(losses, where=counts) / batch_size
    if weight:
        loss += weight * jnp.concatenate(jax.tree.leaves(new["losses"])).mean() / parts  # over heads of all layers
    accuracy = jnp.sum(logits.argmax(-1) == labels, where=counts) / batch_size
    return loss, (accuracy, new.get("batch_stats", {}))


def compile_train_step(experiment: Experiment) -> devices.Step:
    """Returns `train_step` on all devices; it overwrites the state that it is given."""
    return devices.mapped(functools.partial(train_step, experiment=experiment), donate=True)


def eval_step(
    variables: dict, inputs: Inputs, places: Int[Array, "1 share"], *, experiment: Experiment
) -> tuple[Float[Array, "global_batch"], Float[Array, "global_batch"]]:
    """Returns loss and correctness (0 or 1) of each image of the batch, in order; 0 beyond the last image."""
    places = places[0]
    index = inputs.indices + places
    valid = index < len(inputs.labels)
    index = jnp.where(valid, index, 0)
    x = augment.normalize(inputs.images[index], experiment.spec.mean, experiment.spec.std)
    logits: Any = experiment.model.apply(variables, x, train=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, inputs.labels[index])
    correct = logits.argmax(-1) == inputs.labels[index]
    empty = jnp.zeros(experiment.config.eval_batch_size * jax.lax.axis_size(devices.AXIS))

    def gather(values):
        return jax.lax.psum(empty.at[places].set(jnp.where(valid, values, 0)), devices.AXIS)

    return gather(losses), gather(correct)


def compile_eval_step(experiment: Experiment) -> devices.Step:
    """Returns `eval_step` on all devices."""
    return devices.mapped(functools.partial(eval_step, experiment=experiment))


def measure_step(
    params: dict,
    images: UInt8[Array, "examples height width channels"],
    places: Int[Array, "1 share"],
    *,
    experiment: Experiment,
) -> dict[int, Numbers]:
    """Returns what the heads of each layer do, over the first images of the test set, of which this device has some."""
    counts = places[0] >= 0
    x = augment.normalize(images[jnp.where(counts, places[0], 0)], experiment.spec.mean, experiment.spec.std)
    weights = counts / jax.lax.psum(counts.sum(), devices.AXIS)
    drawn = experiment.config.figures.every_epochs > 0
    return measure(experiment.model, params, x, weights, devices.AXIS, central=drawn)


def create_measure(experiment: Experiment, images: Array) -> Callable[[TrainState], dict[str, np.ndarray]] | None:
    """Returns a function from the state to the numbers of its heads (`heads.measure.stacked`); None: it has none."""
    model = experiment.model_config
    if not has_heads(model):
        return None
    step = devices.mapped(functools.partial(measure_step, experiment=experiment))
    places = devices.shares(min(IMAGES, len(images)))

    def measured(state: TrainState) -> dict[str, np.ndarray]:
        return stacked(step(state.params, images, places), len(kinds_and_heads(model)))

    return measured


def create_evaluate(
    experiment: Experiment, images: Array, labels: Array, interrupt: Interrupt
) -> Callable[[TrainState], dict[str, float] | None]:
    """Returns a function from the state to {"loss", "accuracy"} over all of `images`; None where it was interrupted.

    Each image counts once. Every device takes `eval_batch_size` images at a time and the sums run on the host in the
    images' order, so that the result is the same to the last bit on any number of devices.
    """
    batch = experiment.config.eval_batch_size * jax.device_count()
    step = compile_eval_step(experiment)
    places = devices.shares(batch)
    starts = [devices.replicate(np.int32(s)) for s in range(0, len(labels), batch)]

    def evaluate(state: Any) -> dict[str, float] | None:
        vote, results = Vote(interrupt), []
        for start in starts:
            results.append(step(state.variables, Inputs(images, labels, start), places))
            stopping = vote.agreed()
            jax.block_until_ready(results[-2:][0])  # two batches in flight at most
            if stopping:
                return None
        losses, correct = (np.concatenate(r).astype(np.float64) for r in zip(*results, strict=True))
        return {"loss": losses.sum() / len(labels), "accuracy": correct.sum() / len(labels)}

    return evaluate
