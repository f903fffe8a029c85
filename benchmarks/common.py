"""What the benchmarks share: the paper's model on any grid, the real training loop, and timing that alternates.

A benchmark compares sides. They run in one process and take turns, since the speed of a shared machine drifts.
"""

import contextlib
import functools
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tabulate
from etils import epath
from jaxtyping import Array, Float, Int, UInt8

from attn_cnn.heads.history import History
from attn_cnn.mixing import UNBOUNDED, Device
from attn_cnn.model import create_model
from attn_cnn.train import load_data
from attn_cnn.training import devices
from attn_cnn.training.checkpoint import Checkpoints
from attn_cnn.training.dataset import Spec
from attn_cnn.training.experiment import Experiment, Next, create_experiment, random_state, what_happens
from attn_cnn.training.loop import Loop
from attn_cnn.training.metrics import Writer
from attn_cnn.training.progress import progress_line
from attn_cnn.training.steps import Inputs, compile_eval_step, compile_train_step
from attn_cnn.training.stopping import Interrupt
from attn_cnn.training.tracing import Profile

MATMUL = 2048
PRODUCTS = 8
EXAMPLES = 100


class Side(NamedTuple):
    """One of the things compared.

    Attributes:
      once: runs it once and waits for the result.
      images: images that one run takes.
      flops: FLOPs of one run, as the compiler counts them.
      bytes: bytes that one run reads and writes, as the compiler counts them.
      memory: arguments, results and temporaries, in bytes.
    """

    once: Callable[[], Any]
    images: int = 0
    flops: float = 0
    bytes: float = 0
    memory: int = 0


# Experiments, with random images


def paper_experiment(module: ModuleType, grid: int, batch: int, **model: Any) -> Experiment:
    """Returns an experiment at the paper's scale, on random images and without attention dropout.

    Args:
      module: the experiment's file in configs/.
      grid: side of the grid of patches.
      batch: images in a step.
      **model: fields of config.model that are to differ.
    """
    config = module.get_config()
    config.batch_size = config.eval_batch_size = batch
    side = grid * config.model.patch
    config.model.update(image_shape=(side, side, 3), max_side=max(config.model.max_side, grid))
    config.model.update(attention_dropout=0.0, **model)
    return on_random_images(config)


def on_random_images(config: ml_collections.ConfigDict, examples: int = EXAMPLES) -> Experiment:
    """Returns the experiment of a config, on so many random images."""
    names, channels = tuple(map(str, range(config.model.classes))), config.model.image_shape[-1]
    spec = Spec(config.model.image_shape, (0.5,) * channels, (0.2,) * channels, examples, names)
    return create_experiment(config, spec)


def for_device(experiment: Experiment, device: Device) -> Experiment:
    """Returns the experiment with its work in blocks for `device`, be it here or not."""
    config = experiment.config
    return experiment._replace(model=create_model(config.model, config.dtype, devices.AXIS, device))


def in_one_block(experiment: Experiment) -> Experiment:
    """Returns the experiment with all images and heads mixed at once, since of a loop the compiler counts one round."""
    return for_device(experiment, UNBOUNDED)


def random_images(experiment: Experiment) -> tuple[UInt8[np.ndarray, "examples H W 3"], Int[np.ndarray, "examples"]]:
    """Returns random images and labels in place of the data set."""
    rng, spec = np.random.default_rng(0), experiment.spec
    images = rng.integers(0, 256, (spec.train_size, *spec.image_shape), np.uint8)
    return images, rng.integers(0, spec.classes, spec.train_size, np.int32)


def training_side(experiment: Experiment, counted: Experiment | None = None) -> Side:
    """Returns the training step that a run takes.

    Args:
      experiment: the run.
      counted: the same without loops, for the compiler to count; None: made from the config.
    """
    once, compiled, without_loops = training_step(experiment, counted or in_one_block(experiment))
    return compiled_side(once, experiment.config.batch_size, compiled, without_loops.compile())


def training_step(
    experiment: Experiment, counted: Experiment
) -> tuple[Callable[[], None], jax.stages.Compiled, jax.stages.Lowered]:
    """Returns what makes one update of a run and waits for it, the step that it calls, and that of `counted`."""
    inputs = Inputs(*devices.replicate((*random_images(experiment), experiment.batch(0))))
    state, places = devices.replicate(random_state(experiment)), devices.shares(experiment.config.batch_size)
    lowered, lowered_counted = (compile_train_step(each).lower(state, inputs, places) for each in (experiment, counted))
    compiled = lowered.compile()

    def once():
        nonlocal state
        state, _ = compiled(state, inputs, places)
        jax.block_until_ready(state)

    return once, compiled, lowered_counted


def evaluation_side(experiment: Experiment) -> Side:
    """Returns the evaluation of one batch, as a run does it."""
    batch = experiment.config.eval_batch_size
    inputs = Inputs(*devices.replicate((*random_images(experiment), np.int32(0))))
    state, places = random_state(experiment), devices.shares(batch)
    variables = devices.replicate(state.variables)
    compiled, without_loops = (
        compile_eval_step(each).lower(variables, inputs, places).compile()
        for each in (experiment, in_one_block(experiment))
    )
    return compiled_side(
        lambda: jax.block_until_ready(compiled(variables, inputs, places)), batch, compiled, without_loops
    )


# The real training loop


@contextlib.contextmanager
def real_loop(config: ml_collections.ConfigDict) -> Iterator[Loop]:
    """Yields the training loop of a run on real data, before its first step, with its files in a temporary folder."""
    experiment = create_experiment(config)
    with (
        tempfile.TemporaryDirectory() as folder,
        Checkpoints(epath.Path(folder) / "checkpoints", experiment.config.checkpoint.keep) as checkpoints,
        Writer(epath.Path(folder) / "metrics", 0, True) as writer,
        progress_line(0, experiment.total_steps) as bar,
    ):
        state, dataset = random_state(experiment), load_data(experiment.config)
        heads = History(epath.Path(folder), 0, True)
        yield Loop(experiment, state, dataset, checkpoints, writer, heads, Interrupt(), Profile(None), bar)


def stretches(experiment: Experiment, steps: int) -> Iterator[Iterator[tuple[Next, int]]]:
    """Yields the training and the reports of a run, `steps` steps at a time, without evaluations and checkpoints."""
    events = (event for event in what_happens(experiment, 0, True) if event[0] in (Next.TRAIN, Next.REPORT))
    for _, stretch in itertools.groupby(events, lambda event: (event[1] - 1) // steps):
        yield stretch


# Functions


def function_side(function: Callable, *arguments: Any, images: int = 0, counted: Callable | None = None) -> Side:
    """Returns `function`, compiled for `arguments`; `counted` computes the same without loops."""
    compiled, without_loops = (jax.jit(f).lower(*arguments).compile() for f in (function, counted or function))
    return compiled_side(lambda: jax.block_until_ready(compiled(*arguments)), images, compiled, without_loops)


def matmul_side() -> Side:
    """Returns the machine's own float32 product of square matrices, eight in a row, since the first runs cold."""
    return function_side(products, random_square(MATMUL, "float32"))


def random_square(size: int, dtype: str) -> Float[Array, "{size} {size}"]:
    """Returns a random matrix whose powers neither grow nor vanish."""
    return jax.random.normal(jax.random.key(0), (size, size), dtype) / size**0.5


def products(a: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Returns a square matrix multiplied with itself `PRODUCTS` times in a row."""
    return functools.reduce(jnp.matmul, [a] * (PRODUCTS + 1))


def compiled_side(
    once: Callable[[], Any], images: int, compiled: jax.stages.Compiled, counted: jax.stages.Compiled
) -> Side:
    """Returns a side with the memory that `compiled` holds, and the costs of `counted`, the same without loops."""
    m, analysis = compiled.memory_analysis(), counted.cost_analysis()
    assert m is not None and analysis is not None  # XLA has both
    memory = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    return Side(once, images, analysis["flops"], analysis["bytes accessed"], memory)


# Flags


def are_positive(words: list[str]) -> bool:
    """Returns whether the words are whole numbers above 0."""
    return all(word.isdecimal() and int(word) for word in words)


# Timing


def alternate(sides: dict[str, Side], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of every round of each side, after one that is not counted.

    They take turns, in another order each round: it matters which program ran before.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name in random.Random(i).sample(list(sides), len(sides)):
            started = time.perf_counter()
            sides[name].once()
            if i:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, against: str) -> float:
    """Returns the speed of `name` over that of `against`: the median over rounds."""
    return statistics.median(b / a for a, b in zip(seconds[name], seconds[against], strict=True))


def table(sides: dict[str, Side], seconds: dict[str, list[float]], against: str) -> str:
    """Returns a row for each side: medians, quartiles, and the speed and memory over those of `against`."""
    medians = {name: statistics.median(seconds[name]) for name in sides}
    rates = {name: side.flops / medians[name] for name, side in sides.items()}
    rows = []
    for name, side in sides.items():
        low, _, high = statistics.quantiles(seconds[name], n=4, method="inclusive")
        rows.append(
            {
                "": name,
                "seconds (quartiles)": f"{medians[name]:.3f} ({low:.3f}-{high:.3f})",
                "images/s": f"{side.images / medians[name]:.3g}" if side.images else "",
                f"speed/{against}": f"{ratio(seconds, name, against):.2f}",
                "GFLOP": f"{side.flops / 1e9:.0f}",
                "GFLOP/s": f"{rates[name] / 1e9:.0f}",
                "of matmul": f"{rates[name] / rates['matmul']:.0%}" if "matmul" in sides else "",
                "GB accessed": f"{side.bytes / 1e9:.1f}",
                "MiB": f"{side.memory / 2**20:.0f}",
                f"memory/{against}": f"{side.memory / sides[against].memory:.2f}",
            }
        )
    return tabulate.tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
