"""The numbers of every head over a run's epochs: `heads.npz` in its workdir, which figures and the page read.

Arrays by name, with axes epoch, layer, head and what stands here; NaN where a layer has fewer heads than another:

    grid 2                  rows and columns of the layer's grid
    mean_shift 2            attended shift in pixels of the grid, averaged over queries (and the first test images)
    covariance 2 2          of that shift
    center 2                where the head is a Gaussian (of gated heads, the positional part)
    precision 2 2           of that Gaussian, its inverse covariance
    row_scores shift        of other position-only heads, the row term of the score, float16, up to a constant
    column_scores shift     its column term
    condition_number        of the precision, or else of the covariance
    nonlocality             mean distance to the attended pixel, weighted by attention
    entropy                 of a query's probabilities, in nats
    mass_3x3, mass_5x5      attention within that window around the query
    most_attended_shift 2   the shift with the largest probability
    gate                    of gated heads, g_h

and, with the axis epoch alone, `epoch`, counted from 1, and `step`. `replay` makes attention maps from them.
"""

import io
import logging
import uuid
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float

from attn_cnn import paths
from attn_cnn.encodings import look_up, shifts
from attn_cnn.errors import UserError, first_line

log = logging.getLogger("attn_cnn")

NAME = "heads.npz"


class History:
    """The numbers of a run, in memory and in its file, which is whole at any moment.

    What the checkpoint of `step` does not know of is dropped: later epochs and, unless it was `evaluated`, its own.
    """

    def __init__(self, workdir: epath.Path, step: int, evaluated: bool):
        self._path = workdir / NAME
        self._arrays = _read_or_move_aside(self._path)
        if self._arrays:
            steps = self._arrays["step"]
            kept = (steps < step) | ((steps == step) & evaluated)
            self._arrays = {name: array[kept] for name, array in self._arrays.items()}

    def append(self, epoch: int, step: int, numbers: Mapping[str, np.ndarray]) -> None:
        """Adds one epoch's numbers, and writes the file.

        Raises:
          UserError: it cannot be written.
        """
        new = {"epoch": np.int32(epoch), "step": np.int32(step), **numbers}
        self._arrays = appended(self._arrays, new)
        try:
            content = io.BytesIO()
            np.savez(content, **self._arrays)  # type: ignore[arg-type]  # none is called allow_pickle
            temporary = self._path.with_name(f"{NAME}.writing")
            temporary.write_bytes(content.getvalue())
            temporary.replace(self._path)
        except Exception as error:  # each file system has errors of its own
            raise UserError(f"the heads' numbers cannot be written to {self._path}: {first_line(error)}") from None


def appended(arrays: Mapping[str, np.ndarray], new: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns `arrays`, of some epochs, with one epoch more; NaN where only one side has an array of a name."""
    epochs, result = len(arrays.get("epoch", ())), {}
    if not epochs:
        return {name: np.asarray(value)[None] for name, value in new.items()}
    for name in {**arrays, **new}:
        row = np.asarray(new[name]) if name in new else np.full_like(arrays[name][0], np.nan)
        before = arrays[name] if name in arrays else np.full((epochs, *row.shape), np.nan, row.dtype)
        result[name] = np.concatenate([before, row[None]])
    return result


def read(workdir: epath.PathLike) -> dict[str, np.ndarray]:
    """Returns the numbers of the run in `workdir`, by name.

    Raises:
      UserError: there are none, or they are damaged.
    """
    path = paths.resolve(workdir, "the workdir") / NAME
    if not path.exists():
        raise UserError(f"{path} does not exist: the run has no heads, or has finished no epoch with this version.")
    try:
        return _read(path)
    except Exception as error:  # NumPy raises whatever the file led to
        raise UserError(f"{path} is damaged: {first_line(error)}") from None


def replay(numbers: Mapping[str, np.ndarray], epoch: int, layer: int) -> Float[Array, "heads H W H W"]:
    """Returns the attention probabilities of position alone, query grid then key grid.

    They are those that the heads had, but for rounding; of gated heads, those of the positional part.

    Args:
      numbers: what `read` returned.
      epoch: which of its epochs, from 0.
      layer: the layer's number.

    Raises:
      UserError: the layer has no heads, or their probabilities depend on the image.
    """
    of_layer = {name: array[epoch, layer] for name, array in numbers.items() if array.ndim > 2}
    present = ~np.isnan(of_layer["grid"][:, 0])
    if not present.any():
        raise UserError(f"layer {layer} has no heads to replay.")
    of_layer = {name: array[present] for name, array in of_layer.items()}
    rows, columns = shifts(*map(int, of_layer["grid"][0]))
    if "precision" in of_layer:
        d = jnp.stack(jnp.broadcast_arrays(rows, columns), -1) - of_layer["center"][:, None, None, None, None]
        scores = -0.5 * jnp.einsum("hijklx,hxy,hijkly->hijkl", d, of_layer["precision"], d, precision="highest")
    elif "row_scores" in of_layer:
        row, column = (jnp.asarray(of_layer[f"{axis}_scores"], jnp.float32) for axis in ("row", "column"))
        scores = look_up(row, rows) + look_up(column, columns)
    else:
        raise UserError("these heads look where the image says, so that numbers alone do not replay them.")
    return jax.nn.softmax(scores, (-2, -1))


def scalars(numbers: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Returns the numbers of one epoch that TensorBoard draws, by tags as heads/nonlocality/layer_0_head_3."""
    result = {}
    for name, array in numbers.items():
        if name == "grid" or array.ndim > 3 or name.endswith("_scores"):
            continue
        parts = {name: array} if array.ndim == 2 else {f"{name}_row": array[..., 0], f"{name}_column": array[..., 1]}
        for part, values in parts.items():
            for layer, head in np.argwhere(np.isfinite(values)):
                result[f"heads/{part}/layer_{layer}_head_{head}"] = float(values[layer, head])
    return result


def evenly(epochs: int, number: int) -> list[int]:
    """Returns at most `number` places among so many epochs, evenly spread, with the first and the last."""
    return np.unique(np.linspace(0, epochs - 1, min(number, epochs)).round().astype(int)).tolist()


def _read(path: epath.Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def _read_or_move_aside(path: epath.Path) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    try:
        return _read(path)
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        log.warning("%s is damaged (%s): the heads' numbers begin anew.", path, first_line(error))
        path.replace(path.with_name(f"{NAME}.damaged-{uuid.uuid4().hex[:8]}"))
        return {}
    except paths.file_errors() as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
