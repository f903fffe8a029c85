"""What the benchmarks share: the paper's model on any grid, its twins, and timing that alternates between them.

A twin is the same network with another layer in place of `SelfAttention`.
"""

import contextlib
import functools
import importlib
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tabulate

from attn_cnn import attention, data, devices, model, optim, positions, report, train
from configs import quadratic

MATMUL = 2048
EXAMPLES = 100


class Convolution(nn.Module):
    """A 3x3 convolution with as many channels, then the output map; takes what SelfAttention takes."""

    encoding: str
    heads: int
    max_side: int
    embedding_size: int
    mixing: str
    dropout: float
    dropout_on: str
    dtype: Any
    block: int = 0

    @nn.compact
    def __call__(self, x, tables=None, output=None, *, train=False):
        x = nn.Conv(x.shape[-1], (3, 3), dtype=self.dtype, name="value")(x.astype(self.dtype))
        kernel, bias = output
        return x @ kernel.astype(self.dtype) + bias.astype(self.dtype)


class EinsumAttention(Convolution):
    """Content encodings as one would write them: a Linear each, one einsum each, all heads at once."""

    @nn.compact
    def __call__(self, x, tables=None, output=None, *, train=False):
        features, shape = x.shape[-1], x.shape
        x = x.astype(self.dtype)
        per_head = functools.partial(nn.DenseGeneral, (self.heads, features), dtype=self.dtype)
        query, key = per_head(name="query")(x) * features**-0.5, per_head(name="key")(x)
        scores = jnp.einsum("bijhd,bklhd->bhijkl", query, key)
        if self.encoding == "learned_content":
            tables = attention.embedding_tables(self, self.max_side, features // 2)
            rows, columns = (
                table[positions.shifts(side) + self.max_side - 1]
                for table, side in zip(tables, shape[1:3], strict=True)
            )
            scores += jnp.einsum("bijhd,ikd->bhijk", query[..., : features // 2], rows)[..., None]
            scores += jnp.einsum("bijhd,jld->bhijl", query[..., features // 2 :], columns)[..., None, :]
        else:
            tables = attention.embedding_tables(self, self.max_side, features)
            rows, columns = (
                nn.Dense(self.heads, use_bias=False)(table)[positions.shifts(side) + self.max_side - 1]
                for table, side in zip(tables, shape[1:3], strict=True)
            )
            scores += jnp.einsum("ikh->hik", rows)[None, :, :, None, :, None]
            scores += jnp.einsum("jlh->hjl", columns)[None, :, None, :, None, :]
        probabilities = nn.Dropout(self.dropout)(jax.nn.softmax(scores, (-2, -1)), deterministic=not train)
        mixed = jnp.einsum("bhijkl,bkld->bijhd", probabilities, x)
        x = nn.DenseGeneral(features, axis=(-2, -1), dtype=self.dtype, name="value")(mixed)
        kernel, bias = output
        return x @ kernel.astype(self.dtype) + bias.astype(self.dtype)


@contextlib.contextmanager
def in_place_of_attention(layer: type[nn.Module] | None) -> Iterator[None]:
    """Models traced inside have `layer` where they have SelfAttention; None changes nothing."""
    with mock.patch.object(model, "SelfAttention", layer) if layer else contextlib.nullcontext():
        yield


def real_run(scale: str) -> tuple[train.Run, Callable, train.TrainState, tuple[jax.Array, jax.Array]]:
    """configs/quadratic.py at a scale with real data: its run, step, first state, and images with labels."""
    run = train.create_run(quadratic.get_config(scale))
    dataset = data.load(run.config.data.name)
    step = devices.mapped(functools.partial(train.train_step, run=run), arguments=5, donate=(0,))
    state = devices.replicate(train.create_state(run))
    return run, step, state, devices.replicate((dataset.train_images, dataset.train_labels))


class Side(NamedTuple):
    """One of the things compared: how to run it once, and what the compiler says of it."""

    once: Callable[[], Any]
    images: int = 0
    flops: float = 0
    bytes: float = 0
    memory: int = 0  # arguments, results and temporaries, in bytes


def paper_run(experiment: str, grid: int, batch: int, **changes) -> train.Run:
    """The paper's model on a grid x grid of patches, for random images; no attention dropout."""
    config = importlib.import_module(f"configs.{experiment}").get_config()
    config.batch_size = config.eval_batch_size = batch
    config.model.attention_dropout = 0.0
    config.model.image_shape = (2 * grid, 2 * grid, 3)
    config.model.max_side = max(config.model.max_side, grid)
    config.update_from_flattened_dict(changes)
    spec = data.Spec(config.model.image_shape, config.model.classes, (0.5,) * 3, (0.2,) * 3, EXAMPLES)
    schedule = optim.create_schedule(config.optimizer, EXAMPLES // batch, config.epochs)
    module = model.create_model(config.model, config.dtype, devices.AXIS)
    optimizer = optim.create_optimizer(config.optimizer, schedule)
    return train.Run(config, spec, module, schedule, optimizer, EXAMPLES // batch, config.epochs * EXAMPLES // batch)


def training_side(run: train.Run, layer: type[nn.Module] | None = None) -> Side:
    """The training step that the product runs."""
    images, labels = random_images(run)
    batch = run.config.batch_size
    arguments = devices.replicate((images, labels, np.arange(batch, dtype=np.int32)))
    share = devices.share(batch)
    with in_place_of_attention(layer):
        state = devices.replicate(train.create_state(run))
        compiled = compile_step(train.train_step, run, state, *arguments, share, donate=(0,))
        counted = compile_step(train.train_step, in_one_block(run), state, *arguments, share)

    def once():
        nonlocal state
        state, _ = compiled(state, *arguments, share)
        jax.block_until_ready(state)

    return compiled_side(once, batch, compiled, counted)


def evaluation_side(run: train.Run, layer: type[nn.Module] | None = None) -> Side:
    """The evaluation step that the product runs."""
    images, labels = random_images(run)
    batch = run.config.eval_batch_size
    arguments = devices.replicate((images, labels, np.int32(0)))
    share = devices.share(batch)
    with in_place_of_attention(layer):
        state = train.create_state(run)
        variables = devices.replicate({"params": state.params, "batch_stats": state.batch_stats})
        compiled = compile_step(train.eval_step, run, variables, *arguments, share)
        counted = compile_step(train.eval_step, in_one_block(run), variables, *arguments, share)

    def once():
        jax.block_until_ready(compiled(variables, *arguments, share))

    return compiled_side(once, batch, compiled, counted)


def random_images(run: train.Run) -> tuple[np.ndarray, np.ndarray]:
    """The data set of a benchmark, and its labels."""
    rng, spec = np.random.default_rng(0), run.spec
    images = rng.integers(0, 256, (EXAMPLES, *spec.image_shape), np.uint8)
    return images, rng.integers(0, spec.classes, EXAMPLES, np.int32)


def in_one_block(run: train.Run) -> train.Run:
    """The same run with all images and heads at once, for the compiler to count."""
    return run._replace(model=report.in_one_block(run.model))


def compile_step(step: Callable, run: train.Run, *values, donate: tuple[int, ...] = ()) -> jax.stages.Compiled:
    """One of the product's steps, compiled for all devices."""
    return devices.mapped(functools.partial(step, run=run), len(values), donate).lower(*values).compile()


def compiled_side(once: Callable, images: int, compiled: jax.stages.Compiled, counted: jax.stages.Compiled) -> Side:
    """What `compiled` holds in memory, and what `counted`, the same without loops, costs."""
    m, analysis = compiled.memory_analysis(), counted.cost_analysis()
    memory = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    return Side(once, images, analysis["flops"], analysis["bytes accessed"], memory)


def function_side(function: Callable, *arguments, images: int = 0, counted: Callable | None = None) -> Side:
    """`function`, compiled for `arguments`; `counted` computes the same without loops."""
    compiled, counted = (jax.jit(f).lower(*arguments).compile() for f in (function, counted or function))
    return compiled_side(lambda: jax.block_until_ready(compiled(*arguments)), images, compiled, counted)


def matmul_side() -> Side:
    """The machine's own float32 product of square matrices, eight in a row, since the first runs cold."""
    a = jax.random.normal(jax.random.key(0), (MATMUL, MATMUL)) / MATMUL**0.5
    return function_side(lambda a: functools.reduce(jnp.matmul, [a] * 9), a)


def alternate(sides: dict[str, Side], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round of each side, after one that is not counted.

    They take turns, in another order each round: it matters which program ran before.
    """
    seconds = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name in random.Random(i).sample(list(sides), len(sides)):
            started = time.perf_counter()
            sides[name].once()
            if i:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, against: str) -> float:
    """Speed of `name` over that of `against`: the median over rounds."""
    return statistics.median(b / a for a, b in zip(seconds[name], seconds[against], strict=True))


def table(sides: dict[str, Side], seconds: dict[str, list[float]], against: str) -> str:
    """A row for each side: medians, quartiles, and the speed and memory over those of `against`."""
    rows = []
    base = sides.get("matmul")
    for name, side in sides.items():
        median = statistics.median(seconds[name])
        low, _, high = statistics.quantiles(seconds[name], n=4, method="inclusive")
        rate = side.flops / median
        rows.append(
            [
                name,
                f"{median:.3f} ({low:.3f}-{high:.3f})",
                f"{side.images / median:.3g}" if side.images else "",
                f"{ratio(seconds, name, against):.2f}",
                f"{side.flops / 1e9:.0f}",
                f"{rate / 1e9:.0f}",
                f"{rate / (base.flops / statistics.median(seconds['matmul'])):.0%}" if base else "",
                f"{side.bytes / 1e9:.1f}",
                f"{side.memory / 2**20:.0f}",
                f"{side.memory / sides[against].memory:.2f}",
            ]
        )
    headers = [
        "",
        "seconds (quartiles)",
        "images/s",
        f"speed/{against}",
        "GFLOP",
        "GFLOP/s",
        "of matmul",
        "GB accessed",
    ]
    return tabulate.tabulate(rows, [*headers, "MiB", f"memory/{against}"], tablefmt="github", disable_numparse=True)
