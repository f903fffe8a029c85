"""Training and evaluation, from config to checkpoints; read from top to bottom.

The data lies on the devices as uint8. A step gathers its batch by index, augments and normalises it, and updates
the state; nothing but the indices goes from host to device, and at most two steps are in flight.
"""

import contextlib
import functools
import logging
import signal
import sys
import time
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

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
from attn_cnn.errors import Stopped, UserError
from attn_cnn.interrupt import Interrupt
from attn_cnn.metrics import Writer
from attn_cnn.model import create_model
from attn_cnn.profile import Profile
from attn_cnn.workdir import claim, open_workdir

log = logging.getLogger("attn_cnn")

LINE_SECONDS = 10


class Sums(flax.struct.PyTreeNode):
    """Sums over steps of what is logged as means; in the state, so that a resumed run logs the same.

    Float32 scalars, or what stands for them in an abstract state.
    """

    steps: Any
    loss: Any
    accuracy: Any

    def add(self, restart: Array, loss: Array, accuracy: Array) -> "Sums":
        new = Sums(jnp.float32(1), loss, accuracy)
        return jax.tree.map(lambda old, new: jnp.where(restart, 0, old) + new, self, new)

    def means(self) -> dict[str, float]:
        return {"loss": float(self.loss / self.steps), "accuracy": float(self.accuracy / self.steps)}


class TrainState(flax.struct.PyTreeNode):
    """Everything a run needs to go on, bit for bit."""

    step: Any  # int32: steps done
    params: Any
    batch_stats: Any
    opt_state: Any
    window: Sums  # since the metrics were last written
    epoch: Sums  # since the epoch began
    first_bad_step: Any  # int32: the first, from 1, whose loss, gradients or parameters were not finite; or 0


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
    run = Run(
        config,
        spec,
        create_model(config.model, config.dtype, devices.AXIS),
        schedule,
        optim.create_optimizer(config.optimizer, schedule),
        steps_per_epoch,
        steps_per_epoch * config.epochs,
    )
    devices.check_memory(sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(abstract_state(run))))
    return run


def abstract_state(run: Run) -> TrainState:
    """Shapes and dtypes of the state; nothing is computed."""
    return jax.eval_shape(functools.partial(create_state, run))


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
            first_bad_step=jnp.int32(0),
        )

    return init(jax.random.key(run.config.seed))


def train_step(
    state: TrainState,
    images: UInt8[Array, "examples height width channels"],
    labels: Int[Array, "examples"],
    indices: Int[Array, "global_batch"],
    share: devices.Share,
    *,
    run: Run,
) -> tuple[TrainState, Int[Array, ""]]:
    """One update from this device's share of the batch, averaged over devices.

    Returns the state, and how many devices were asked to stop.
    """
    config, spec = run.config, run.spec
    batch = indices[share.positions]
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step))
    x = augment.augment(augment_key, images[batch], share.positions, config.data.crop_padding, config.data.flip)
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
    params = optax.apply_updates(state.params, updates)
    bad = ~jnp.isfinite(loss + optax.tree.norm(grads) + optax.tree.norm(params))
    state = state.replace(
        step=state.step + 1,
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        window=state.window.add(batch_of_epoch % config.log_every_steps == 0, loss, accuracy),
        epoch=state.epoch.add(batch_of_epoch == 0, loss, accuracy),
        first_bad_step=jnp.where((state.first_bad_step == 0) & bad, state.step + 1, state.first_bad_step),
    )
    return state, jax.lax.psum(share.stop, devices.AXIS)


def eval_step(
    variables: dict,
    images: UInt8[Array, "examples height width channels"],
    labels: Int[Array, "examples"],
    start: Int[Array, ""],
    share: devices.Share,
    *,
    run: Run,
) -> tuple[Float[Array, "global_batch"], Float[Array, "global_batch"], Int[Array, ""]]:
    """Loss and correctness (0 or 1) of each image from `start` on, by place, 0 beyond the last image; and how many
    devices were asked to stop."""
    index = start + share.positions
    valid = index < len(labels)
    index = jnp.where(valid, index, 0)
    x = augment.normalize(images[index], run.spec.mean, run.spec.std)
    logits = run.model.apply(variables, x, train=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[index])
    correct = logits.argmax(-1) == labels[index]
    places = jnp.zeros(run.config.eval_batch_size * jax.device_count())

    def gather(values):
        mine = places.at[share.positions].set(jnp.where(valid, values, 0))
        return jax.lax.psum(mine, devices.AXIS)

    return gather(losses), gather(correct), jax.lax.psum(share.stop, devices.AXIS)


class Stop:
    """Whether to stop, agreed upon by all hosts: each puts its own wish into the step, and all read the votes.

    A host reads the votes of the step before, so that the device need not wait for it.
    """

    def __init__(self, interrupt: Interrupt, batch_size: int):
        self._interrupt, self._batch_size = interrupt, batch_size
        self._shares = {False: devices.share(batch_size, False)}
        self._votes = None

    def share(self) -> devices.Share:
        """The devices' shares of the next batch, with this host's wish."""
        wish = bool(self._interrupt.signal)
        if wish not in self._shares:
            self._shares[wish] = devices.share(self._batch_size, wish)
        return self._shares[wish]

    def agreed(self, votes: Int[Array, ""]) -> bool:
        """True if the hosts stop here; waits for the step before the one that gave `votes`."""
        former, self._votes = self._votes, votes
        jax.block_until_ready(former)
        if jax.process_count() == 1:
            return bool(self._interrupt.signal)
        return former is not None and int(former) > 0


def create_evaluate(run: Run, images: Array, labels: Array, interrupt: Interrupt):
    """A function from the state to {"loss", "accuracy"} over all of `images`, each counted once; None if interrupted.

    Every device takes `eval_batch_size` images at a time and the sums run on the host in the images' order, so
    the result is the same to the last bit on any number of devices.
    """
    batch = run.config.eval_batch_size * jax.device_count()
    step = devices.mapped(functools.partial(eval_step, run=run), arguments=5)
    starts = [devices.replicate(np.int32(s)) for s in range(0, len(labels), batch)]

    def evaluate(state: TrainState) -> dict[str, float] | None:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        stop, results = Stop(interrupt, batch), []
        for start in starts:
            *result, votes = step(variables, images, labels, start, stop.share())
            results.append(result)
            if stop.agreed(votes):
                return None
        losses, correct = (np.concatenate(r).astype(np.float64) for r in zip(*results, strict=True))
        return {"loss": losses.sum() / len(labels), "accuracy": correct.sum() / len(labels)}

    return evaluate


class Clock:
    """Images a second on each device, leaving out compilation, evaluation and checkpoints."""

    def __init__(self, images_per_step: float):
        self._images, self._line = images_per_step, time.perf_counter()
        self._last, self._seconds, self._steps = None, 0.0, 0
        self._first, self._all_steps = None, 0  # when the first step, which compiles, ended; and how many there were

    def tick(self) -> None:
        """A step has ended."""
        now = time.perf_counter()
        if self._last is not None:
            self._seconds, self._steps = self._seconds + now - self._last, self._steps + 1
        self._last, self._first, self._all_steps = now, self._first or now, self._all_steps + 1

    def pause(self) -> None:
        """What follows, up to the next tick, is no step."""
        self._last = None

    def rate(self) -> dict[str, float]:
        """Images a second since the last call, by name; empty where no step was measured."""
        rate = {"images_per_second_per_device": self._images * self._steps / self._seconds} if self._steps else {}
        self._seconds, self._steps = 0.0, 0
        return rate

    def line_is_due(self) -> bool:
        """True at most every LINE_SECONDS: a log is for reading."""
        now = time.perf_counter()
        due = now - self._line >= LINE_SECONDS
        self._line = now if due else self._line
        return due

    def remaining(self, steps: int) -> str:
        """How long `steps` more will take, everything but compiling included, as in "1:23:45 left"."""
        if self._all_steps < 2:
            return "just resumed"
        seconds = (time.perf_counter() - self._first) / (self._all_steps - 1) * steps
        return f"{tqdm.tqdm.format_interval(seconds)} left"


def train(config: ml_collections.ConfigDict, workdir: epath.PathLike, profile: bool = False) -> TrainState:
    """Trains to the end, from the newest checkpoint in `workdir` if there is one.

    `profile`: a trace of a few steps goes to `workdir`/profile.

    Raises:
      UserError: the config, the data set or the workdir is not usable, or the loss is not finite.
      Stopped: Ctrl-C or SIGTERM came to this host or to another; a checkpoint of that very step is written.
    """
    run, workdir = create_run(config), open_workdir(workdir)
    dataset = load_data(config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.default_matmul_precision(config.matmul_precision))
        interrupt = stack.enter_context(Interrupt())
        devices.on_every_host(lambda: claim(workdir, config, stack) if jax.process_index() == 0 else None)
        check_same(config, workdir)
        checkpoints = stack.enter_context(Checkpoints(workdir / "checkpoints", config.checkpoint.keep))
        restored = checkpoints.restore(abstract_state(run))
        step, state = restored or (0, create_state(run))
        # A checkpoint without metrics was written on the way: at the end of an epoch, before its evaluation.
        evaluated = step == 0 or checkpoints.metrics(step) is not None
        if step == run.total_steps and evaluated:
            accuracy = checkpoints.metrics(step)["test_accuracy"]
            if profile:
                log.warning("No step is left to trace; give --profile another --workdir.")
        else:
            begin = f"Resuming {workdir} at step {step} of" if step else f"Starting {workdir}:"
            log.info("%s %d steps.", begin, run.total_steps)
            writer = stack.enter_context(Writer(workdir / "metrics", step, evaluated))
            profiler = stack.enter_context(Profile(workdir / "profile" if profile else None))
            state, accuracy = train_loop(run, state, evaluated, dataset, checkpoints, writer, profiler, interrupt)
    log.info("%s is finished: %d steps, test accuracy %.4f.", workdir, run.total_steps, accuracy)
    return state


def load_data(config: ml_collections.ConfigDict) -> data.Dataset:
    """The data set on every host; first on process 0, so that where they share a disk only one prepares it."""
    load = functools.partial(data.load, config.data.name, config.data.dir)
    first = devices.on_every_host(lambda: load() if jax.process_index() == 0 else None)
    return devices.on_every_host(lambda: first or load())


def check_same(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Raises UserError unless all hosts have the same config and see the same workdir, which the first has claimed."""
    seen = devices.everywhere(zlib.crc32(config.to_json().encode()) & 0x7FFFFFFF)
    if len(set(seen.tolist())) > 1:
        raise UserError("the hosts were given different configs; start all of them with the same command.")
    if not devices.everywhere((workdir / "config.json").exists()).all():
        raise UserError(f"not all hosts see {workdir}, where the first wrote; set --workdir to what all of them reach.")


def train_loop(
    run: Run,
    state: TrainState,
    evaluated: bool,
    dataset: data.Dataset,
    checkpoints: Checkpoints,
    writer: Writer,
    profiler: Profile,
    interrupt: Interrupt,
) -> tuple[TrainState, float]:
    """From the state's step to the last. `evaluated`: the epoch that ends with the state's step has been evaluated.

    Returns the last state and its test accuracy.
    """
    config, done = run.config, int(state.step)
    first = done + 1
    images, labels, *test_set = devices.replicate(tuple(dataset))
    state = devices.replicate(state)
    evaluate = create_evaluate(run, *test_set, interrupt)
    step = devices.mapped(functools.partial(train_step, run=run), arguments=5, donate=(0,))
    stop, order = Stop(interrupt, config.batch_size), EpochOrder(run)
    clock = Clock(config.batch_size / jax.device_count())

    with progress(done, run.total_steps) as bar:
        while True:
            epoch, batch = divmod(done, run.steps_per_epoch)
            if batch == 0 and not evaluated:
                clock.pause()
                test = evaluate(state)
                if test is None:
                    stopped(done, state, checkpoints, writer, interrupt)
                writer.write(done, {f"test/{name}": value for name, value in test.items()})
                log_epoch(run, done, state, test, clock)
                if epoch % config.checkpoint.every_epochs == 0 or done == run.total_steps:
                    devices.on_every_host(writer.flush)
                    checkpoints.save(done, state, {f"test_{name}": value for name, value in test.items()})
                if done == run.total_steps:
                    return state, test["accuracy"]

            indices = devices.replicate(order.batch(done))
            state, votes = step(state, images, labels, indices, stop.share())
            stopping = stop.agreed(votes)
            profiled = profiler.step(votes)
            done, batch, evaluated = done + 1, batch + 1, False
            if done == first:
                jax.block_until_ready(votes)
                log.info("Compiled; step %d is done.", done)
            if profiled:
                clock.pause()
            clock.tick()
            bar.update()

            if batch % config.log_every_steps == 0 or batch == run.steps_per_epoch or stopping:
                check_finite(run, state, checkpoints)
            if batch % config.log_every_steps == 0 or batch == run.steps_per_epoch:
                log_window(run, done, state, clock, writer)
            if stopping:
                stopped(done, state, checkpoints, writer, interrupt)


def check_finite(run: Run, state: TrainState, checkpoints: Checkpoints) -> None:
    """Raises UserError if some step went out of the finite numbers; comes before any state is saved."""
    if bad := int(state.first_bad_step):
        last = checkpoints.latest_step()
        raise UserError(
            f"the loss, its gradients or the parameters were not finite at step {bad}, with learning rate "
            f"{float(run.schedule(bad - 1)):.3g}. "
            + ("No checkpoint was written yet" if last is None else f"The checkpoint of step {last} is untouched")
            + "; a lower config.optimizer.learning_rate, in a new workdir, may help."
        )


def stopped(done: int, state: TrainState, checkpoints: Checkpoints, writer: Writer, interrupt: Interrupt) -> NoReturn:
    """Saves everything and raises Stopped."""
    try:
        devices.on_every_host(writer.flush)  # first, or a kill in between would leave a gap in the metrics
    finally:
        if checkpoints.latest_step() != done:
            checkpoints.save(done, state)
        checkpoints.wait()
    # A host that received no signal stops for another's.
    number = interrupt.signal or signal.SIGTERM
    raise Stopped(f"stopped at step {done}; the same command goes on from there.", number)


class EpochOrder:
    """The indices of each step's batch; keeps the current epoch's permutation."""

    def __init__(self, run: Run):
        self._run, self._epoch, self._order = run, None, None

    def batch(self, step: int) -> Int[np.ndarray, "global_batch"]:
        epoch, batch = divmod(step, self._run.steps_per_epoch)
        if epoch != self._epoch:
            seed, size = self._run.config.seed, self._run.spec.train_size
            self._epoch, self._order = epoch, data.epoch_order(seed, epoch, size)
        size = self._run.config.batch_size
        return self._order[batch * size : (batch + 1) * size]


def log_window(run: Run, done: int, state: TrainState, clock: Clock, writer: Writer) -> None:
    """Writes the means since the last time, and a line where one is due."""
    means, lr, rate = state.window.means(), float(run.schedule(done - 1)), clock.rate()
    named = {f"train/{name}": mean for name, mean in means.items()}
    writer.write(done, named | {"lr": lr} | rate)
    if done % run.steps_per_epoch and rate and clock.line_is_due():
        words = _words("train", means)
        log.info("step %d: %s | lr %.3g | %.4g images/s/device", done, words, lr, *rate.values())


def log_epoch(run: Run, done: int, state: TrainState, test: dict[str, float], clock: Clock) -> None:
    """The epoch's line."""
    log.info(
        "epoch %d/%d: %s | %s | lr %.3g | %s",
        done // run.steps_per_epoch,
        run.config.epochs,
        _words("train", state.epoch.means()),
        _words("test", test),
        float(run.schedule(done - 1)),
        clock.remaining(run.total_steps - done),
    )


def evaluate(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> dict[str, float]:
    """Loss and accuracy of the newest checkpoint in `workdir` on the test set.

    Raises:
      UserError: there is no checkpoint, or it is of another config.
    """
    run, workdir = create_run(config), open_workdir(workdir)
    if not (workdir / "config.json").exists():
        raise UserError(f"{workdir} holds no run to evaluate; train one first, or set --workdir.")
    trained = config_lib.load(workdir / "config.json")
    if lines := config_lib.differences(config, trained, only=("model.", "data.", "dtype", "matmul", "optimizer.name")):
        raise UserError(f"{workdir} holds a run of another model; its config differs:\n  " + "\n  ".join(lines))
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore(abstract_state(run))
    if restored is None:
        raise UserError(f"{workdir} holds no checkpoint yet; train until its first one.")
    step, state = restored
    dataset = load_data(config)
    test_set = devices.replicate((dataset.test_images, dataset.test_labels))
    with Interrupt() as interrupt, jax.default_matmul_precision(config.matmul_precision):
        results = create_evaluate(run, *test_set, interrupt)(devices.replicate(state))
    if results is None:
        raise Stopped("evaluation stopped.", interrupt.signal or signal.SIGTERM)
    log.info("%s, step %d: %s", workdir, step, _words("test", results))
    return results


@contextlib.contextmanager
def progress(done: int, total: int) -> Iterator[tqdm.tqdm]:
    """A progress line with the time left, on a terminal; log lines go above it."""
    show = sys.stderr.isatty() and jax.process_index() == 0
    bar = tqdm.tqdm(total=total, initial=done, unit="step", disable=not show)
    with bar, tqdm.contrib.logging.logging_redirect_tqdm([log]) if show else contextlib.nullcontext():
        yield bar


def _words(split: str, means: dict[str, float]) -> str:
    return f"{split} loss {means['loss']:.4f} accuracy {means['accuracy']:.4f}"
