"""A trained network as a list of steps that the browser takes, one after another (`static/network.js`).

Each step is a dict with an `op` and its arrays. The current grid x, (H, W, features), goes in and comes out:

    patches side            concatenates each side x side patch's pixels
    linear kernel bias      x kernel + bias
    attention layer value bias padding stride    sum_h A_h x W_h + bias, with the probabilities of the view's `layer`;
                            in a ResNet also `path`, of the layer's parameters
    convolution kernel bias before after stride  zero-padded; kernel HWIO
    keep                    remembers x
    add shortcut            adds what was kept last, after the convolution `shortcut` where there is one
    norm scale bias epsilon  LayerNorm over features
    gelu, relu
    mean                    over the grid

Maps that follow one another without a nonlinearity are composed into one, and BatchNorm into the convolution before it,
in float64: the numbers are fewer and the function is the same.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float

from attn_cnn import resnet
from attn_cnn.model import LAYER_NORM_EPSILON
from attn_cnn.training.runs import Run

Step = dict[str, Any]


def steps(run: Run) -> list[Step]:
    """Returns the steps from a normalised image of a run to its logits."""
    if run.config.model.name == "resnet18":
        return list(_resnet(run.params, run.batch_stats))
    return list(_classifier(run.params, run.config.model.patch))


def size(steps: list[Step]) -> int:
    """Returns how many numbers the steps hold."""
    return sum(
        size([value]) if isinstance(value, dict) else getattr(value, "size", 0)
        for step in steps
        for value in step.values()
    )


def _float64(array: Any) -> Float[np.ndarray, "*shape"]:
    return np.asarray(array, np.float64)


def _linear(params: dict) -> Step:
    return {"op": "linear", "kernel": _float64(params["kernel"]), "bias": _float64(params["bias"])}


def _norm(params: dict) -> Step:
    scale, bias = _float64(params["scale"]), _float64(params["bias"])
    return {"op": "norm", "scale": scale, "bias": bias, "epsilon": LAYER_NORM_EPSILON}


def _classifier(params: dict, patch: int) -> Iterator[Step]:
    """Yields the steps of `model.Classifier`."""
    yield {"op": "patches", "side": patch}
    yield _linear(params["patch_embedding"])
    number, attention_layer = 0, 0
    while f"layer_{number}" in params:
        if f"merge_{number}" in params:
            yield {"op": "patches", "side": 2}
            yield _linear(params[f"merge_{number}"])
        layer = params[f"layer_{number}"]
        yield {"op": "keep"}
        yield from _mixer(layer, attention_layer)
        yield {"op": "add"}
        yield _norm(layer["attention_norm"])
        yield {"op": "keep"}
        yield _linear(layer["mlp_in"])
        yield {"op": "gelu"}
        yield _linear(layer["mlp_out"])
        yield {"op": "add"}
        yield _norm(layer["mlp_norm"])
        attention_layer += "kernel" in layer.get("attention", {}).get("value", {})
        number += 1
    yield {"op": "mean"}
    yield _linear(params["classifier"])


def _mixer(layer: dict, attention_layer: int) -> Iterator[Step]:
    """Yields what mixes the pixels of a layer, composed with the output map that follows."""
    output = {name: _float64(layer["attention_output"][name]) for name in ("kernel", "bias")}
    if "convolution" in layer:
        inner = layer["convolution"]["convolution"]
        kernel, bias = _float64(inner["kernel"]) @ output["kernel"], _float64(inner["bias"]) @ output["kernel"]
        before = (len(kernel) - 1) // 2
        after = len(kernel) - 1 - before
        yield _convolution(kernel, bias + output["bias"], before, after, 1)
        return
    value = layer["attention"]["value"]
    step = {"op": "attention", "bias": _float64(value["bias"]) @ output["kernel"] + output["bias"]}
    if "kernel" in value:
        step |= {"layer": attention_layer, "value": _float64(value["kernel"]) @ output["kernel"]}
    yield step | {"padding": 0, "stride": 1}


def _convolution(kernel: np.ndarray, bias: np.ndarray, before: int, after: int, stride: int) -> Step:
    return {"op": "convolution", "kernel": kernel, "bias": bias, "before": before, "after": after, "stride": stride}


def _resnet(params: dict, statistics: dict) -> Iterator[Step]:
    """Yields the steps of `resnet.ResNet18`, whose 3x3 convolutions may be attention."""
    attention_layer = 0

    def normalised(params, statistics, name, norm, stride, block="") -> Step:
        nonlocal attention_layer
        scale = _float64(params[norm]["scale"]) / np.sqrt(_float64(statistics[norm]["var"]) + resnet.BATCH_NORM_EPSILON)
        bias = _float64(params[norm]["bias"]) - _float64(statistics[norm]["mean"]) * scale
        if "value" in params[name]:
            value = _float64(params[name]["value"]["kernel"]) * scale
            bias += _float64(params[name]["value"]["bias"]) * scale
            path = f"{block}/{name}".removeprefix("/")
            step = {"op": "attention", "path": path, "layer": attention_layer, "value": value, "bias": bias}
            attention_layer += 1
            return step | {"padding": 1, "stride": stride}
        kernel = _float64(params[name]["kernel"]) * scale
        return _convolution(kernel, bias, len(kernel) // 2, len(kernel) // 2, stride)

    yield normalised(params, statistics, "conv1", "norm1", 1)
    yield {"op": "relu"}
    for name in (f"stage{stage}_block{block}" for stage in range(4) for block in range(resnet.BLOCKS_PER_STAGE)):
        block, seen = params[name], statistics[name]
        stride = 2 if "shortcut" in block and name != "stage0_block0" else 1
        yield {"op": "keep"}
        yield normalised(block, seen, "conv1", "norm1", stride, name)
        yield {"op": "relu"}
        yield normalised(block, seen, "conv2", "norm2", 1, name)
        add: Step = {"op": "add"}
        if "shortcut" in block:
            add["shortcut"] = normalised(block, seen, "shortcut", "shortcut_norm", stride)
        yield add
        yield {"op": "relu"}
    yield {"op": "mean"}
    yield _linear(params["classifier"])
