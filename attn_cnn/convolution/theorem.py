"""Convolution to attention and back, as pure functions on parameters (paper, Theorem 1).

    sum_Delta W[Delta] x[q + Delta]  =  sum_h A_h x W_h     with A_h[q, k] = 1 where k = q + Delta_h, W_h = W[Delta_h]

A quadratic head with center Delta_h is that one-hot A_h in the limit of large spreads. The other way, a head whose
scores depend on the shift d alone has a kernel P_h[d], and the layer is the convolution with sum_h P_h[d] W_h, up to
what the border of the grid cuts off.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attn_cnn.attention import Padding, SelfAttention, check_window
from attn_cnn.encodings import ENCODINGS, Encoding, encoding_class, window
from attn_cnn.errors import UserError

EXACT_SPREAD = 16.0  # from s^2 of about 207, exp(-s^2 / 2) is 0 in float32 and every probability is exactly 0 or 1


def attention_from_convolution(
    kernel_hwio: Float[Array | np.ndarray, "rows columns inputs outputs"],
    bias: Float[Array | np.ndarray, "outputs"] | None = None,
    *,
    spread: float,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    padding: Padding = "SAME",
) -> dict:
    """Returns the parameters of the attention layer that expresses a convolution (paper, Theorem 1).

    They are those of `attention.ConvolutionalAttention(features, kernel_size, stride, dilation, padding)`: `centers`
    (heads, 2) in pixels, `spreads` (heads), `value/kernel` (heads, in, out) and `value/bias` (out), in float32.

    Args:
      kernel_hwio: the kernel, as `lax.conv_general_dilated` takes it with dimension numbers ("NHWC", "HWIO", "NHWC").
      bias: what the convolution adds to each channel; None: nothing.
      spread: s_h of every head, in 1/pixels; exact to float32 rounding at `EXACT_SPREAD`, below it to `error_bound`.
      stride: step from one output to the next, in pixels; the layer applies it, here it is checked.
      dilation: step from one pixel of the kernel to the next, in pixels.
      groups: number of groups that the channels are in; `inputs` are the channels in of one group.
      padding: zeros around the grid, as the layer has it; here it is checked.

    Raises:
      UserError: there is no such convolution, or the spread is not above 0.
    """
    rows, columns, inputs, outputs = kernel_hwio.shape
    check_window((rows, columns), stride, dilation, padding)
    _check(outputs, groups, spread)
    by_group = jnp.asarray(kernel_hwio, jnp.float32).reshape(rows * columns, inputs, groups, outputs // groups)
    diagonal = by_group[:, None] * jnp.eye(groups)[:, None, :, None]  # channels of group f reach those of f alone
    return {
        "centers": jnp.asarray(dilation * window(rows, columns), jnp.float32),
        "spreads": jnp.full(rows * columns, spread, jnp.float32),
        "value": {
            "kernel": diagonal.reshape(rows * columns, groups * inputs, outputs),
            "bias": jnp.zeros(outputs) if bias is None else jnp.asarray(bias, jnp.float32),
        },
    }


def _check(outputs: int, groups: int, spread: float) -> None:
    if groups < 1 or outputs % groups:
        raise UserError(f"groups is {groups}, which does not divide the {outputs} channels out.")
    if not spread > 0:
        raise UserError(f"spread is {spread}; it must be above 0. At {EXACT_SPREAD} the layer is exact.")


def probability_off_target(spread: float) -> float:
    """Returns the most that a head with its center on a pixel of the grid can attend to other pixels.

    Along one axis the pixel at distance n has exp(-1/2 s^2 n^2) times the probability of the target, so on an endless
    grid the target has 1 / theta(s) of it, with theta(s) = sum_n exp(-1/2 s^2 n^2) over all integers n, and more where
    the grid ends. Both axes together leave 1 - theta(s)^-2 for other pixels.

    Args:
      spread: s, in 1/pixels.
    """
    furthest = math.ceil(40 / spread)  # from where a term is below exp(-800), which is 0 in float64
    beside = 2 * np.exp(-0.5 * (spread * np.arange(1, furthest + 1)) ** 2).sum()
    return float(-np.expm1(-2 * np.log1p(beside)))


def error_bound(
    kernel_hwio: Float[Array | np.ndarray, "rows columns inputs outputs"], spread: float, largest: float
) -> float:
    """Returns the most by which any output of the attention layer can differ from that of the convolution.

    A head moves at most epsilon(s), its `probability_off_target`, from its target to other pixels, so each of them
    changes the output by at most 2 epsilon(s) max|x| sum_i |W_h[i, o]|. Rounding comes on top.

    Args:
      kernel_hwio: the convolution's kernel.
      spread: s_h of every head, in 1/pixels.
      largest: max|x|, the largest absolute value of the input.
    """
    weights = np.abs(np.asarray(kernel_hwio, np.float64)).sum((0, 1, 2)).max()
    return 2 * probability_off_target(spread) * largest * float(weights)


class _Declared(SelfAttention):
    """The encoding of an attention layer, by itself."""

    @nn.compact
    def __call__(self, features: int) -> Encoding:  # type: ignore[override]  # Flax lets one method declare
        """Returns the encoding that the parameters make, for pixels of `features` numbers."""
        return encoding_class(self.encoding).declare(self, features, None)


def position_encoding(params: dict) -> Encoding:
    """Returns the encoding that the parameters of a position-only attention layer make; their names and shapes tell it.

    Args:
      params: the layer's parameters, the tables that layers share included.

    Raises:
      UserError: they are those of no such layer.
    """
    if "kernel" not in params.get("value", {}):
        raise UserError(
            f"these parameters ({', '.join(sorted(params))}) are not those of one attention layer with heads; give "
            'those of one, as in params["layer_0"]["attention"].'
        )
    heads, features, _ = params["value"]["kernel"].shape
    table = params.get("row_embeddings")
    sizes = {} if table is None else {"max_side": (len(table) + 1) // 2, "embedding_size": table.shape[1]}
    own = {name: value for name, value in params.items() if name != "value"}
    candidates = [name for name, encoding in ENCODINGS.items() if not encoding.needs_x]
    for name in candidates:
        module = _Declared(name, heads, **sizes)
        wanted = jax.eval_shape(lambda module=module: module.init(jax.random.key(0), features))["params"]
        if jax.tree.map(jnp.shape, wanted) == jax.tree.map(jnp.shape, own):
            encoding: Any = module.apply({"params": own}, features)
            return encoding
    raise UserError(
        f"these parameters ({', '.join(sorted(params))}) are of no layer whose attention depends on positions alone "
        f"({', '.join(candidates)}); only such a layer is a convolution. Tables that layers share go with them."
    )


def kernels_by_shift(encoding: Encoding, grid: tuple[int, int]) -> Float[Array, "heads rows columns"]:
    """Returns each head's ideal kernel P_h[d], as on a grid without a border; shift 0 is in the middle.

    It is the softmax of the scores over all shifts d that a grid has, (2H - 1) x (2W - 1) of them.

    Args:
      encoding: position-only heads.
      grid: its rows and columns, H and W.
    """
    rows, columns = (jnp.arange(1 - side, side) for side in grid)
    return jax.nn.softmax(encoding.scores(rows[:, None], columns[None, :]), (-2, -1))


def convolution_from_attention(params: dict, grid: tuple[int, int]) -> Float[Array, "rows columns inputs outputs"]:
    """Returns the kernel, HWIO, of the convolution that a position-only attention layer is away from the border.

    It is sum_h P_h[d] W_h over the shifts d of the grid, (2H - 1) x (2W - 1) of them, shift 0 in the middle: pad with
    ((H - 1, H - 1), (W - 1, W - 1)) to apply it, and add the layer's `value/bias`. At query q the layer differs from
    the zero-padded convolution by at most `border_bound`, since softmax renormalises what the border cuts off.

    Args:
      params: the layer's parameters, the tables that layers share included.
      grid: the rows and columns of its grid, H and W.

    Raises:
      UserError: they are of no position-only layer, or the grid is larger than its tables cover.
    """
    kernels = kernels_by_shift(checked_encoding(params, grid), grid)
    return jnp.einsum("hrc,hio->rcio", kernels, params["value"]["kernel"], precision="highest")


def checked_encoding(params: dict, grid: tuple[int, int]) -> Encoding:
    """Returns `position_encoding(params)`; raises UserError where it has no scores for some shifts of the grid."""
    encoding = position_encoding(params)
    table = params.get("row_embeddings", ())
    encoding.check_grid(*grid, max_side=(len(table) + 1) // 2)
    return encoding


def outside(kernels: Float[Array, "heads rows columns"]) -> Float[Array, "heads H W"]:
    """Returns how much of each head's kernel by shift, P_h, lies outside the grid when seen from each query.

    Args:
      kernels: P_h over (2H - 1) x (2W - 1) shifts, as from `kernels_by_shift`.
    """
    _, rows, columns = kernels.shape
    height, width = (rows + 1) // 2, (columns + 1) // 2
    # The grid as query (i, j) sees it begins at shift (-i, -j), which is entry (H - 1 - i, W - 1 - j).
    inside = jax.lax.reduce_window(kernels, 0.0, jax.lax.add, (1, height, width), (1, 1, 1), "VALID")[:, ::-1, ::-1]
    return jnp.maximum(1 - inside, 0)


def border_bound(params: dict, grid: tuple[int, int], largest: float) -> Float[Array, "H W outputs"]:
    """Returns the most by which a layer's output can differ from the convolution of `convolution_from_attention`.

    What is inside the grid has probability P_h[d] / (1 - out_h[q]) at query q instead of P_h[d], with out_h the part of
    P_h outside: the sum of the changes is out_h[q], and the output changes by at most
    sum_h out_h[q] max|x| sum_i |W_h[i, o]|. Rounding comes on top.

    Args:
      params: the layer's parameters, the tables that layers share included.
      grid: the rows and columns of its grid, H and W.
      largest: max|x|, the largest absolute value of the input.
    """
    out = outside(kernels_by_shift(checked_encoding(params, grid), grid))
    weights = jnp.abs(params["value"]["kernel"]).sum(1)
    return largest * jnp.einsum("hij,ho->ijo", out, weights, precision="highest")
