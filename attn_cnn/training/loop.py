"""The training loop: a method for each thing that can come next in a run, and the ways in which it ends early."""

import logging
import signal
from collections.abc import Iterable
from typing import NoReturn

import jax
import numpy as np
import tqdm
from jaxtyping import Array

from attn_cnn import drawing
from attn_cnn.errors import Stopped, UserError
from attn_cnn.heads import history, views
from attn_cnn.training import devices
from attn_cnn.training.checkpoint import Checkpoints
from attn_cnn.training.dataset import Dataset
from attn_cnn.training.experiment import Experiment, Next, TrainState
from attn_cnn.training.metrics import Writer
from attn_cnn.training.progress import Clock, log_epoch, window_metrics
from attn_cnn.training.steps import Inputs, compile_train_step, create_evaluate, create_measure
from attn_cnn.training.stopping import Interrupt, Vote
from attn_cnn.training.tracing import Profile

log = logging.getLogger("attn_cnn")

ATTENTION = "heads/attention"  # tag of the image of where heads look; `metrics.trim` knows what begins with heads/


class Loop:
    """What a run does, a method for each thing that can come next; `state` and `test` are its state and last test."""

    def __init__(
        self,
        experiment: Experiment,
        state: TrainState,
        dataset: Dataset,
        checkpoints: Checkpoints,
        writer: Writer,
        heads: history.History | None,
        interrupt: Interrupt,
        profiler: Profile,
        bar: tqdm.tqdm,
    ):
        self.experiment, self.checkpoints, self.writer, self.heads = experiment, checkpoints, writer, heads
        self.interrupt, self.profiler, self.bar = interrupt, profiler, bar
        self.images, self.labels, test_images, test_labels = devices.replicate(dataset[:4])
        self.state: TrainState = devices.replicate(state)
        self.test: dict[str, float] = {}
        self.loss: Array | None = None
        self.places = devices.shares(experiment.config.batch_size, experiment.pieces)
        self.step = compile_train_step(experiment)
        self.evaluation = create_evaluate(experiment, test_images, test_labels, interrupt)
        self.measure = create_measure(experiment, test_images)
        self.vote, self.stopping = Vote(interrupt), False
        self.clock = Clock(experiment.config.batch_size / jax.device_count())

    def run(self, events: Iterable[tuple[Next, int]]) -> None:
        """Does what the `events` say; raises Stopped, with everything saved, where the hosts agree to stop."""
        done = int(self.state.step)
        for what, step in events:
            if self.stopping and what is not Next.REPORT:
                self.stop(done)
            getattr(self, what.value)(step)
            done = step
        if self.stopping:
            self.stop(done)

    def train(self, step: int) -> None:
        """Trains on the next batch, at most two steps being in flight."""
        inputs = Inputs(self.images, self.labels, devices.replicate(self.experiment.batch(step - 1)))
        self.state, loss = self.step(self.state, inputs, self.places)
        former, self.loss = self.loss, loss
        self.stopping = self.vote.agreed()
        jax.block_until_ready(former)
        profiled = self.profiler.step(loss, lambda: self._program(inputs))
        if former is None:
            jax.block_until_ready(loss)
            log.info("Compiled; step %d is done.", step)
        if profiled:
            self.clock.pause()
        self.clock.tick()
        self.bar.update()

    def _program(self, inputs: Inputs) -> str:
        """Returns the text of the compiled step, which JAX still has."""
        text = self.step.lower(self.state, inputs, self.places).compile().as_text()
        assert text is not None  # XLA has it
        return text

    def report(self, step: int) -> None:
        """Writes the metrics since the last time."""
        self.check_finite()
        self.writer.write(step, window_metrics(self.experiment, step, self.state, self.clock))

    def evaluate(self, step: int) -> None:
        """Evaluates on the test set or what is held out; where a signal comes, stops before the metrics are written."""
        self.clock.pause()
        self.profiler.end()
        test = self.evaluation(self.state)
        if test is None:
            self.stop(step)
        self.test = test
        split = self.experiment.evaluated_on
        self.writer.write(step, {f"{split}/{name}": value for name, value in test.items()})
        if self.measure:
            self.write_heads(step, self.measure(self.state))
        log_epoch(self.experiment, step, self.state, test, self.clock)

    def write_heads(self, step: int, numbers: dict[str, np.ndarray]) -> None:
        """Writes what each head does; on several hosts process 0 does."""
        self.writer.write(step, history.scalars(numbers))
        epoch, every = step // self.experiment.steps_per_epoch, self.experiment.config.figures.every_epochs
        if every and epoch % every == 0:
            seen = views.of_numbers(numbers)
            self.writer.write_image(step, ATTENTION, lambda: drawing.pixels(drawing.attention(seen)))
        kept = {name: values for name, values in numbers.items() if name != "central"}  # which images alone need
        devices.on_every_host(lambda: self.heads.append(epoch, step, kept) if self.heads else None)

    def save(self, step: int) -> None:
        """Writes a checkpoint, after the metrics that came before it."""
        devices.on_every_host(self.writer.flush)
        split = self.experiment.evaluated_on
        self.checkpoints.save(step, self.state, {f"{split}_{name}": value for name, value in self.test.items()})

    def stop(self, step: int) -> NoReturn:
        """Saves everything and raises Stopped."""
        self.check_finite()
        try:
            devices.on_every_host(self.writer.flush)  # first, or a kill in between would leave a gap in the metrics
        finally:
            if self.checkpoints.latest_step() != step:
                self.checkpoints.save(step, self.state)
            self.checkpoints.wait()
        # A host that received no signal stops for another's.
        number = self.interrupt.signal or signal.SIGTERM
        raise Stopped(f"stopped at step {step}; the same command goes on from there.", number)

    def check_finite(self) -> None:
        """Raises UserError if some step went out of the finite numbers; comes before any state is saved."""
        if bad := int(self.state.first_bad_step):
            last = self.checkpoints.latest_step()
            raise UserError(
                f"the loss, its gradients or the parameters were not finite at step {bad}, with learning rate "
                f"{float(self.experiment.schedule(bad - 1)):.3g}. "
                + ("No checkpoint was written yet" if last is None else f"The checkpoint of step {last} is untouched")
                + "; a lower config.optimizer.learning_rate, in a new workdir, may help."
            )
