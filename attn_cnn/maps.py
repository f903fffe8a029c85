"""Attention maps as a file, ours or anyone's: an .npz of plain arrays that figures and reports read.

    layer_0, layer_1, ...   the probabilities of each layer, in one of two forms:
        (images, heads, H, W, H, W)        query grid, then key grid, as `attention.attention_maps` returns them
        (images, heads, tokens, tokens)    query, then key; row by row of the grid, after the special tokens
    grid                    (H, W); needed for the second form alone
    special_tokens          number of tokens before the grid's, as a class token; 0 where it is missing

Each query's probabilities sum to 1. Where they do not depend on the image, `images` may be 1. Half precision will do.
Special tokens are left out as queries and as keys, and what is left for a query is scaled to sum to 1 again, since a
convolution has nothing like them.
"""

import re

import numpy as np
from etils import epath
from jaxtyping import Float, Shaped

from attn_cnn.errors import UserError, first_line

TOLERANCE = 0.01  # of the sum of a query's probabilities, which may be of half precision

Maps = list[Float[np.ndarray, "_ _ _ _ _ _"]]  # for each layer: images heads H W H W


def write_maps(path: epath.Path, maps: list[Shaped[np.ndarray, "_ _ _ _ _ _"]]) -> None:
    """Writes one array a layer, (images, heads, H, W, H, W).

    Raises:
      UserError: the file cannot be written.
    """
    try:
        with path.open("wb") as file:
            np.savez_compressed(file, **{f"layer_{i}": np.asarray(layer) for i, layer in enumerate(maps)})
    except OSError as error:
        raise UserError(f"{path} cannot be written: {first_line(error)}") from None


def read_maps(path: epath.Path) -> Maps:
    """Returns the maps of each layer in the file, (images, heads, H, W, H, W) in float32.

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
    grid, special = arrays.pop("grid", None), arrays.pop("special_tokens", np.array(0))
    unknown = [name for name in arrays if not re.fullmatch(r"layer_\d+", name)]
    if unknown or not arrays:
        problem = f"an array {unknown[0]!r}" if unknown else "no layers"
        raise UserError(f"{path} holds {problem}; the arrays are layer_0, layer_1, ..., grid and special_tokens.")
    numbers = sorted(int(name.removeprefix("layer_")) for name in arrays)
    if numbers != list(range(len(numbers))):
        raise UserError(f"{path} holds layers {', '.join(map(str, numbers))}; number them from 0, none left out.")
    grid, special = _checked_grid(path, grid), _checked_special(path, special)
    return [_checked_layer(f"layer_{i} of {path}", arrays[f"layer_{i}"], grid, special) for i in numbers]


def _checked_grid(path: epath.Path, grid: np.ndarray | None) -> tuple[int, int] | None:
    if grid is None:
        return None
    if grid.shape != (2,) or grid.dtype.kind not in "iu" or grid.min() < 1:
        raise UserError(f"the grid in {path} is {grid.tolist()}; it must be two whole numbers, rows and columns.")
    return tuple(grid.tolist())


def _checked_special(path: epath.Path, special: np.ndarray) -> int:
    if special.shape != () or special.dtype.kind not in "iu" or special < 0:
        raise UserError(f"special_tokens in {path} is {special.tolist()}; it must be a whole number, 0 or more.")
    return int(special)


def _checked_layer(name: str, maps: np.ndarray, grid: tuple[int, int] | None, special: int) -> np.ndarray:
    """Returns the maps of one layer, (images, heads, H, W, H, W); `name` says whose they are."""
    if maps.dtype.kind != "f":
        raise UserError(f"{name} holds {maps.dtype}; probabilities are floating-point numbers.")
    if 0 in maps.shape:
        raise UserError(f"{name} has shape {maps.shape}, without any numbers.")
    if maps.ndim == 4:
        maps = _check_probabilities(name, maps, (-1,))
        return _of_grid(name, maps, grid, special)
    if maps.ndim != 6 or maps.shape[2:4] != maps.shape[4:]:
        raise UserError(
            f"{name} has shape {maps.shape}; it must be (images, heads, H, W, H, W) or (images, heads, tokens, tokens)."
        )
    for what, given in (("a grid", grid), ("special tokens", special)):
        if given:
            raise UserError(f"{name} has axes H, W, H, W, beside which the file has {what}; leave one of them out.")
    return _check_probabilities(name, maps, (-2, -1))


def _check_probabilities(name: str, maps: np.ndarray, keys: tuple[int, ...]) -> np.ndarray:
    """Returns the maps in float32, once they are probabilities over the axes `keys`."""
    maps = maps.astype(np.float32)
    if not np.isfinite(maps).all() or maps.min() < 0:
        raise UserError(f"{name} holds numbers that are no probabilities (negative or not finite); apply the softmax.")
    sums = maps.sum(keys)
    worst = sums.flat[np.abs(sums - 1).argmax()]
    if abs(worst - 1) > TOLERANCE:
        raise UserError(f"{name} has a query whose probabilities sum to {worst:.3g}; they must sum to 1 over its keys.")
    return maps


def _of_grid(name: str, maps: np.ndarray, grid: tuple[int, int] | None, special: int) -> np.ndarray:
    """Returns the maps between the pixels of the grid alone."""
    images, heads, tokens, keys = maps.shape
    if grid is None:
        raise UserError(f"{name} has tokens, {tokens} of them, but the file no grid; add grid=(H, W).")
    if tokens != keys or tokens != special + grid[0] * grid[1]:
        raise UserError(
            f"{name} has {tokens} queries and {keys} keys; a grid of {grid[0]}x{grid[1]} with {special} special tokens "
            f"has {special + grid[0] * grid[1]} of each."
        )
    pixels = maps[:, :, special:, special:]
    sums = pixels.sum(-1, keepdims=True)
    if sums.min() <= 0:
        raise UserError(f"{name} has a query that attends to special tokens alone; leave its head or its layer out.")
    return (pixels / sums).reshape(images, heads, *grid, *grid)
