"""A trained ResNet with its 3x3 convolutions expressed as attention (paper, Theorem 1): the same function, a run.

At `theorem.EXACT_SPREAD` the logits are the same up to rounding, and no gradient moves a head. A run to train on starts
from a smaller spread, as `--spread=3.16` (s^2 = 10), at some cost in accuracy, which is printed.
"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import tabulate
from etils import epath
from jaxtyping import Array, Float, UInt8

from attn_cnn.attention import ConvolutionalAttention
from attn_cnn.convolution.theorem import attention_from_convolution
from attn_cnn.errors import UserError
from attn_cnn.model import create_model
from attn_cnn.predict import accuracy, logits, network
from attn_cnn.report import count_parameters
from attn_cnn.training import data
from attn_cnn.training import workdir as workdir_lib
from attn_cnn.training.experiment import create_experiment, precision_of, state_of
from attn_cnn.training.runs import Run, load_run

LAYER_IMAGES = 100  # that layers are compared and timed on
ROUNDS = 5


class Layer(NamedTuple):
    """A convolution of a network beside the attention layer that expresses it.

    Attributes:
      name: its path in the network.
      kernel: shape of its kernel, HWIO.
      grid: rows and columns of its output.
      error: the largest difference between the outputs, relative to the largest absolute value of an output.
      seconds: time of the convolution and of the attention layer, for `LAYER_IMAGES` images.
      parameters: numbers that the convolution and the attention layer hold.
    """

    name: str
    kernel: tuple[int, ...]
    grid: tuple[int, int]
    error: float
    seconds: tuple[float, float]
    parameters: tuple[int, int]


class Expressed(NamedTuple):
    """What became of a network that was expressed as attention, on the test set."""

    layers: list[Layer]
    logits: float  # the largest difference of any logit
    agreement: float  # share of the images that get the same class
    accuracies: tuple[float, float]  # before and after
    seconds: tuple[float, float]  # to compile and evaluate both


def is_convolution(params: dict) -> bool:
    """Returns whether these are a convolution's parameters whose kernel has more than one pixel."""
    kernel = params.get("kernel")
    return kernel is not None and kernel.ndim == 4 and kernel.shape[:2] != (1, 1)


def expressed_params(params: dict, spread: float) -> dict:
    """Returns a ResNet's parameters with those of attention layers for each K x K convolution."""
    if is_convolution(params):
        return attention_from_convolution(params["kernel"], spread=spread)
    return {n: expressed_params(value, spread) if isinstance(value, dict) else value for n, value in params.items()}


def expressed_config(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns the config of a ResNet's run, with attention in the place of convolutions.

    Raises:
      UserError: it is no ResNet's, or has attention layers already.
    """
    if config.model.name != "resnet18" or config.model.layer == "attention":
        reason = f"is no ResNet's (config.model.name is {config.model.name})"
        if config.model.name == "resnet18":
            reason = "has attention layers already (config.model.layer is attention)"
        raise UserError(f"the run {reason}; express a run of configs/resnet18.py with its convolutions.")
    config = config.copy_and_resolve_references()
    config.model.layer = "attention"
    return config


def express_run(run: Run, spread: float) -> Run:
    """Returns the run with each of its K x K convolutions expressed as attention."""
    config, params = expressed_config(run.config), expressed_params(run.params, spread)
    return run._replace(model=create_model(config.model, config.dtype), params=params, config=config)


def compare_layers(run: Run, spread: float, images: UInt8[np.ndarray, "_ height width channels"]) -> list[Layer]:
    """Returns each K x K convolution of the network beside its attention layer, both given what reaches it there."""
    found = []

    def keep(next_call, args, kwargs, context):
        out = next_call(*args, **kwargs)
        module = context.module
        if isinstance(module, nn.Conv) and is_convolution(module.variables["params"]):
            found.append((module.path, module.clone(parent=None), module.variables["params"], args[0]))
        return out

    with precision_of(run.config):
        network(run, run.variables, images[:LAYER_IMAGES], keep)
        return [compare("/".join(path), module, params, x, spread) for path, module, params, x in found]


def compare(name: str, convolution: nn.Conv, params: dict, x: Float[Array, "_ H W in"], spread: float) -> Layer:
    """Returns a convolution of the network beside its attention layer, both given `x`."""
    conv: Any = convolution  # Flax allows padding and strides of more forms than a ResNet has
    pads = ((conv.padding,) * 2,) * 2
    attention = ConvolutionalAttention(conv.features, conv.kernel_size, conv.strides[0], padding=pads, dtype=conv.dtype)
    theirs = attention_from_convolution(params["kernel"], spread=spread, padding=pads)
    sides = [
        functools.partial(jax.jit(layer.apply), {"params": parameters}, x)
        for layer, parameters in ((convolution, params), (attention, theirs))
    ]
    expected, y = (np.asarray(side(), np.float64) for side in sides)
    of_convolution, of_attention = alternate(sides)
    return Layer(
        name=name,
        kernel=params["kernel"].shape,
        grid=expected.shape[1:3],
        error=float(np.abs(y - expected).max() / np.abs(expected).max()),
        seconds=(of_convolution, of_attention),
        parameters=(count_parameters(params), count_parameters(theirs)),
    )


def alternate(functions: Sequence[Callable[[], Array]]) -> tuple[float, ...]:
    """Returns the median seconds of each function, which take turns since a machine's speed drifts."""
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(ROUNDS):
        for function, taken in zip(functions, seconds, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready(function())
            taken.append(time.perf_counter() - begin)
    return tuple(map(statistics.median, seconds))


def express(workdir: epath.PathLike, out: epath.PathLike, spread: float, step: int | str = "newest") -> Expressed:
    """Makes `out` the run in `workdir` with its convolutions as attention, and returns how the two compare.

    Raises:
      UserError: there is no run, it has no convolutions to express, or `out` holds a run.
    """
    run, out = load_run(workdir, step), workdir_lib.open_workdir(out)
    workdir_lib.check_new(out)
    ours = express_run(run, spread)
    test = data.load_with_test_set(run.config.data)
    seconds, both = [], []
    for side in (run, ours):
        begin = time.perf_counter()
        both.append(logits(side, test.test_images))
        seconds.append(time.perf_counter() - begin)
    before, after = (accuracy(side, test.test_labels) for side in both)
    state = state_of(create_experiment(ours.config, run.spec), ours.variables, run.step)
    workdir_lib.create(out, ours.config, run.spec, state, {"test_accuracy": after})
    return Expressed(
        layers=compare_layers(run, spread, test.test_images),
        logits=float(np.abs(both[0] - both[1]).max()),
        agreement=float((both[0].argmax(-1) == both[1].argmax(-1)).mean()),
        accuracies=(before, after),
        seconds=(seconds[0], seconds[1]),
    )


def describe(expressed: Expressed) -> str:
    """Returns the table of layers and the comparison of the networks, to read."""
    rows = [
        [
            layer.name,
            "x".join(map(str, layer.kernel)),
            "x".join(map(str, layer.grid)),
            f"{layer.error:.1e}",
            *(f"{1e3 * seconds:.2f}" for seconds in layer.seconds),
            *(f"{number:,}" for number in layer.parameters),
        ]
        for layer in expressed.layers
    ]
    headers = ["layer", "kernel", "grid", "error", "ms, convolution", "ms, attention"]
    headers += ["parameters, convolution", "parameters, attention"]
    before, after = expressed.accuracies
    return "\n".join(
        [
            tabulate.tabulate(rows, headers, disable_numparse=True, stralign="right"),
            "",
            f"largest difference of a logit   {expressed.logits:.2e}",
            f"images that get the same class  {expressed.agreement:.2%}",
            f"test accuracy                   {before:.4f} as convolutions, {after:.4f} as attention",
            "evaluation, with compilation    {:.1f} s as convolutions, {:.1f} s as attention".format(
                *expressed.seconds
            ),
        ]
    )
