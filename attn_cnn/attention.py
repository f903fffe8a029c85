"""Multi-head self-attention over a pixel grid, where every head mixes the whole hidden vector (paper, eq. 3).

    y_h[q] = sum_k A_h[q, k] x[k],        output = sum_h y_h W_h + b

The scores are an encoding's (`encodings.py`); the sums over keys and heads, and the forms that probabilities have, are
in `mixing.py`. This file puts them together: parameters, dropout, the form to mix in. `ConvolutionalAttention` is the
layer that Theorem 1 puts in a convolution's place.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from attn_cnn import schema
from attn_cnn.encodings import FIELDS, Encoding, Parts, Quadratic, encoding_class, window
from attn_cnn.errors import UserError
from attn_cnn.layers import Bias, Linear, LinearMap
from attn_cnn.mixing import Device, Factors, Fixed, Probabilities, attend_in_blocks, choose_blocks, this_device

FORMS = schema.choice("auto", "factored", "dense")
DROPPED = schema.choice("probabilities", "factors", default="probabilities")
WORDS = {  # attributes of SelfAttention that are one of some words
    "start": FIELDS["init"],
    "content_start": FIELDS["content_init"],
    "mixing": FORMS,
    "dropout_on": DROPPED,
}
ATTRIBUTES = {  # of SelfAttention, by what config.model calls them
    "embedding_size": "embedding_size",
    "init": "start",
    "init_spread": "init_spread",
    "content_init": "content_start",
    "mixing": "mixing",
    "attention_dropout": "dropout",
    "attention_dropout_on": "dropout_on",
}

Padding = str | tuple[tuple[int, int], tuple[int, int]]  # "SAME", "VALID", or ((top, bottom), (left, right))


def in_layer(field: str) -> str:
    """Returns what messages call a field of `config.model` where the layer is used alone."""
    return f"SelfAttention.{ATTRIBUTES[field]}" if field in ATTRIBUTES else "the number of features"


def check_form(
    encoding: type[Encoding], mixing: str, dropout: float, dropout_on: str, called: Callable[[str], str]
) -> None:
    """Raises UserError if the encoding's probabilities have no factors where `mixing` or `dropout_on` asks for them.

    A message calls a field of `config.model` as `called` does.
    """
    if mixing == "factored" and not encoding.separable:
        raise UserError(
            f"{called('mixing')} is factored, but the {encoding.name} score is no sum of a row and a column term, so "
            "its softmax has no factors; set it to auto or dense."
        )
    if mixing == "factored" and dropout and dropout_on == "probabilities":
        rate, on = called("attention_dropout"), called("attention_dropout_on")
        raise UserError(
            f"{called('mixing')} is factored, but dropout on the probabilities ({rate} is {dropout}) breaks the "
            f"product of factors; set it to auto, {rate} to 0, or {on} to factors."
        )
    if dropout_on == "factors" and not encoding.separable:
        raise UserError(
            f"{called('attention_dropout_on')} is factors, but the {encoding.name} encoding has none; "
            "set it to probabilities."
        )


class DroppedHeads(struct.PyTreeNode):
    """Heads with the dropout of one step, in the form that they mix in."""

    encoding: Encoding
    keys: Array | None  # heads: random keys, where there is dropout
    rate: float = struct.field(pytree_node=False)
    dropout_on: str = struct.field(pytree_node=False)
    dense: bool = struct.field(pytree_node=False)

    @property
    def whole(self) -> bool:
        """Whether the probabilities are held whole before they mix."""
        on_probabilities = self.keys is not None and self.dropout_on == "probabilities"
        return self.dense or on_probabilities or not self.encoding.separable

    @jax.named_scope("probabilities")
    def probabilities(self, image: Float[Array, "H W features"], index: Int[Array, ""] | int) -> Probabilities:
        """Returns the probabilities for one image, some of them dropped.

        Where they depend on the image, each image has masks of its own; otherwise all images have the same, as in the
        paper's code.
        """
        A = self.encoding.probabilities(image)
        if self.keys is None:
            return A.whole() if self.dense else A
        keys = self.keys
        if self.encoding.needs_x:
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
        if self.dropout_on == "probabilities":
            return A.whole().drop(keys, self.rate)
        A = A.drop(keys, self.rate)
        return A.whole() if self.dense else A


class SelfAttention(nn.Module):
    """One attention layer, with any of the encodings.

    Attributes:
      encoding: one of `encodings.ENCODINGS`.
      heads: number of heads; with none, the layer adds its bias alone.
      max_side: largest side of the grid that the learned tables cover.
      embedding_size: width of the learned tables; 0: what the encoding calls for.
      start: how the heads' centers start: "random", "grid", on the window of a convolution, or "impulse", each anywhere
        in it. It is config.model.init; a Flax module has an `init` of its own.
      init_spread: spread of heads that start in a window; sqrt(2) is ConViT's.
      content_start: how query and key start where there is content: "random", or "mimetic", with a product near a
        multiple of the identity. It is config.model.content_init.
      mixing: "factored", "dense", or "auto": factored wherever it is exact, which dropout on the probabilities is not.
        Factors that differ from query to query (learned_query) are multiplied before they mix in any case.
      dropout: rate at which a probability is dropped.
      dropout_on: "probabilities", each by itself, or "factors": entries of R and C, so that whole rows and columns of
        the grid drop out together and mixing stays factored. Both leave the expected probabilities as they are.
      dtype: type of the computation; parameters and softmax are float32.
      device: what the layer's work is cut into blocks for; None: the device that JAX computes on.
    """

    encoding: str
    heads: int
    max_side: int = 16
    embedding_size: int = 0
    start: str = "random"
    init_spread: float = 2**0.5
    content_start: str = "random"
    mixing: str = "auto"
    dropout: float = 0.0
    dropout_on: str = "probabilities"
    dtype: Any = jnp.float32
    device: Device | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch H W features"],
        then: LinearMap | None = None,
        tables: Any = None,
        *,
        train: bool = False,
    ) -> Float[Array, "batch H W out"]:
        """Mixes the grid and applies the value map.

        Args:
          x: the grids.
          then: a linear map to apply after the value map; the two may be composed into one.
          tables: the encoding's shared tables; None: the layer has its own.
          train: whether to drop probabilities, with the random stream "dropout".

        Raises:
          UserError: there is no such encoding, start or form, they contradict each other, the grid is larger than
            learned tables cover, or its features are odd where a query is halved.
        """
        batch, height, width, features = x.shape
        x = x.astype(self.dtype)
        encoding_type = self._checked_encoding(height, width, features)
        if not self.heads:
            return self._bias_alone(x, then)

        encoding = encoding_type.declare(self, features, tables)
        self._sow(encoding, x)
        kernel_shape = (self.heads, features, features)
        value = Linear(kernel_shape, (features,), self.heads * features, name="value")()
        # Two linear maps in a row are one; composing them pays where there are more pixels than rows of the kernel.
        if then is not None and _more(batch, height * width, self.heads * features):
            value, then = value.then(then), None

        y = self._attend(encoding, x, value.kernel, drop=train and self.dropout > 0) + value.bias
        return (then(y.astype(self.dtype)) if then is not None else y).astype(self.dtype)

    def _checked_encoding(self, height: int, width: int, features: int) -> type[Encoding]:
        """Returns the encoding, once it goes with the other attributes and with grids of this shape."""
        schema.check({name: getattr(self, name) for name in WORDS}, WORDS, "SelfAttention.")
        encoding = encoding_class(self.encoding)
        check_form(encoding, self.mixing, self.dropout, self.dropout_on, in_layer)
        values = {field: getattr(self, name) for field, name in ATTRIBUTES.items() if field in FIELDS}
        encoding.check_reads(values, in_layer)
        encoding.check_width(features, self.embedding_size, in_layer)
        encoding.check_grid(height, width, self.max_side)
        return encoding

    def _attend(self, encoding: Encoding, x: Array, kernel: Array, drop: bool) -> Array:
        """Returns sum_h A_h x W_h."""
        batch, height, width, features = x.shape
        keys = jax.random.split(self.make_rng("dropout"), self.heads) if drop else None
        heads = DroppedHeads(encoding, keys, self.dropout, self.dropout_on, self.mixing == "dense")
        blocks = choose_blocks(
            batch,
            self.heads,
            height * width,
            features,
            needs_x=encoding.needs_x,
            whole=heads.whole,
            device=self.device or this_device(),
        )
        return attend_in_blocks(heads, x, kernel, blocks, encoding.needs_x)

    def _bias_alone(self, x: Array, then: LinearMap | None) -> Array:
        """Returns what a layer without heads adds."""
        bias = Bias(x.shape[-1], name="value")()
        y = jnp.broadcast_to(bias.astype(self.dtype), x.shape)
        return (then(y) if then is not None else y).astype(self.dtype)

    def _sow(self, encoding: Encoding, x: Array) -> None:
        """Leaves penalties, probabilities, and the heads with what they see, for callers that collect them."""
        if encoding.penalty is not None and not self.is_initializing():
            self.sow("losses", "condition_penalty", encoding.penalty())
        if self.is_mutable_collection("intermediates"):
            mapped = x if encoding.needs_x else x[:1]
            maps = jax.lax.map(lambda image: encoding.probabilities(image).whole().values, mapped)
            self.sow("intermediates", "probabilities", maps)
        if self.is_mutable_collection("heads") and not self.is_initializing():
            self.sow("heads", "encoding", encoding)
            self.sow("heads", "x", x)


def _more(batch: Any, pixels: int, rows: int) -> bool:
    """Returns whether a batch has more pixels than `rows`; one of symbolic size, as in jax.export, counts as large."""
    return jax.export.is_symbolic_dim(batch) or batch * pixels > rows


class ConvolutionalAttention(nn.Module):
    """One quadratic attention layer in the place of a convolution (paper, Theorem 1).

    It pads the grid with zeros as `lax.conv_general_dilated` does, attends on the padded grid, and keeps the queries
    at which the convolution has an output: it crops the others, and subsamples where there is a stride. Head h starts
    at the h-th pixel of the kernel's window. Where the spreads make the probabilities exactly one-hot, the layer is the
    convolution whose kernel has W_h at that pixel; `convolution.attention_from_convolution` gives such parameters.

    Attributes:
      features: channels out.
      kernel_size: rows and columns of the window; there is a head for each of its pixels.
      stride: step from one query to the next, in pixels.
      dilation: step from one pixel of the window to the next, in pixels.
      padding: zeros around the grid: "SAME", "VALID", or ((top, bottom), (left, right)).
      spread: spread s_h that the heads start with, in 1/pixels; at the default, s^2 = 10, gradients move them.
      dtype: type of the computation; parameters and softmax are float32.
      device: what the layer's work is cut into blocks for; None: the device that JAX computes on.
    """

    features: int
    kernel_size: tuple[int, int]
    stride: int = 1
    dilation: int = 1
    padding: Padding = "SAME"
    spread: float = 10**0.5
    dtype: Any = jnp.float32
    device: Device | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "batch H W channels"]) -> Float[Array, "batch H2 W2 features"]:
        """Returns the grid of those queries that the convolution has outputs for.

        Raises:
          UserError: there is no such convolution, or the padded grid is smaller than its window.
        """
        check_window(self.kernel_size, self.stride, self.dilation, self.padding)
        padded = self._pad(x.astype(self.dtype))
        number, channels = math.prod(self.kernel_size), x.shape[-1]
        starts = self.dilation * window(*self.kernel_size)
        heads = Quadratic(
            self.param("centers", lambda key: jnp.asarray(starts, jnp.float32)),
            self.param("spreads", nn.initializers.constant(self.spread), (number,)),
        )
        value = Linear((number, channels, self.features), (self.features,), number * channels, name="value")()
        A = heads.factors(padded[0])
        rows, columns = self._queries(*padded.shape[1:3])
        kept = Fixed(Factors(A.row[:, rows], A.column[:, :, columns]))
        pixels, device = math.prod(padded.shape[1:3]), self.device or this_device()
        blocks = choose_blocks(x.shape[0], number, pixels, channels, needs_x=False, whole=False, device=device)
        y = attend_in_blocks(kept, padded, value.kernel, blocks, needs_x=False)
        return (y + value.bias).astype(self.dtype)

    def _extents(self) -> list[int]:
        """Returns the rows and the columns of the grid that the dilated window covers."""
        return [self.dilation * (side - 1) + 1 for side in self.kernel_size]

    def _pad(self, x: Array) -> Array:
        """Returns the grids with the zeros that the convolution pads."""
        pads: str | Sequence[tuple[int, int]] = self.padding
        if isinstance(pads, str):
            grid, extents, strides = np.array(x.shape[1:3]), np.array(self._extents()), np.full(2, self.stride)
            pads = jax.lax.padtype_to_pads(grid, extents, strides, pads)
        padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        if any(side < extent for side, extent in zip(padded.shape[1:3], self._extents(), strict=True)):
            raise UserError(
                f"the grid is {x.shape[1]}x{x.shape[2]}, and {padded.shape[1]}x{padded.shape[2]} when padded, smaller "
                f"than the {'x'.join(map(str, self._extents()))} window of the convolution; pad more, or give it "
                "larger grids."
            )
        return padded

    def _queries(self, height: int, width: int) -> list[slice]:
        """Returns the rows and the columns of the padded grid that are queries: centers of a window that lies in it."""
        slices = []
        for side, pixels in zip((height, width), self.kernel_size, strict=True):
            before, after = (self.dilation * n for n in ((pixels - 1) // 2, pixels // 2))
            slices.append(slice(before, side - after, self.stride))
        return slices


def _is_zeros(padding: Any) -> bool:
    """Returns whether `padding` is of the form ((top, bottom), (left, right)), none of them negative."""
    try:
        return np.shape(padding) == (2, 2) and bool(np.min(padding) >= 0)
    except (ValueError, TypeError):  # ragged, or text
        return False


def check_window(kernel_size: tuple[int, int], stride: int, dilation: int, padding: Padding) -> None:
    """Raises UserError unless these describe a convolution, as the attributes of `ConvolutionalAttention` do."""
    if min(kernel_size) < 1:
        raise UserError(f"kernel_size is {kernel_size}; a window has at least one row and one column.")
    for name, value in (("stride", stride), ("dilation", dilation)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be 1 or more.")
    named = padding in ("SAME", "VALID")
    if not named and not _is_zeros(padding):
        raise UserError(f"padding is {padding!r}; it must be SAME, VALID, or zeros as ((top, bottom), (left, right)).")


def attention_maps(
    module: nn.Module, params: dict, images: Float[Array, "batch height width channels"], parts: bool = False
) -> list[Float[Array, "_ heads H W H W"]] | list[Parts]:
    """Returns the attention probabilities of every attention layer: query grid, then key grid.

    Each sums to 1 over the last two axes. The leading axis is 1 for position-only encodings and the batch otherwise.

    Args:
      module: a model of `create_model`.
      params: its parameters.
      images: normalised images, NHWC.
      parts: whether to return the scores before softmax instead, as `Parts` of arrays of the same shape.

    Raises:
      UserError: the model has no attention layers, or it is a ResNet, which needs more than its parameters.
    """
    if parts:
        layers = heads_of_layers(module, params, images)
        maps = [jax.lax.map(layer.encoding.parts, layer.mapped) for layer in layers.values()]
    else:
        sown = _sown(module, params, images, "intermediates")
        maps = [sown[name]["attention"]["probabilities"][0] for name in sorted(sown, key=layer_number)]
    if not maps:
        raise UserError(f"{type(module).__name__} has no attention layers to map.")
    return maps


def _sown(module: nn.Module, params: dict, images: Array, collection: str) -> dict:
    """Returns what the layers of a network leave in a collection."""
    try:
        return module.apply({"params": params}, images, train=False, mutable=[collection])[1].get(collection, {})
    except flax.errors.ScopeCollectionNotFound:
        raise UserError(
            f"{type(module).__name__} needs statistics beside its parameters; attention is read from models without."
        ) from None


def layer_number(name: str) -> int:
    """Returns the number of the layer that a network calls layer_0, layer_1 and so on."""
    return int(name.removeprefix("layer_"))


class LayerHeads(NamedTuple):
    """The heads of one layer, and the grids that they see.

    Attributes:
      encoding: the heads' scores.
      x: the layer's input, (batch, H, W, features).
    """

    encoding: Encoding
    x: Array

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the grids."""
        _, height, width, _ = self.x.shape
        return height, width

    @property
    def mapped(self) -> Float[Array, "_ H W features"]:
        """The grids that have maps of their own: one where the image makes no difference."""
        return self.x if self.encoding.needs_x else self.x[:1]


def heads_of_layers(
    module: nn.Module, params: dict, images: Float[Array, "batch height width channels"]
) -> dict[int, LayerHeads]:
    """Returns the heads of every attention layer that has some, by the layer's number.

    Args:
      module: an attention model of `create_model`.
      params: its parameters.
      images: normalised images, NHWC.
    """
    layers = {layer_number(name): sown["attention"] for name, sown in _sown(module, params, images, "heads").items()}
    return {number: LayerHeads(sown["encoding"][0], sown["x"][0]) for number, sown in sorted(layers.items())}
