"""Training and evaluation, from config to checkpoints; read from top to bottom.

The data lies on the devices as uint8. A step gathers its batch by index, augments and normalises it, and updates
the state; nothing but indices goes from host to device, and at most two steps are in flight.
"""

import contextlib
import functools
import logging
import sys
import time
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import tqdm
import tqdm.contrib.logging
from etils import epath
from jaxtyping import Array, Float, Int, UInt8

from attn_cnn import augment, data, devices, optim
from attn_cnn import config as config_lib
from attn_cnn.checkpoint import Checkpoints
from attn_cnn.errors import UserError
from attn_cnn.metrics import Writer
from attn_cnn.model import create_model

log = logging.getLogger("attn_cnn")

LINE_SECONDS = 10


class Sums(flax.struct.PyTreeNode):
    """Sums over steps of what is logged as means; in the state, so that a resumed run logs the same."""

    steps: Float[Array, ""]
    loss: Float[Array, ""]
    accuracy: Float[Array, ""]

    def add(self, restart: Array, loss: Array, accuracy: Array) -> "Sums":
        new = Sums(jnp.float32(1), loss, accuracy)
        return jax.tree.map(lambda old, new: jnp.where(restart, 0, old) + new, self, new)

    def means(self) -> dict[str, float]:
        return {"loss": float(self.loss / self.steps), "accuracy": float(self.accuracy / self.steps)}


class TrainState(flax.struct.PyTreeNode):
    """Everything a run needs to go on, bit for bit."""

    step: Int[Array, ""]
    params: Any
    batch_stats: Any
    opt_state: Any
    window: Sums  # since the metrics were last written
    epoch: Sums  # since the epoch began


class Run(NamedTuple):
    """What follows from a config alone."""

    config: ml_collections.ConfigDict
    spec: data.Spec
    model: nn.Module
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    steps_per_epoch: int
    total_steps: int


def create_run(config: ml_collections.ConfigDict) -> Run:
    """Raises UserError unless the config describes a run that this machine's devices can share."""
    config_lib.check(config)
    spec = data.SPECS[config.data.name]
    devices.check_batch_size(config.batch_size, jax.device_count())
    steps_per_epoch = spec.train_size // config.batch_size
    schedule = optim.create_schedule(config.optimizer, steps_per_epoch, config.epochs)
    return Run(
        config,
        spec,
        create_model(config.model, config.dtype, devices.AXIS),
        schedule,
        optim.create_optimizer(config.optimizer, schedule),
        steps_per_epoch,
        steps_per_epoch * config.epochs,
    )


def create_state(run: Run) -> TrainState:
    """The state before the first step, a function of the seed."""

    @jax.jit
    def init(key):
        images = jnp.zeros((1, *run.spec.image_shape))
        variables = run.model.init(key, images)
        zero = Sums(*[jnp.float32(0)] * 3)
        return TrainState(
            step=jnp.int32(0),
            params=variables["params"],
            batch_stats=variables.get("batch_stats", {}),
            opt_state=run.optimizer.init(variables["params"]),
            window=zero,
            epoch=zero,
        )

    return init(jax.random.key(run.config.seed))


def train_step(
    state: TrainState,
    images: UInt8[Array, "examples height width channels"],
    labels: Int[Array, "examples"],
    indices: Int[Array, "global_batch"],
    positions: Int[Array, "share"],
    *,
    run: Run,
) -> tuple[TrainState, Float[Array, ""]]:
    """One update from this device's share of the batch, averaged over devices. Returns the state and the loss."""
    config, spec = run.config, run.spec
    batch = indices[positions]
    augment_key, dropout_key = jax.random.split(
        jax.random.fold_in(jax.random.key(config.seed), state.step)
    )
    x = augment.augment(
        augment_key, images[batch], positions, config.data.crop_padding, config.data.flip
    )
    x = augment.normalize(x, spec.mean, spec.std)
    dropout_key = jax.random.fold_in(dropout_key, jax.lax.axis_index(devices.AXIS))

    def loss_of(params):
        logits, new = run.model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            x,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": dropout_key},
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch])
        return losses.mean(), (logits, new.get("batch_stats", {}))

    (loss, (logits, batch_stats)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    accuracy = (logits.argmax(-1) == labels[batch]).mean()
    grads, loss, accuracy = jax.lax.pmean((grads, loss, accuracy), devices.AXIS)
    updates, opt_state = run.optimizer.update(grads, state.opt_state, state.params)
    batch_of_epoch = state.step % run.steps_per_epoch
    state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
        window=state.window.add(batch_of_epoch % config.log_every_steps == 0, loss, accuracy),
        epoch=state.epoch.add(batch_of_epoch == 0, loss, accuracy),
    )
    return state, loss


def eval_step(
    variables: dict,
    images: UInt8[Array, "examples height width channels"],
    labels: Int[Array, "examples"],
    start: Int[Array, ""],
    positions: Int[Array, "share"],
    *,
    run: Run,
) -> tuple[Float[Array, "global_batch"], Float[Array, "global_batch"]]:
    """Loss and correctness (0 or 1) of each image from `start` on, by place; 0 beyond the last image."""
    index = start + positions
    valid = index < len(labels)
    index = jnp.where(valid, index, 0)
    x = augment.normalize(images[index], run.spec.mean, run.spec.std)
    logits = run.model.apply(variables, x, train=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[index])
    correct = logits.argmax(-1) == labels[index]
    places = jnp.zeros(run.config.eval_batch_size * jax.device_count())

    def gather(values):
        return jax.lax.psum(places.at[positions].set(jnp.where(valid, values, 0)), devices.AXIS)

    return gather(losses), gather(correct)


def create_evaluate(run: Run, images: Array, labels: Array):
    """A function from (params, batch_stats) to {"loss", "accuracy"} over all of `images`, each counted once.

    Every device takes `eval_batch_size` images at a time and the sums run on the host in the images' order, so
    the result is the same to the last bit on any number of devices.
    """
    batch = run.config.eval_batch_size * jax.device_count()
    positions = devices.positions(batch)
    step = devices.mapped(functools.partial(eval_step, run=run), sharded_argument=4, arguments=5)
    starts = [devices.replicate(np.int32(s)) for s in range(0, len(labels), batch)]

    def evaluate(state: TrainState) -> dict[str, float]:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        results = [step(variables, images, labels, start, positions) for start in starts]
        losses, correct = (np.concatenate(r).astype(np.float64) for r in zip(*results, strict=True))
        return {"loss": losses.sum() / len(labels), "accuracy": correct.sum() / len(labels)}

    return evaluate


class Clock:
    """Images a second on each device, leaving out compilation, evaluation and checkpoints."""

    def __init__(self, images_per_step: float):
        self._images, self._started = images_per_step, time.perf_counter()
        self._last, self._seconds, self._steps, self._all_steps = None, 0.0, 0, 0
        self._line = self._started

    def tick(self) -> None:
        """A step has ended."""
        now = time.perf_counter()
        if self._last is not None:
            self._seconds, self._steps = self._seconds + now - self._last, self._steps + 1
        self._last, self._all_steps = now, self._all_steps + 1

    def pause(self) -> None:
        """What follows, up to the next tick, is no step."""
        self._last = None

    def rate(self) -> float:
        """Images a second since the last call; NaN where no step was measured."""
        rate = self._images * self._steps / self._seconds if self._steps else float("nan")
        self._seconds, self._steps = 0.0, 0
        return rate

    def line_is_due(self) -> bool:
        """True at most every LINE_SECONDS: a log is for reading."""
        now = time.perf_counter()
        due = now - self._line >= LINE_SECONDS
        self._line = now if due else self._line
        return due

    def remaining(self, steps: int) -> float:
        """Seconds that `steps` more will take, everything included."""
        return (time.perf_counter() - self._started) / self._all_steps * steps


def train(config: ml_collections.ConfigDict, workdir: str | epath.Path) -> TrainState:
    """Trains to the end, from the newest checkpoint in `workdir` if there is one.

    The workdir holds config.json, checkpoints/ and metrics/.

    Raises:
      UserError: the config, the data set or the workdir is not usable.
    """
    run, workdir = create_run(config), epath.Path(workdir)
    jax.config.update("jax_default_matmul_precision", config.matmul_precision)
    claim(workdir, config)
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
    with contextlib.closing(checkpoints):
        restored = checkpoints.restore(jax.eval_shape(functools.partial(create_state, run)))
        if restored and restored[0] >= run.total_steps:
            log_finished(restored[0], checkpoints, workdir)
            return restored[1]
        step, state = restored or (0, create_state(run))
        if step:
            log.info("Resuming %s at step %d of %d.", workdir, step, run.total_steps)
        else:
            log.info("Starting %s: %d steps.", workdir, run.total_steps)
        with contextlib.closing(Writer(workdir / "metrics", step)) as writer:
            state = train_loop(run, state, checkpoints, writer)
        checkpoints.wait()
        log_finished(run.total_steps, checkpoints, workdir)
    return state


def train_loop(run: Run, state: TrainState, checkpoints: Checkpoints, writer: Writer) -> TrainState:
    """From the state's step to the last."""
    config = run.config
    dataset = data.load(config.data.name, config.data.dir)
    train_images, train_labels, test_images, test_labels = devices.replicate(tuple(dataset))
    evaluate = create_evaluate(run, test_images, test_labels)
    p_step = devices.mapped(
        functools.partial(train_step, run=run), sharded_argument=4, arguments=5, donate=(0,)
    )
    positions = devices.positions(config.batch_size)
    first_step = int(state.step)
    state = devices.replicate(state)
    clock, loss = Clock(config.batch_size / jax.device_count()), None

    with progress(first_step, run.total_steps) as bar:
        for step in range(first_step, run.total_steps):
            epoch, batch = divmod(step, run.steps_per_epoch)
            if batch == 0 or step == first_step:
                order = data.epoch_order(config.seed, epoch, len(dataset.train_labels))
            indices = order[batch * config.batch_size :][: config.batch_size]
            previous = loss
            state, loss = p_step(
                state, train_images, train_labels, devices.replicate(indices), positions
            )
            jax.block_until_ready(previous)
            clock.tick()
            bar.update()
            done = step + 1
            epoch_ends = done % run.steps_per_epoch == 0

            if (batch + 1) % config.log_every_steps == 0 or epoch_ends:
                lr, rate = float(run.schedule(step)), clock.rate()
                window = {f"train/{name}": mean for name, mean in state.window.means().items()}
                writer.write(done, window | {"lr": lr, "images_per_second_per_device": rate})
                if not epoch_ends and clock.line_is_due():
                    log.info(
                        "step %d: %s | lr %.3g | %.4g images/s/device",
                        done,
                        _words("train", state.window.means()),
                        lr,
                        rate,
                    )
            if epoch_ends:
                test = evaluate(state)
                writer.write(done, {f"test/{name}": value for name, value in test.items()})
                log.info(
                    "epoch %d/%d: %s | %s | lr %.3g | %.4g images/s/device | %s left",
                    epoch + 1,
                    config.epochs,
                    _words("train", state.epoch.means()),
                    _words("test", test),
                    lr,
                    rate,
                    tqdm.tqdm.format_interval(clock.remaining(run.total_steps - done)),
                )
                if (epoch + 1) % config.checkpoint.every_epochs == 0 or done == run.total_steps:
                    writer.flush()
                    checkpoints.save(done, state, {f"test_{k}": v for k, v in test.items()})
                clock.pause()
    return state


def evaluate(config: ml_collections.ConfigDict, workdir: str | epath.Path) -> dict[str, float]:
    """Loss and accuracy of the newest checkpoint in `workdir` on the test set.

    Raises:
      UserError: there is no checkpoint, or it is of another config.
    """
    run, workdir = create_run(config), epath.Path(workdir)
    jax.config.update("jax_default_matmul_precision", config.matmul_precision)
    if not (workdir / "config.json").exists():
        raise UserError(f"{workdir} holds no run to evaluate; train one first, or set --workdir.")
    claim(workdir, config)
    with contextlib.closing(Checkpoints(workdir / "checkpoints")) as checkpoints:
        restored = checkpoints.restore(jax.eval_shape(functools.partial(create_state, run)))
    if restored is None:
        raise UserError(f"{workdir} holds no checkpoint yet; train until its first one.")
    step, state = restored
    dataset = data.load(config.data.name, config.data.dir)
    test_data = devices.replicate((dataset.test_images, dataset.test_labels))
    results = create_evaluate(run, *test_data)(devices.replicate(state))
    log.info("%s, step %d: %s", workdir, step, _words("test", results))
    return results


def claim(workdir: epath.Path, config: ml_collections.ConfigDict) -> None:
    """Writes the config into a new workdir; raises UserError where another config already has it."""
    path = workdir / "config.json"
    if path.exists():
        if lines := config_lib.differences(config, config_lib.load(path)):
            raise UserError(
                f"{workdir} holds a run with another config; set another --workdir, or the fields as they were:\n  "
                + "\n  ".join(lines)
            )
        return
    if (workdir / "checkpoints").exists():
        raise UserError(f"{workdir} holds checkpoints but no config.json; set another --workdir.")
    workdir.mkdir(parents=True, exist_ok=True)
    config_lib.save(config, path)


def log_finished(step: int, checkpoints: Checkpoints, workdir: epath.Path) -> None:
    metrics = checkpoints.metrics(step) or {}
    accuracy = metrics.get("test_accuracy", float("nan"))
    log.info("%s is finished: %d steps, test accuracy %.4f.", workdir, step, accuracy)


@contextlib.contextmanager
def progress(done: int, total: int):
    """A progress line with the time left, on a terminal; log lines go above it."""
    show = sys.stderr.isatty() and jax.process_index() == 0
    with tqdm.tqdm(total=total, initial=done, unit="step", disable=not show) as bar:
        with tqdm.contrib.logging.logging_redirect_tqdm([log]):
            yield bar


def _words(split: str, means: dict[str, float]) -> str:
    return f"{split} loss {means['loss']:.4f} accuracy {means['accuracy']:.4f}"
