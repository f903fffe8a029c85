"""Training steps on a GPU: quadratic and learned heads against 3x3 convolutions and against PyTorch's dense form.

    pip install -U "jax[cuda13]" torch
    python -m benchmarks.gpu                                  # the paper's model, batches of 100 and of 1,000
    python -m benchmarks.gpu --batches=1000 --types=bfloat16

float32 means exact products, tf32 those of the tensor cores for float32. The card's rate is that of products of large
matrices in the same type. Our steps and the convolution's also crop, flip and normalise their images; PyTorch's gets
them ready. It runs op by op and, as "compiled", through `torch.compile`.
"""

import itertools
import statistics
from typing import Any, NamedTuple

import jax
import tabulate
from absl import flags

from attn_cnn import cli
from attn_cnn.errors import UserError
from attn_cnn.mixing import Device
from attn_cnn.training.experiment import Experiment
from benchmarks import common
from configs import learned, quadratic

ENDLESS = Device("gpu", 2**62)  # everything in one block, nothing computed twice: what a step has to compute


class Type(NamedTuple):
    """How numbers are multiplied.

    Attributes:
      dtype: type of the computation.
      precision: of float32 products, as JAX calls it.
    """

    dtype: str
    precision: str = "default"


TYPES = {"float32": Type("float32", "highest"), "tf32": Type("float32"), "bfloat16": Type("bfloat16")}


def step_side(experiment: Experiment) -> common.Side:
    """Returns a training step, with the FLOPs that its formula has, before any compiler changes them."""
    once, _, counted = common.training_step(experiment, common.for_device(experiment, ENDLESS))
    costs = counted.cost_analysis()
    assert costs is not None  # XLA has them
    return common.Side(once, experiment.config.batch_size, costs["flops"])


def torch_side(config: Any, kind: Type, compiled: bool) -> common.Side:
    """Returns PyTorch's training step of the dense form, on random images."""
    import torch

    from benchmarks.torch_dense import QuadraticClassifier, training_step

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = QuadraticClassifier(config.model).to(device)
    images = torch.randn(config.batch_size, *config.model.image_shape, device=device)
    labels = torch.randint(config.model.classes, (config.batch_size,), device=device)
    step = training_step(torch.compile(model) if compiled else model, images, labels, getattr(torch, kind.dtype))

    def once():
        torch.backends.cuda.matmul.allow_tf32 = kind.precision == "default"
        step()
        if device == "cuda":
            torch.cuda.synchronize()

    return common.Side(once, config.batch_size)


def matmul_side(kind: Type, size: int) -> common.Side:
    """Returns products of square matrices in a row, whose FLOPs are known without a compiler."""
    a, products = common.random_square(size, kind.dtype), jax.jit(common.products)
    return common.Side(lambda: jax.block_until_ready(products(a)), flops=common.PRODUCTS * 2 * size**3)


def sides_of(kind: Type, batch: int) -> dict[str, common.Side]:
    """Returns what is compared in one type at one batch, with all that it compiles compiled."""

    def experiment(module: Any, **model: Any) -> Experiment:
        module_config = module.get_config()
        module_config.dtype, module_config.batch_size = kind.dtype, batch
        module_config.model.update(dropout=0.0, attention_dropout=0.0, **model)
        return common.on_random_images(module_config, max(batch, common.EXAMPLES))

    config = experiment(quadratic).config
    return {
        "convolution": step_side(experiment(quadratic, layer="convolution")),
        "quadratic": step_side(experiment(quadratic)),
        "learned": step_side(experiment(learned)),
        "PyTorch": torch_side(config, kind, compiled=False),
        "PyTorch, compiled": torch_side(config, kind, compiled=True),
        "matmul": matmul_side(kind, flags.FLAGS.matmul),
    }


def rows_of(type_name: str, batch: int) -> list[dict[str, str]]:
    """Measures one type at one batch; returns the rows of the table."""
    kind = TYPES[type_name]
    with jax.default_matmul_precision(kind.precision):
        sides = sides_of(kind, batch)
        seconds = common.alternate(sides, flags.FLAGS.rounds)
    card = sides["matmul"].flops / statistics.median(seconds["matmul"])
    rows = []
    for name, side in sides.items():
        low, median, high = statistics.quantiles(seconds[name], n=4, method="inclusive")
        rows.append(
            {
                "type": type_name,
                "batch": str(batch) if side.images else "",
                "": name,
                "ms (quartiles)": f"{1e3 * median:.2f} ({1e3 * low:.2f}-{1e3 * high:.2f})",
                "images/s": f"{side.images / median:,.0f}" if side.images else "",
                "speed/convolution": f"{common.ratio(seconds, name, 'convolution'):.2f}" if side.images else "",
                "speed/PyTorch": f"{common.ratio(seconds, name, 'PyTorch'):.2f}" if side.images else "",
                "TFLOP/s": f"{side.flops / median / 1e12:.3g}" if side.flops else "",
                "of matmul": f"{side.flops / median / card:.0%}" if side.flops else "",
            }
        )
    return rows


def main(_):
    given = flags.FLAGS
    try:
        import torch
    except ImportError:
        raise UserError("PyTorch, which this compares with, is not installed: pip install torch.") from None
    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        raise UserError("JAX sees a GPU and PyTorch does not; install a PyTorch for CUDA.")
    device = jax.local_devices()[0]
    print(f"{device.device_kind}, {device.platform}, jax {jax.__version__}, PyTorch {torch.__version__}", flush=True)
    rows = []
    for type_name, batch in itertools.product(given.types, map(int, given.batches)):
        rows += rows_of(type_name, batch)
        print(f"{type_name}, batch {batch}: measured", flush=True)
    print(tabulate.tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    flags.DEFINE_multi_enum("types", list(TYPES), list(TYPES), "How numbers are multiplied; several times for several.")
    flags.DEFINE_list("batches", ["100", "1000"], "Images in a step.")
    flags.register_validator("batches", common.are_positive, "Give whole numbers above 0, as in 100,1000.")
    flags.DEFINE_integer("rounds", 20, "Steps of each side.", lower_bound=2)
    flags.DEFINE_integer("matmul", 8192, "Side of the matrices whose product gives the card's rate.", lower_bound=1)
    cli.run(main, config=False)
