"""What the compilers of TPUs and GPUs make of the training and the evaluation step, on a machine that has neither.

    pip install "libtpu==0.0.42.*"       # the TPU's compiler
    pip install "jax[cuda13]"            # the GPU's, 6 GB with all that comes along
    python -m benchmarks.accelerators    # all of it
    python -m benchmarks.accelerators --target=v5e-8 --experiments=quadratic --dtypes=bfloat16

The steps are the product's own, ahead of time, for the paper's model: nothing runs, so there are no times but the
compiler's. Sizes are of one device. Of a loop the compiler counts the FLOPs and bytes of one round.
"""

import collections
import functools
import importlib
import itertools
import math
import os
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

# Where nothing is to run, neither the cloud's metadata nor the GPU's driver is asked for.
os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1")
# There is no GPU to try kernels on, and the Triton products that XLA then picks blindly do not all compile.
os.environ["XLA_FLAGS"] = " ".join(
    (os.environ.get("XLA_FLAGS", ""), "--xla_gpu_autotune_level=0", "--xla_gpu_enable_triton_gemm=false")
)

import jax
import jax.numpy as jnp
import numpy as np
import tabulate
from absl import flags
from etils import epath
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attn_cnn import cli
from attn_cnn.errors import UserError, first_line
from attn_cnn.mixing import Device
from attn_cnn.training import devices, steps
from attn_cnn.training.experiment import Experiment, abstract_state
from benchmarks import common
from benchmarks.experiments import EXPERIMENTS as ALL

GIB = 2**30
IMAGES = 50_000
H100 = epath.Path(__file__).parent / "h100.target.txt"


class Target(NamedTuple):
    """Devices to compile for.

    Attributes:
      kind: "tpu" or "gpu".
      topology: what JAX calls them.
      memory: bytes of one device.
      options: names and values of what else JAX asks for.
    """

    kind: str
    topology: str
    memory: int
    options: tuple[tuple[str, Any], ...] = ()


TARGETS = {
    "v5e-1": Target("tpu", "v5e:1x1x1", 16 * GIB, (("chips_per_host_bounds", (1, 1, 1)),)),
    "v5e-8": Target("tpu", "v5e:2x4", 16 * GIB),
    "v5e-256": Target("tpu", "v5e:16x16", 16 * GIB),
    "v4-32": Target("tpu", "v4:2x2x4", 32 * GIB),
    "v5p-8": Target("tpu", "v5p:2x2x1", 95 * GIB),
    "v6e-8": Target("tpu", "v6e:2x4", 32 * GIB),
    "h100-1": Target("gpu", "1 x 1 x 1", 80 * GIB),
    "h100-8": Target("gpu", "1 x 1 x 8", 80 * GIB),
}
WHOLE = ("v5e-8", "h100-1")  # where all experiments are compiled, in both types
EXPERIMENTS = ("quadratic", "learned", "learned_content", "gated", "resnet18")
INSTALL = {"tpu": 'pip install "libtpu==0.0.42.*"', "gpu": 'pip install "jax[cuda13]"'}


class Program(NamedTuple):
    """A step, compiled.

    Attributes:
      seconds: what compiling took.
      compiled: the program.
      products: the matrix products by the types of their operands, as "bfloat16 x bfloat16".
    """

    seconds: float
    compiled: jax.stages.Compiled
    products: dict[str, "Products"]


class Products(NamedTuple):
    """How many matrix products and convolutions there are, and their FLOPs, with what meets padding among them."""

    number: int
    flops: int


def mesh_of(target: Target) -> Mesh:
    """Returns the devices of a target; raises UserError where their compiler is not installed."""
    try:
        if target.kind == "tpu":
            found = topologies.get_topology_desc(platform="tpu", topology_name=target.topology, **dict(target.options))
        else:
            options = {"target_config": H100.read_text(), "topology": target.topology}
            found = topologies.get_topology_desc(platform="cuda", topology_name="", **options)
    except Exception as error:  # JAX raises whatever the plugin did
        raise UserError(
            f"there is no compiler for {target.topology} here ({first_line(error)}); {INSTALL[target.kind]} has it."
        ) from None
    return Mesh(np.array(found.devices), (devices.AXIS,))


def experiment_for(target: Target, config: Any) -> Experiment:
    """Returns the experiment of a config, on `IMAGES` images, with its work in blocks for the target's devices."""
    return common.for_device(common.on_random_images(config, IMAGES), Device(target.kind, target.memory))


def compile_training(experiment: Experiment, mesh: Mesh) -> Program:
    """Compiles the training step for the devices of `mesh`."""
    config = experiment.config
    step = functools.partial(steps.train_step, experiment=experiment)
    share = -(-config.batch_size // (mesh.size * experiment.pieces))
    return _compile(
        step, mesh, abstract_state(experiment), config, (experiment.pieces, share), (config.batch_size,), (0,)
    )


def compile_evaluation(experiment: Experiment, mesh: Mesh) -> Program:
    """Compiles the evaluation step for the devices of `mesh`."""
    config, state = experiment.config, abstract_state(experiment)
    variables = state.variables
    step = functools.partial(steps.eval_step, experiment=experiment)
    return _compile(step, mesh, variables, config, (1, config.eval_batch_size), (), ())


def _compile(
    step: Any, mesh: Mesh, state: Any, config: Any, places: tuple, indices: tuple, donated: tuple[int, ...]
) -> Program:
    def on(spec: PartitionSpec, tree: Any) -> Any:
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)

    data = (
        jax.ShapeDtypeStruct((IMAGES, *config.model.image_shape), jnp.uint8),
        jax.ShapeDtypeStruct((IMAGES,), jnp.int32),
        jax.ShapeDtypeStruct(indices, jnp.int32),
    )
    share = jax.ShapeDtypeStruct((mesh.size, *places), jnp.int32)
    everywhere, shared = PartitionSpec(), PartitionSpec(devices.AXIS)
    started = time.perf_counter()
    inputs = steps.Inputs(*on(everywhere, data))
    lowered = devices.sharded(step, mesh, donated).lower(on(everywhere, state), inputs, on(shared, share))
    compiled = lowered.compile()
    return Program(time.perf_counter() - started, compiled, products(lowered.as_text()))


# What the texts say

TYPES = {"f32": "float32", "bf16": "bfloat16"}
BYTES = {
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "bf16": 2,
    "f16": 2,
    "u16": 2,
    "s16": 2,
    "u8": 1,
    "s8": 1,
    "pred": 1,
    "s64": 8,
    "u64": 8,
}


def products(stablehlo: str) -> dict[str, Products]:
    """Returns the matrix products and convolutions by the types of their operands."""
    tensors = r"\(tensor<([^>]*)>, tensor<([^>]*)>\) -> tensor<([^>]*)>"
    numbers: dict[str, int] = collections.Counter()
    flops: dict[str, int] = collections.Counter()
    for kind, rest, *shapes in re.findall(rf"stablehlo\.(dot_general|convolution)\b(.*): {tensors}", stablehlo):
        left, right, result = (shape.split("x") for shape in shapes)
        if kind == "dot_general":
            found = re.search(r"contracting_dims = \[([\d, ]*)\]", rest)
            summed = [int(left[int(axis)]) for axis in re.findall(r"\d+", found[1] if found else "")]
        else:  # all axes of the kernel but that of the features out
            (axes,) = re.findall(r"\]x\[([^\]]*)\]->", rest)
            summed = [int(n) for n, axis in zip(right[:-1], axes.split(", "), strict=True) if axis != "o"]
        types = f"{TYPES[left[-1]]} x {TYPES[right[-1]]}"
        numbers[types] += 1
        flops[types] += 2 * math.prod(summed) * math.prod(map(int, result[:-1]))
    return {types: Products(number, flops[types]) for types, number in numbers.items()}


def collectives(hlo: str) -> list[int]:
    """Returns the bytes of each operation across devices in a compiled program."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
    return [_bytes(shapes) for shapes in re.findall(rf"= (.*?) (?:{kinds})(?:-start)?\(", hlo)]


def loops(hlo: str) -> int:
    """Returns how many loops there are in a compiled program."""
    return len(re.findall(r" while\(", hlo))


def _bytes(shapes: str) -> int:
    found = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)
    return sum(
        BYTES[kind] * int(np.prod([int(n) for n in sizes.split(",") if n])) for kind, sizes in found if kind in BYTES
    )


def row(names: dict[str, str], program: Program) -> dict[str, str]:
    """Returns a row of the table."""
    memory, costs = program.compiled.memory_analysis(), program.compiled.cost_analysis() or {}
    text = program.compiled.as_text() or ""
    across = collectives(text)
    return names | {
        "s to compile": f"{program.seconds:.0f}",
        "arguments, MiB": f"{memory.argument_size_in_bytes / 2**20:.0f}" if memory else "",
        "temporaries, MiB": f"{memory.temp_size_in_bytes / 2**20:.0f}" if memory else "",
        "GFLOP": f"{costs['flops'] / 1e9:.0f}" if "flops" in costs else "",
        "GB accessed": f"{costs['bytes accessed'] / 1e9:.1f}" if "bytes accessed" in costs else "",
        "collectives": f"{len(across)}, {sum(across) / 2**20:.1f} MiB",
        "loops": str(loops(text)),
        "matrix products": _words(program.products),
    }


def _words(found: dict[str, Products]) -> str:
    """Returns how many products there are of each type, and their share of the FLOPs where there are several types."""
    total = sum(products.flops for products in found.values())
    share = {types: f" ({products.flops / total:.1%})" for types, products in found.items()} if len(found) > 1 else {}
    return ", ".join(f"{products.number} {types}{share.get(types, '')}" for types, products in sorted(found.items()))


def paper_config(experiment: str, dtype: str, batch: int) -> Any:
    """Returns the paper's config, with the batch that is asked for."""
    config = importlib.import_module(f"configs.{experiment}").get_config()
    config.dtype, config.batch_size = dtype, batch
    return config


def rows_of(target_name: str) -> Iterator[dict[str, str]]:
    """Yields the rows of a target as the flags ask for them."""
    given, target = flags.FLAGS, TARGETS[target_name]
    mesh = mesh_of(target)
    experiments = given.experiments or (EXPERIMENTS if target_name in WHOLE else ("quadratic",))
    dtypes = given.dtypes or (("float32", "bfloat16") if target_name in WHOLE else ("bfloat16",))
    batch = given.batch or max(128, 8 * mesh.size)
    for name, dtype in itertools.product(experiments, dtypes):
        experiment = experiment_for(target, paper_config(name, dtype, batch))
        for step, compiled in (("training", compile_training), ("evaluation", compile_evaluation)):
            names = {"target": target_name, "experiment": name, "type": dtype, "batch": str(batch), "step": step}
            yield row(names, compiled(experiment, mesh))


def main(_):
    rows = []
    for target in flags.FLAGS.target:
        for found in rows_of(target):
            print(", ".join(f"{name} {value}" for name, value in found.items()), flush=True)
            rows.append(found)
    print(f"jax {jax.__version__}")
    print(tabulate.tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    flags.DEFINE_multi_enum("target", list(TARGETS), list(TARGETS), "What to compile for; several times for several.")
    flags.DEFINE_list("experiments", [], "Which experiments; none: all for v5e-8 and h100-1, quadratic for others.")
    flags.register_validator("experiments", set(ALL).issuperset, f"There are {', '.join(ALL)}.")
    flags.DEFINE_list("dtypes", [], "float32, bfloat16; none: both for v5e-8 and h100-1, bfloat16 for others.")
    flags.register_validator("dtypes", {"float32", "bfloat16"}.issuperset, "There are float32 and bfloat16.")
    flags.DEFINE_integer("batch", 0, "Images in a step; 0: 128, or 8 for each device where that is more.")
    cli.run(main, config=False)
