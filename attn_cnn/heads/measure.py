"""What each head does, in numbers: where it looks on average, how far, how sharply, and whether it is degenerate.

All but the entropy follows from the mean attention by shift, over the queries q of the grid and the images:

    P_h[d] = mean_q A_h[q, q + d],        nonlocality_h = sum_d P_h[d] |d|        (d'Ascoli et al. 2021, section 4)

which is the outer product of two short vectors where the probabilities are `Factors` that all queries share.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import entr
from jaxtyping import Array, Float, Int, Shaped

from attn_cnn.attention import LayerHeads, heads_of_layers
from attn_cnn.encodings import Encoding
from attn_cnn.mixing import Factors, Probabilities, Weighted, Whole, weighted_sum

IMAGES = 64  # of the test set, over which heads that see content are measured

Numbers = dict[str, Array]  # of the heads of one layer, by name; heads in front


class Attended(NamedTuple):
    """Where heads look, averaged over queries and images.

    Attributes:
      by_shift: probability of each shift of the grid; shift (0, 0) is in the middle.
      entropy: of a query's probabilities, in nats.
      central: probabilities of the query in the middle of the grid, [H // 2, W // 2].
    """

    by_shift: Float[Array, "heads shifts_of_rows shifts_of_columns"]
    entropy: Float[Array, "heads"]
    central: Float[Array, "heads H W"]

    @classmethod
    def of(cls, A: Probabilities, weight: Float[Array, ""] | float) -> "Attended":
        """Returns what the queries of one image attend to, times the weight of the image."""
        seen = by_shift(A)
        row, column = ((side + 1) // 2 // 2 for side in seen.shape[1:])
        return jax.tree.map(lambda values: weight * values, cls(seen, entropy(A), of_query(A, row, column)))


def attended(layer: LayerHeads, weights: Float[Array, "batch"]) -> Attended:
    """Returns the sum over images of what their queries attend to, times the `weights` of the images.

    With weights that sum to 1, on one device or over several, it is the mean.
    """
    encoding, x = layer
    if not encoding.needs_x:
        x, weights = x[:1], weights.sum(keepdims=True)

    def of_image(weighted):
        image, weight = weighted
        return Attended.of(encoding.probabilities(image), weight)

    return jax.tree.map(lambda values: values.sum(0), jax.lax.map(of_image, (x, weights)))


def by_shift(A: Probabilities) -> Float[Array, "heads shifts_of_rows shifts_of_columns"]:
    """Returns the mean over queries of the probability of each shift; of shifts out of the grid it is 0."""
    einsum = functools.partial(jnp.einsum, precision="highest")
    if isinstance(A, Weighted):
        return weighted_sum(A.weights, [by_shift(part) for part in A.parts])
    if isinstance(A, Whole):
        _, height, width, _, _ = A.values.shape
        return einsum("hijkl,ikr,jlc->hrc", A.values, _shift_of(height), _shift_of(width)) / (height * width)
    _, height, columns_of_rows, _ = A.row.shape
    _, rows_of_columns, width, _ = A.column.shape
    rows = einsum("hijk,ikr->hijr", A.row, _shift_of(height))
    columns = einsum("hijl,jlc->hijc", A.column, _shift_of(width))
    if columns_of_rows == rows_of_columns == 1:  # all queries share the factors
        return rows.mean((1, 2))[:, :, None] * columns.mean((1, 2))[:, None]
    grid = (len(rows), height, width)
    rows, columns = (jnp.broadcast_to(factor, (*grid, factor.shape[-1])) for factor in (rows, columns))
    return einsum("hijr,hijc->hrc", rows, columns) / (height * width)


def of_query(A: Probabilities, row: int, column: int) -> Float[Array, "heads H W"]:
    """Returns the probabilities of one query pixel."""
    if isinstance(A, Weighted):
        return weighted_sum(A.weights, [of_query(part, row, column) for part in A.parts])
    if isinstance(A, Whole):
        return A.values[:, row, column]
    # An axis of size 1 stands for all queries.
    rows = A.row[:, row, column % A.row.shape[2]]
    columns = A.column[:, row % A.column.shape[1], column]
    return rows[:, :, None] * columns[:, None]


def _shift_of(side: int) -> Float[Array, "{side} {side} 2*{side}-1"]:
    """Returns 1 where the shift from the query (first axis) to the key is that of the last axis, else 0."""
    along = jnp.arange(side)
    return jax.nn.one_hot(along - along[:, None] + side - 1, 2 * side - 1)


def entropy(A: Probabilities) -> Float[Array, "heads"]:
    """Returns the mean over queries of the entropy of their probabilities, in nats."""
    if isinstance(A, Factors):  # of independent variables it is the sum
        return entr(A.row).sum(-1).mean((1, 2)) + entr(A.column).sum(-1).mean((1, 2))
    return entr(A.whole().values).sum((-2, -1)).mean((1, 2))


def head_numbers(encoding: Encoding, seen: Attended) -> Numbers:
    """Returns what the heads of a layer do, by the names that `history` documents."""
    height, width = seen.central.shape[1:]
    rows, columns = jnp.arange(1 - height, height), jnp.arange(1 - width, width)
    return numbers_of_maps(seen) | _parameters(encoding, rows, columns) | encoding.numbers()


def of_maps(maps: Shaped[Array | np.ndarray, "images heads H W H W"]) -> dict[str, np.ndarray]:
    """Returns the numbers of the heads of one layer, given their attention maps of some images."""
    of_image = jax.jit(lambda image: Attended.of(Whole(image), 1 / len(maps)))
    seen = [of_image(jnp.asarray(image, jnp.float32)) for image in maps]
    return jax.tree.map(np.asarray, numbers_of_maps(jax.tree.map(lambda *values: sum(values), *seen)))


def numbers_of_maps(seen: Attended) -> Numbers:
    """Returns what can be said of heads whose maps alone are known."""
    P = seen.by_shift
    height, width = ((side + 1) // 2 for side in P.shape[1:])
    rows, columns = jnp.arange(1 - height, height), jnp.arange(1 - width, width)
    d = jnp.stack(jnp.meshgrid(rows, columns, indexing="ij"), -1).astype(jnp.float32)
    einsum = functools.partial(jnp.einsum, precision="highest")
    mean = einsum("hrc,rcx->hx", P, d)
    off = d - mean[:, None, None]
    covariance = einsum("hrc,hrcx,hrcy->hxy", P, off, off)
    ring = jnp.abs(d).max(-1)
    return {
        "grid": jnp.broadcast_to(jnp.array([height, width], jnp.float32), mean.shape),
        "mean_shift": mean,
        "covariance": covariance,
        "condition_number": condition_number(covariance),
        "nonlocality": einsum("hrc,rc->h", P, jnp.linalg.norm(d, axis=-1)),
        "entropy": seen.entropy,
        "mass_3x3": P.sum((1, 2), where=ring <= 1),
        "mass_5x5": P.sum((1, 2), where=ring <= 2),
        "most_attended_shift": d.reshape(-1, 2)[P.reshape(len(P), -1).argmax(-1)],
    }


def _parameters(encoding: Encoding, rows: Int[Array, "rows"], columns: Int[Array, "columns"]) -> Numbers:
    """Returns what position alone scores: centers and precisions, or else the row and column terms at every shift."""
    if gaussians := encoding.gaussians():
        centers, precisions = gaussians
        return {"center": centers, "precision": precisions, "condition_number": condition_number(precisions)}
    if encoding.needs_x or not encoding.separable:
        return {}
    row, column = encoding.terms(rows[:, None], columns[None])

    def below_largest(scores):  # a softmax sees no constant, and float16 is finest near 0
        return (scores - scores.max(-1, keepdims=True)).astype(jnp.float16)

    return {"row_scores": below_largest(row[:, :, 0]), "column_scores": below_largest(column[:, 0])}


def condition_number(matrices: Float[Array, "heads 2 2"]) -> Float[Array, "heads"]:
    """Returns the larger eigenvalue over the smaller of symmetric matrices; infinite where that is none above 0."""
    a, b, c = matrices[:, 0, 0], matrices[:, 0, 1], matrices[:, 1, 1]
    largest = (a + c) / 2 + jnp.hypot((a - c) / 2, b)
    product = a * c - b * b
    return jnp.where(product > 0, largest**2 / product, jnp.inf)


def measure(
    module: nn.Module,
    params: dict,
    images: Float[Array, "batch height width channels"],
    weights: Float[Array, "batch"] | None = None,
    axis: str | None = None,
    central: bool = False,
) -> dict[int, Numbers]:
    """Returns the numbers of the heads of each attention layer, by the layer's number.

    Args:
      module: an attention model of `create_model`.
      params: its parameters.
      images: normalised images, NHWC, over which to average; position-only encodings see their shape alone.
      weights: of the images, with sum 1; None: the same for all.
      axis: mapped axis over which the images are spread; the weights sum to 1 over all of it.
      central: whether `Attended.central` is among the numbers, too, where heads are no Gaussians.
    """
    weights = jnp.full(len(images), 1 / len(images)) if weights is None else weights
    layers = heads_of_layers(module, params, images)
    seen = {number: attended(layer, weights) for number, layer in layers.items()}
    seen = jax.lax.psum(seen, axis) if axis else seen
    numbers = {number: head_numbers(layer.encoding, seen[number]) for number, layer in layers.items()}
    for number, layer in layers.items():
        if central and (layer.encoding.needs_x or layer.encoding.gaussians() is None):
            numbers[number]["central"] = seen[number].central
    return numbers


def stacked(by_layer: Mapping[int, Mapping[str, Shaped[Array, "heads *shape"]]], layers: int) -> dict[str, np.ndarray]:
    """Returns the numbers of a model of so many `layers` as arrays by name, with axes layer, head, and their own.

    They are NaN where a layer has fewer heads than another, or fewer shifts; shift 0 stays in the middle.
    """
    result = {}
    for name in {name: None for numbers in by_layer.values() for name in numbers}:
        arrays = {layer: np.asarray(numbers[name]) for layer, numbers in by_layer.items() if name in numbers}
        shape = tuple(map(max, zip(*(array.shape for array in arrays.values()), strict=True)))
        result[name] = np.full((layers, *shape), np.nan, next(iter(arrays.values())).dtype)
        for layer, array in arrays.items():
            starts = (0, *((large - small) // 2 for large, small in zip(shape[1:], array.shape[1:], strict=True)))
            place = tuple(slice(start, start + size) for start, size in zip(starts, array.shape, strict=True))
            result[name][layer][place] = array
    return result


def encodings(module: nn.Module, params: dict, image_shape: tuple[int, int, int]) -> dict[int, Encoding]:
    """Returns the encoding of each attention layer that has heads, by the layer's number."""
    layers = jax.jit(functools.partial(heads_of_layers, module))(params, jnp.zeros((1, *image_shape)))
    return {number: layer.encoding for number, layer in layers.items()}


def degenerate(module: nn.Module, params: dict, image_shape: tuple[int, int, int]) -> dict[int, dict[int, str]]:
    """Returns of each attention layer the heads that do nothing of use, each with the reason and the value."""
    return {number: encoding.degenerate() for number, encoding in encodings(module, params, image_shape).items()}
