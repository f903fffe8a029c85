"""Parameters of a run into the paper's PyTorch names, for `load_state_dict(..., strict=False)` of its models.

    python -m attn_cnn.torch_export --workdir=RUN OUT.pt

OUT is a .pt file like those that the paper's code saves, {"epoch", "model_state_dict"}, or the state dict alone as
.safetensors or .npz. Importing what was exported gives the same parameters.
"""

import io
from typing import Any

import ml_collections
import numpy as np
import safetensors.numpy
from absl import flags
from etils import epath
from flax import traverse_util

from attn_cnn import cli, paths
from attn_cnn.errors import UserError
from attn_cnn.torch_import import to_torch, torch_names, torch_shape
from attn_cnn.training.runs import Run, load_run

SUFFIXES = (".pt", ".safetensors", ".npz")


def export_variables(variables: dict[str, Any], model: ml_collections.ConfigDict) -> dict[str, np.ndarray]:
    """Returns {"params", "batch_stats"} as a state dict under the paper's PyTorch names.

    Raises:
      UserError: the paper's code has no such parameters.
    """
    flat, state_dict = traverse_util.flatten_dict(variables), {}
    for path, leaf in flat.items():
        array = np.ascontiguousarray(to_torch(path[-1], np.asarray(leaf), torch_shape(path, flat)))
        for name in torch_names(path[1:], model):
            state_dict[name] = array
    return state_dict


def export_run(run: Run, path: epath.Path) -> None:
    """Writes the parameters of `run` to `path`, in the format of its ending.

    Raises:
      UserError: the ending is unknown, PyTorch is needed and absent, or the file cannot be written.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} must end in one of {', '.join(SUFFIXES)}.")
    state_dict = export_variables(run.variables, run.config.model)
    content = io.BytesIO()
    if path.suffix == ".pt":
        _write_pickle(run, state_dict, path, content)
    elif path.suffix == ".npz":
        np.savez(content, **state_dict)  # type: ignore[arg-type]  # none is called allow_pickle
    else:
        content.write(safetensors.numpy.save(state_dict))
    paths.write(path, content.getvalue())


def _write_pickle(run: Run, state_dict: dict[str, np.ndarray], path: epath.Path, file: io.BytesIO) -> None:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"writing {path} needs PyTorch: pip install torch, or name a file that ends in .npz or .safetensors."
        ) from None
    content = {"model_state_dict": {name: torch.tensor(array) for name, array in state_dict.items()}}
    epochs = run.step // (run.spec.train_size // run.config.batch_size)
    torch.save(content | {"epoch": epochs - 1}, file)


def main(argv):
    path = paths.resolve(argv[1], "OUT")
    run = load_run(flags.FLAGS.workdir, cli.step())
    export_run(run, path)
    print(f"{path} now holds step {run.step} of {flags.FLAGS.workdir}.")


def command() -> None:
    """Runs this command from a terminal."""
    flags.DEFINE_string("workdir", None, "The run's workdir.")
    flags.mark_flag_as_required("workdir")
    cli.define_step()
    cli.run(main, arguments=("OUT",), config=False)


if __name__ == "__main__":
    command()
