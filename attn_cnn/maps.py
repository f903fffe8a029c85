"""Attention maps as a file, ours or anyone's: an .npz of plain arrays that figures and reports read.

It holds the probabilities of all layers in one of two forms, and what goes with them:

    maps            (layers, [images,] heads, H, W, H, W): query grid, then key grid, as `attention_maps` returns them
    attentions      (layers, [images,] heads, N, N): query, then key; tokens row by row of the grid, after the prefix
    grid            (H, W), or one such row a layer; needed for attentions alone
    prefix_tokens   how many of the N come before the grid's, as class and register tokens; 0 where it is missing
    images          (images, height, width, channels), uint8: what the network looked at; may be missing

Layers whose grids or numbers of heads differ stand in arrays of their own, maps_0, maps_1, ... or attentions_0, ...,
without the axis of layers. Each query's probabilities sum to 1; half precision will do. Prefix tokens are left out as
queries and as keys, and what is left for a query is scaled to sum to 1 again: a convolution has nothing like them.
"""

import io
import logging
import re
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float, Shaped, UInt8

from attn_cnn import paths
from attn_cnn.errors import UserError, first_line

log = logging.getLogger("attn_cnn")

TOLERANCE = 0.01  # of the sum of a query's probabilities, which may be of half precision
AXES = {"maps": "[images,] heads, H, W, H, W", "attentions": "[images,] heads, N, N"}  # of one layer


class Maps(NamedTuple):
    """Attention maps of each layer, query grid then key grid, and the images they are of.

    Attributes:
      layers: probabilities that sum to 1 over the last two axes; of one image where they are the same for all.
      images: the images, as many as the maps are of; None: they are not known.
    """

    layers: list[Shaped[np.ndarray, "_ heads H W H W"]]
    images: UInt8[np.ndarray, "images height width channels"] | None = None


def write(path: epath.Path, maps: Maps) -> None:
    """Writes maps, in the precision that they have.

    Raises:
      UserError: the file cannot be written.
    """
    layers = [np.asarray(layer) for layer in maps.layers]
    if len({layer.shape for layer in layers}) == 1:
        arrays: dict[str, Any] = {"maps": np.stack(layers)}
    else:
        arrays = {f"maps_{number}": layer for number, layer in enumerate(layers)}
    if maps.images is not None:
        arrays["images"] = maps.images
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    paths.write(path, content.getvalue())


def read(path: epath.Path) -> Maps:
    """Returns the maps in the file, in float32; the log says what prefix tokens were left out.

    Raises:
      UserError: the file is missing or holds no attention maps; the message names the array and what is wrong with it.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist.")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            arrays = dict(content)
    except Exception as error:  # NumPy raises whatever the file led to
        raise UserError(f"{path} is no .npz of plain arrays: {first_line(error)}") from None
    grid, images = arrays.pop("grid", None), arrays.pop("images", None)
    prefix = _checked_prefix(path, arrays.pop("prefix_tokens", np.array(0)))
    form, named = _layers(path, arrays)
    layers = [_with_images(f"{name} in {path}", layer, form) for name, layer in named.items()]
    if form == "attentions":
        layers = _on_grids(path, layers, _checked_grids(path, grid, len(layers)), prefix)
    elif grid is not None or prefix:
        raise UserError(f"{path} has maps, whose axes say the grid; leave out grid and prefix_tokens.")
    return Maps(layers, _checked_images(path, images, layers))


def _layers(path: epath.Path, arrays: dict[str, np.ndarray]) -> tuple[str, dict[str, np.ndarray]]:
    """Returns the form that the arrays have, and the array of each layer by a name for messages."""
    forms = {name.partition("_")[0] for name in arrays}
    unknown = [name for name in arrays if not re.fullmatch(r"(maps|attentions)(_\d+)?", name)]
    if unknown or len(forms) != 1:
        problem = f"an array {unknown[0]!r}" if unknown else "both maps and attentions" if forms else "no maps"
        raise UserError(
            f"{path} holds {problem}; the arrays are maps, or attentions with grid and prefix_tokens, and images. "
            "Layers that differ in shape stand in maps_0, maps_1, ... or attentions_0, ..."
        )
    (form,) = forms
    if form in arrays:
        if len(arrays) > 1:
            raise UserError(f"{path} holds {' and '.join(sorted(arrays))}; leave {form} out, or the others.")
        if arrays[form].ndim == 0 or len(arrays[form]) == 0:
            shape = arrays[form].shape
            raise UserError(f"{form} in {path} has shape {shape}; it must be (layers, {AXES[form]}), none of them 0.")
        return form, {f"layer {number} of {form}": layer for number, layer in enumerate(arrays[form])}
    by_number = {int(name.partition("_")[2]): name for name in arrays}
    numbers = sorted(by_number)
    if numbers != list(range(len(arrays))):
        raise UserError(f"{path} holds layers {', '.join(map(str, numbers))}; number them from 0, none left out.")
    return form, {by_number[number]: arrays[by_number[number]] for number in numbers}


def _with_images(name: str, maps: np.ndarray, form: str) -> Float[np.ndarray, "images ..."]:
    """Returns the probabilities of one layer in float32, with an axis of images in front, once they are such."""
    axes = 6 if form == "maps" else 4
    fits = maps.ndim in (axes - 1, axes) and (form == "attentions" or maps.shape[-4:-2] == maps.shape[-2:])
    if not fits or 0 in maps.shape:
        raise UserError(f"{name} has shape {maps.shape}; it must be ({AXES[form]}), none of them 0.")
    if maps.dtype.kind != "f":
        raise UserError(f"{name} holds {maps.dtype}; probabilities are floating-point numbers.")
    maps = maps.astype(np.float32)
    if not np.isfinite(maps).all() or maps.min() < 0:
        raise UserError(f"{name} holds numbers that are no probabilities (negative or not finite); apply the softmax.")
    sums = maps.sum((-2, -1) if form == "maps" else -1)
    worst = sums.flat[np.abs(sums - 1).argmax()]
    if abs(worst - 1) > TOLERANCE:
        raise UserError(f"{name} has a query whose probabilities sum to {worst:.3g}; they must sum to 1 over its keys.")
    return maps if maps.ndim == axes else maps[None]


def _checked_grids(path: epath.Path, grid: np.ndarray | None, layers: int) -> list[tuple[int, int]]:
    """Returns the grid of each layer."""
    if grid is None:
        raise UserError(f"{path} holds attentions, but no grid; add grid=(H, W).")
    if grid.shape not in ((2,), (layers, 2)) or grid.dtype.kind not in "iu" or grid.min() < 1:
        raise UserError(
            f"the grid in {path} is {grid.tolist()}; it must be two whole numbers, rows and columns, or two a layer."
        )
    return [tuple(row) for row in np.broadcast_to(grid, (layers, 2)).tolist()]


def _checked_prefix(path: epath.Path, prefix: np.ndarray) -> int:
    if prefix.shape != () or prefix.dtype.kind not in "iu" or prefix < 0:
        raise UserError(f"prefix_tokens in {path} is {prefix.tolist()}; it must be a whole number, 0 or more.")
    return int(prefix)


def _checked_images(path: epath.Path, images: np.ndarray | None, layers: list[np.ndarray]) -> np.ndarray | None:
    counts = sorted({len(layer) for layer in layers} - {1})
    if len(counts) > 1:
        raise UserError(f"{path} has layers with maps of {counts[0]} and of {counts[1]} images; give all the same.")
    if images is None:
        return None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise UserError(
            f"images in {path} is {images.dtype} of shape {images.shape}; it must be uint8, (images, height, width, "
            "channels) with 1 or 3 channels."
        )
    for number, layer in enumerate(layers):
        if len(layer) not in (1, len(images)):
            raise UserError(f"{path} has maps of {len(layer)} images in layer {number}, but {len(images)} images.")
    return images


def _on_grids(
    path: epath.Path, layers: list[np.ndarray], grids: list[tuple[int, int]], prefix: int
) -> list[Float[np.ndarray, "images heads H W H W"]]:
    """Returns the maps between the pixels of the grids alone, and says what was left out."""
    kept = [_on_grid(f"layer {n} of {path}", layer, grids[n], prefix) for n, layer in enumerate(layers)]
    if prefix:
        share = np.mean([share for _, share in kept])
        log.info(
            "%s: prefix tokens (%d) are left out; what pixels attended to them, %.1f%%, is scaled onto the grid.",
            path, prefix, 100 * (1 - share),
        )  # fmt: skip
    return [maps for maps, _ in kept]


def _on_grid(
    name: str, maps: np.ndarray, grid: tuple[int, int], prefix: int
) -> tuple[Float[np.ndarray, "images heads H W H W"], float]:
    """Returns the maps between the pixels of the grid, and the share of their probability that fell on the grid."""
    images, heads, queries, keys = maps.shape
    tokens = prefix + grid[0] * grid[1]
    if (queries, keys) != (tokens, tokens):
        raise UserError(
            f"{name} has {queries} queries and {keys} keys; a grid of {grid[0]}x{grid[1]} with {prefix} prefix tokens "
            f"has {tokens} of each."
        )
    pixels = maps[:, :, prefix:, prefix:]
    sums = pixels.sum(-1, keepdims=True)
    if sums.min() <= 0:
        raise UserError(f"{name} has a query that attends to prefix tokens alone; leave its head or its layer out.")
    return (pixels / sums).reshape(images, heads, *grid, *grid), float(sums.mean())
