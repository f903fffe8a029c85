"""Parameters of the paper's PyTorch code into ours.

    python -m attn_cnn.torch_import CHECKPOINT --config=configs/quadratic.py --workdir=runs/imported

CHECKPOINT is what training scripts save (a state dict, or a dict around one as {"epoch", "test_accuracy",
"model_state_dict"} or {"net", "acc", "epoch"}), a .safetensors file, or an .npz of the state dict. The workdir then
evaluates, and resumes from that epoch with a fresh optimizer.

PyTorch's Linear weights are (out, in), heads first on the axis that holds them; convolutions are (out, in, H, W).
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import safetensors.flax
from absl import flags
from etils import epath
from flax import traverse_util

from attn_cnn import cli, paths, schema
from attn_cnn.attention import layer_number
from attn_cnn.encodings import ENCODINGS, encoding_class
from attn_cnn.errors import UserError, first_line
from attn_cnn.model import abstract_variables, checked_model
from attn_cnn.training import workdir as workdir_lib
from attn_cnn.training.experiment import create_experiment, state_of

IGNORED = (".relative_indices", ".attention.self.R", ".num_batches_tracked")  # buffers that hold no parameters
WRAPPERS = ("model_state_dict", "state_dict", "net", "model")
PREFIXES = ("module.", "_orig_mod.")
VALUE_NAMES = {"value/kernel": "value.weight", "value/bias": "value.bias"}

_ATTENTION_LAYER = {
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp_in": "intermediate.dense",
    "mlp_out": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_TOP = {"patch_embedding": "features_upscale", "classifier": "classifier"}
_LEAF = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def import_state_dict(state_dict: Mapping[str, Any], model: ml_collections.ConfigDict) -> dict:
    """Returns the parameters in `state_dict` (PyTorch's names to arrays) as those of `create_model(model)`.

    Raises:
      UserError: a name is missing or left over, or a shape differs; all of them are named.
    """
    return import_variables(state_dict, model)["params"]


def import_variables(state_dict: Mapping[str, Any], model: ml_collections.ConfigDict) -> dict:
    """Returns what `import_state_dict` does and the ResNet's batch statistics, as {"params", "batch_stats"}."""
    model = checked_model(model)
    wanted = traverse_util.flatten_dict(abstract_variables(model))
    problems, used, variables = [], set(), {}
    for path, leaf in wanted.items():
        names = torch_names(path[1:], model)
        used.update(names)
        if missing := [name for name in names if name not in state_dict]:
            problems += [f"missing: {name}" for name in missing]
            continue
        arrays = [_as_array(state_dict[name]) for name in names]
        shape = torch_shape(path, wanted)
        misfits = [_misfit(*named, shape) for named in zip(names, arrays, strict=True)]
        if any(misfits):
            problems += filter(None, misfits)
        elif any(not np.array_equal(arrays[0], array) for array in arrays[1:]):
            problems.append(
                f"{names[0]} differs from layer to layer, though config.model.share_tables is True (the original "
                "code shares with its last layer only: import with share_tables False)"
            )
        else:
            variables[path] = _ours(path[-1], arrays[0].astype(np.float32), leaf.shape)
    left_over = [n for n in state_dict if n not in used and not n.endswith(IGNORED)]
    problems += [f"left over: {name}" for name in left_over]
    if problems:
        raise UserError(
            f"the state dict does not fit the config{_cause(state_dict, model)}:\n  " + "\n  ".join(problems)
        )
    return {"batch_stats": {}} | traverse_util.unflatten_dict(variables)


def _cause(state_dict: Mapping[str, Any], model: ml_collections.ConfigDict) -> str:
    """Returns the one thing that probably keeps a state dict from fitting, as the end of a sentence, or nothing."""
    names = set(map(str, state_dict))
    if "linear.weight" in names and model.name != "resnet18":
        return "; it is a ResNet's: give --config=configs/resnet18.py"
    if "classifier.weight" in names and model.name == "resnet18":
        return "; it is no ResNet's: give the config of its encoding"
    layers = {int(found[1]) for name in names if (found := re.match(r"encoder\.layer\.(\d+)\.", name))}
    if not layers or model.name == "resnet18":
        return ""
    prefix = "encoder.layer.0.attention.self."
    own = {name.removeprefix(prefix) for name in names if name.startswith(prefix) and not name.endswith(IGNORED)}
    fitting = [e.name for e in ENCODINGS.values() if {*e.torch_names.values(), *VALUE_NAMES.values()} == own]
    if fitting and model.encoding not in fitting:
        return f"; its encoding is {' or '.join(fitting)}: give --config=configs/{fitting[0]}.py"
    if len(layers) != model.layers:
        return f"; it has {len(layers)} layers: set config.model.layers"
    heads = tuple(
        _value_heads(state_dict.get(f"encoder.layer.{n}.attention.self.value.weight")) for n in sorted(layers)
    )
    if heads != schema.for_each_layer(model.heads, model.layers):
        given = ",".join(map(str, heads))
        return f'; its layers have {given} heads: set --config.model.heads="({given},)"'
    return ""


def _value_heads(weight: Any) -> int:
    """Returns the number of heads of a layer whose value map has the weight (features, heads * features), or none."""
    return 0 if weight is None else weight.shape[1] // weight.shape[0]


def _misfit(name: str, array: np.ndarray, shape: tuple[int, ...]) -> str | None:
    if array.dtype.kind not in "fiu":
        return f"{name} holds {array.dtype}, not numbers"
    if not np.isfinite(array).all():
        return f"{name} holds numbers that are not finite"
    if array.shape != shape:
        return f"{name} has shape {array.shape} instead of {shape}"
    return None


def torch_names(path: tuple[str, ...], model: ml_collections.ConfigDict) -> list[str]:
    """Returns where PyTorch keeps the parameter at `path`; several names where it keeps one of ours in every layer.

    Raises:
      UserError: the paper's code has no such parameter.
    """
    if model.name == "resnet18":
        return [_torch_resnet_name(path)]
    module, leaf = path[0], path[-1]
    if module in _TOP:
        return [f"{_TOP[module]}.{_LEAF[leaf]}"]
    if module.startswith("merge_"):
        raise UserError("the paper's code has no grid that halves; set config.model.merge_before to ().")
    if not module.startswith("layer_"):  # tables that all layers share
        return [_torch_attention_name(i, path, model) for i in range(model.layers)]
    layer = layer_number(module)
    if path[1] == "attention":
        return [_torch_attention_name(layer, path[2:], model)]
    if path[1] not in _ATTENTION_LAYER:
        raise UserError(f"the paper's code has no {path[1]} layers; set config.model.layer to attention.")
    return [f"encoder.layer.{layer}.{_ATTENTION_LAYER[path[1]]}.{_LEAF[leaf]}"]


def _torch_attention_name(layer: int, path: tuple[str, ...], model: ml_collections.ConfigDict) -> str:
    encoding, name = encoding_class(model.encoding), "/".join(path)
    names = encoding.torch_names | VALUE_NAMES
    if name not in names:
        raise UserError(f"the {encoding.name} encoding is not in the paper's code.")
    return f"encoder.layer.{layer}.attention.self.{names[name]}"


def _torch_resnet_name(path: tuple[str, ...]) -> str:
    *modules, leaf = path
    if leaf not in _LEAF:
        raise UserError("the paper's code has no ResNet of attention layers; set config.model.layer to convolution.")
    names = {"classifier": "linear", "shortcut": "shortcut.0", "shortcut_norm": "shortcut.1"}
    words = []
    for module in modules:
        if module.startswith("stage"):
            stage, block = module.removeprefix("stage").split("_block")
            words += [f"layer{int(stage) + 1}", block]
        else:
            words.append(names.get(module, module.replace("norm", "bn")))
    return ".".join([*words, _LEAF[leaf]])


def torch_shape(path: tuple[str, ...], variables: Mapping[tuple[str, ...], Any]) -> tuple[int, ...]:
    """Returns the shape that PyTorch gives the parameter at `path` of the flat `variables`."""
    leaf, shape = path[-1], variables[path].shape
    if leaf != "kernel":
        return shape if leaf != "bias" else (int(np.prod(shape)),)
    if len(shape) == 4:
        height, width, inputs, outputs = shape
        return (outputs, inputs, height, width)
    bias = variables.get((*path[:-1], "bias"))  # which has the axes of the outputs
    split = len(shape) - (bias.ndim if bias is not None else 1)
    return (int(np.prod(shape[split:])), int(np.prod(shape[:split])))


def to_torch(leaf: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns one of our parameters in PyTorch's layout, whose `shape` it has there."""
    if leaf != "kernel":
        return array.reshape(shape)
    if array.ndim == 4 and len(shape) == 4:
        return array.transpose(3, 2, 0, 1)
    return array.reshape(shape[::-1]).T


def _ours(leaf: str, array: np.ndarray, shape: tuple[int, ...]) -> jax.Array:
    if leaf == "kernel":
        array = array.transpose(2, 3, 1, 0) if len(shape) == 4 else array.T
    return jnp.asarray(array.reshape(shape))


def read_checkpoint(path: epath.Path) -> tuple[dict[str, np.ndarray], int, float | None]:
    """Returns the state dict, the number of finished epochs and the test accuracy of a file; no code in it is run.

    The state dict may stand alone or in what training scripts save around it, under one of `WRAPPERS`; names may begin
    with `module.` or `_orig_mod.`, which PyTorch's wrappers of models add; numbers may have half precision.

    Raises:
      UserError: the file is missing or is no such checkpoint, or PyTorch is needed and absent.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist.")
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors}
    content = readers.get(path.suffix, _read_pickle)(path)
    wrapper = next((name for name in WRAPPERS if isinstance(content.get(name), dict)), None)
    state_dict = _without_prefixes(content[wrapper] if wrapper else content)
    state_dict = {name: value for name, value in state_dict.items() if not name.endswith(IGNORED)}
    try:
        state_dict = {name: _as_array(value) for name, value in state_dict.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} holds more than the tensors of a state dict: {first_line(error)}") from None
    return state_dict, *_progress(path, content if wrapper else {})


def _progress(path: epath.Path, content: Mapping[str, Any]) -> tuple[int, float | None]:
    """Returns the number of finished epochs and the test accuracy that stand beside a state dict."""
    try:
        epochs = int(content["epoch"]) + 1 if "epoch" in content else 0
        accuracy = float(content["acc"]) / 100 if "acc" in content else content.get("test_accuracy")
        accuracy = None if accuracy is None else float(accuracy)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} has an epoch or accuracy that is no number: {first_line(error)}") from None
    if epochs < 0 or not (accuracy is None or 0 <= accuracy <= 1):
        raise UserError(f"{path} has epoch {epochs - 1} and test accuracy {accuracy}, which cannot be.")
    return epochs, accuracy


def _read_npz(path: epath.Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # NumPy raises whatever the file led to
        raise UserError(f"{path} is no .npz of plain arrays: {first_line(error)}") from None


def _read_safetensors(path: epath.Path) -> dict[str, Any]:
    try:
        return safetensors.flax.load(path.read_bytes())
    except Exception as error:  # of the file, each with types of its own
        raise UserError(f"{path} is no .safetensors file: {first_line(error)}") from None


def _read_pickle(path: epath.Path) -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"reading {path} needs PyTorch: pip install torch, or pass an .npz or .safetensors of the state dict."
        ) from None
    try:
        content = torch.load(os.fspath(path), map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises whatever the file led to
        raise UserError(f"{path} is no checkpoint that can be loaded safely: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__} instead of a state dict.")
    return content


def _without_prefixes(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the state dict without what PyTorch's wrappers of models put before every name."""
    state_dict = {str(name): value for name, value in state_dict.items()}
    for prefix in PREFIXES * 2:
        if state_dict and all(name.startswith(prefix) for name in state_dict):
            state_dict = {name.removeprefix(prefix): value for name, value in state_dict.items()}
    return state_dict


def _as_array(value: Any) -> np.ndarray:
    """Returns a tensor of PyTorch, or an array, as an array; of half precision in float32."""
    if hasattr(value, "detach"):  # of PyTorch, which may be absent
        value = value.detach()
        value = (value.float() if value.is_floating_point() else value).numpy()
    array = np.asarray(value)
    return array.astype(np.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array


def import_checkpoint(path: epath.Path, config: ml_collections.ConfigDict, workdir: epath.Path) -> int:
    """Makes `workdir` a run that has just finished the checkpoint's epochs; returns its step."""
    experiment = create_experiment(config)
    state_dict, epochs, accuracy = read_checkpoint(path)
    variables = import_variables(state_dict, experiment.config.model)
    step = min(epochs, experiment.config.epochs) * experiment.steps_per_epoch
    metrics = None if accuracy is None else {"test_accuracy": accuracy}
    workdir_lib.create(workdir, experiment.config, experiment.spec, state_of(experiment, variables, step), metrics)
    return step


def main(argv):
    step = import_checkpoint(
        paths.resolve(argv[1], "CHECKPOINT"), flags.FLAGS.config, workdir_lib.open_workdir(flags.FLAGS.workdir)
    )
    print(f"{flags.FLAGS.workdir} now holds {argv[1]}, at step {step}.")


def command() -> None:
    """Runs this command from a terminal."""
    flags.DEFINE_string("workdir", None, "The workdir to make.")
    flags.mark_flag_as_required("workdir")
    cli.run(main, arguments=("CHECKPOINT",))


if __name__ == "__main__":
    command()
