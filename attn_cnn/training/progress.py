"""What a person sees of a run: the progress line, the log's lines, and the clock behind both."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator

import jax
import tqdm
import tqdm.contrib.logging

from attn_cnn.training.experiment import Experiment, TrainState

log = logging.getLogger("attn_cnn")

LINE_SECONDS = 10


class Clock:
    """Measures images a second on each device, leaving out compilation, evaluation and checkpoints."""

    def __init__(self, images_per_step: float):
        self._images, self._line = images_per_step, time.perf_counter()
        self._last: float | None = None
        self._seconds, self._steps = 0.0, 0
        self._first: float | None = None  # when the first step, which compiles, ended
        self._all_steps = 0

    def tick(self) -> None:
        """Notes that a step has ended."""
        now = time.perf_counter()
        if self._last is not None:
            self._seconds, self._steps = self._seconds + now - self._last, self._steps + 1
        self._last, self._first, self._all_steps = now, self._first or now, self._all_steps + 1

    def pause(self) -> None:
        """Notes that what follows, up to the next tick, is no step."""
        self._last = None

    def rate(self) -> dict[str, float]:
        """Returns images a second since the last call, by name; nothing where no step was measured."""
        rate = {"images_per_second_per_device": self._images * self._steps / self._seconds} if self._steps else {}
        self._seconds, self._steps = 0.0, 0
        return rate

    def line_is_due(self) -> bool:
        """Returns True at most every LINE_SECONDS: a log is for reading."""
        now = time.perf_counter()
        due = now - self._line >= LINE_SECONDS
        self._line = now if due else self._line
        return due

    def remaining(self, steps: int) -> str:
        """Returns how long `steps` more will take, everything but compiling included, as in "1:23:45 left"."""
        if self._first is None or self._all_steps < 2:
            return "just started"
        seconds = (time.perf_counter() - self._first) / (self._all_steps - 1) * steps
        return f"{tqdm.tqdm.format_interval(seconds)} left"


@contextlib.contextmanager
def progress_line(done: int, total: int) -> Iterator[tqdm.tqdm]:
    """Shows a line with the time left, on a terminal; log lines go above it."""
    show = sys.stderr.isatty() and jax.process_index() == 0
    bar = tqdm.tqdm(total=total, initial=done, unit="step", disable=not show)
    with bar, tqdm.contrib.logging.logging_redirect_tqdm([log]) if show else contextlib.nullcontext():
        yield bar


def window_metrics(experiment: Experiment, step: int, state: TrainState, clock: Clock) -> dict[str, float]:
    """Returns the metrics since the last time, and writes a line of them where one is due."""
    means, lr, rate = state.window.means(), float(experiment.schedule(step - 1)), clock.rate()
    if step % experiment.steps_per_epoch and rate and clock.line_is_due():
        log.info("step %d: %s | lr %.3g | %.4g images/s/device", step, words("train", means), lr, *rate.values())
    return {f"train/{name}": mean for name, mean in means.items()} | {"lr": lr} | rate


def log_epoch(experiment: Experiment, step: int, state: TrainState, test: dict[str, float], clock: Clock) -> None:
    """Writes the epoch's line."""
    log.info(
        "epoch %d/%d: %s | %s | lr %.3g | %s",
        step // experiment.steps_per_epoch,
        experiment.config.epochs,
        words("train", state.epoch.means()) if state.epoch.steps else "trained elsewhere",
        words(experiment.evaluated_on, test),
        float(experiment.schedule(step - 1)),
        clock.remaining(experiment.total_steps - step),
    )


def words(split: str, means: dict[str, float]) -> str:
    """Returns loss and accuracy as words of a line."""
    return f"{split} loss {means['loss']:.4f} accuracy {means['accuracy']:.4f}"
