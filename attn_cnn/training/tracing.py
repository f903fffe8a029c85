"""A trace of a few training steps, for TensorBoard's profile plugin and ui.perfetto.dev, and where their time went.

A trace says when each of the compiled program's operations ran. What an operation is for, its part of `PARTS`, stands
in the program's text: the modules and named scopes in which JAX met it, or that it multiplies matrices.
"""

import collections
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import tabulate
from etils import epath
from jax.profiler import ProfileData
from jaxtyping import Array

log = logging.getLogger("attn_cnn")

FIRST, LAST = 3, 12  # steps after the start, when everything is compiled
# Whether programs from JAX's cache have the scopes of this code; without it, maybe of that which cached them.
CACHED_BY_SCOPES = "jax_compilation_cache_include_metadata_in_key"

# Each operation belongs to the first part whose pattern its scopes match; products of matrices come after these.
SCOPES = {
    "optimizer": r"\boptimizer\b",
    "augmentation": r"\baugmentation\b",
    "mixing of pixels": r"\bmixing\b",
    "scores and softmax": r"\bprobabilities\b",
    "normalisation": r"norm\d?\b",
}
PRODUCT = r" (?:dot|convolution)\(|custom_call_target=\"[^\"]*(?:gemm|matmul|conv)"
BETWEEN_DEVICES = r" (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start|-done)?\("
CONTAINER = r" (?:while|conditional|call)\("
PRODUCTS, ACROSS, REST, WAITING = "other products of matrices", "sums over devices", "all else", "waiting"
PARTS = (PRODUCTS, *SCOPES, ACROSS, REST, WAITING)


class Profile:
    """Writes a trace of steps FIRST to LAST of this start to `directory`, and logs its summary; with None, nothing.

    The trace ends before LAST where `end` is called, as before an evaluation, whose operations have the steps' names.
    """

    def __init__(self, directory: epath.Path | None):
        self._directory, self._steps, self._tracing = directory, 0, False
        self._result: Array | None = None
        self._program: Callable[[], str] | None = None

    def step(self, result: Array, program: Callable[[], str]) -> bool:
        """Notes that a step was dispatched; True if the trace began or ended with it.

        Args:
          result: what the step gives.
          program: a function that returns the text of the compiled step.
        """
        self._steps, self._result, self._program = self._steps + 1, result, program
        if self._directory is not None and self._steps == FIRST - 1:
            jax.block_until_ready(result)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Python's frames would be most of the trace, and slow the steps
            jax.profiler.start_trace(os.fspath(self._directory), profiler_options=options)
            self._tracing = True
            return True
        return self._steps == LAST and self.end()

    def end(self) -> bool:
        """Ends the trace; False if none is being written."""
        if not self._tracing:
            return False
        jax.block_until_ready(self._result)
        jax.profiler.stop_trace()
        self._tracing = False
        steps = self._steps - FIRST + 1
        log.info("A trace of %d steps is in %s.", steps, self._directory)
        if steps and jax.process_index() == 0:
            assert self._program is not None  # a trace begins with a step
            log.info("Where their time went:\n%s", summary(newest(self._directory), self._program(), steps))
        return True

    def __enter__(self):
        self._cached_by_scopes = getattr(jax.config, CACHED_BY_SCOPES)
        if self._directory is not None:
            jax.config.update(CACHED_BY_SCOPES, True)
        return self

    def __exit__(self, *_):
        self.end()
        jax.config.update(CACHED_BY_SCOPES, self._cached_by_scopes)


class Execution(NamedTuple):
    """One execution of an operation on a device, from `start` to `end` in nanoseconds."""

    device: tuple[str, int]
    part: str
    start: float
    end: float


def newest(directory: epath.Path) -> ProfileData:
    """Returns the newest trace in `directory`."""
    path = max(directory.glob("plugins/profile/*/*.xplane.pb"), key=os.fspath)
    return ProfileData.from_serialized_xspace(path.read_bytes())


def summary(trace: ProfileData, program: str, steps: int) -> str:
    """Returns a table of the time that each part of a step takes, in milliseconds and as a share.

    Args:
      trace: a trace of the steps.
      program: the text of the compiled step.
      steps: how many there are in the trace.
    """
    found = list(executions(trace, parts(program)))
    if not found:
        return "none of the step's operations is in the trace"
    times = time_by_part(found)
    total = sum(times.values())
    rows = [[part, f"{times[part] / steps / 1e6:.2f}", f"{times[part] / total:.1%}"] for part in PARTS if times[part]]
    return tabulate.tabulate(
        rows, ["part of a step", "ms", "share"], disable_numparse=True, colalign=("left", "right", "right")
    )


def parts(program: str) -> dict[str, str]:
    """Returns the part that each operation of a compiled program belongs to; those that contain others are left out."""
    computations = collections.defaultdict(list)
    name = ""
    for line in program.splitlines():
        if found := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            name = found[1]
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line):
            computations[name].append((found[1], line))
    multiplies = {name for name, lines in computations.items() if any(re.search(PRODUCT, line) for _, line in lines)}
    return {
        operation: _part(line, multiplies)
        for lines in computations.values()
        for operation, line in lines
        if not re.search(CONTAINER, line)
    }


def _part(line: str, multiplies: set[str]) -> str:
    scopes = re.search(r'op_name="([^"]*)"', line)
    if re.search(BETWEEN_DEVICES, line):
        return ACROSS
    for part, pattern in SCOPES.items():
        if scopes and re.search(pattern, scopes[1]):
            return part
    called = re.search(r"calls=%?([\w.-]+)", line)
    return PRODUCTS if re.search(PRODUCT, line) or (called and called[1] in multiplies) else REST


def executions(trace: ProfileData, parts: dict[str, str]) -> Iterator[Execution]:
    """Yields the executions of the operations in `parts` on this host's devices."""
    planes = list(trace.planes)
    accelerators = [plane for plane in planes if plane.name.startswith("/device:")]
    for plane in accelerators or planes:
        for line in plane.lines:
            for event in line.events:
                operation = event.name.removeprefix("%").partition(" ")[0]
                if operation in parts:
                    device = plane.name, dict(event.stats).get("device_ordinal", 0)
                    yield Execution(device, parts[operation], event.start_ns, event.end_ns)


def time_by_part(executions: Iterable[Execution]) -> dict[str, float]:
    """Returns the nanoseconds of each part, the mean of the devices, from the first one's start to the last one's end.

    Where several operations run on a device at once they share the time; where none does it waits.
    """
    by_device: dict[tuple[str, int], list[tuple[float, int, str]]] = collections.defaultdict(list)
    for one in executions:
        by_device[one.device] += [(one.start, 1, one.part), (one.end, -1, one.part)]
    times = dict.fromkeys(PARTS, 0.0)
    first = min(events[0] for events in map(min, by_device.values()))
    last = max(events[0] for events in map(max, by_device.values()))
    for events in by_device.values():
        running: collections.Counter[str] = collections.Counter()
        now = first
        for time, change, part in (*sorted(events), (last, 0, REST)):
            shares = running if running.total() else {WAITING: 1}
            for other, number in shares.items():
                times[other] += (time - now) * number / sum(shares.values()) / len(by_device)
            running[part] += change
            now = time
    return times
