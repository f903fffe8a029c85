"""A trace of a few training steps, which TensorBoard's profile plugin and ui.perfetto.dev open."""

import logging
import os

import jax
from etils import epath
from jaxtyping import Array

log = logging.getLogger("attn_cnn")

FIRST, LAST = 3, 12  # steps after the start, when everything is compiled


class Profile:
    """Writes a trace of steps FIRST to LAST of this start to `directory`; with None it writes nothing."""

    def __init__(self, directory: epath.Path | None):
        self._directory, self._steps, self._tracing, self._result = directory, 0, False, None

    def step(self, result: Array) -> bool:
        """Notes that a step was dispatched, which gives `result`; True if the trace began or ended with it."""
        self._steps, self._result = self._steps + 1, result
        if self._directory is None or self._steps not in (FIRST - 1, LAST):
            return False
        if self._tracing:
            self._stop()
        else:
            jax.block_until_ready(result)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Python's frames would be most of the trace, and slow the steps
            jax.profiler.start_trace(os.fspath(self._directory), profiler_options=options)
            self._tracing = True
        return True

    def _stop(self) -> None:
        jax.block_until_ready(self._result)
        jax.profiler.stop_trace()
        self._tracing = False
        log.info("A trace of %d steps is in %s.", self._steps - FIRST + 1, self._directory)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._tracing:  # the run ended, or was stopped, before the last of the steps
            self._stop()
