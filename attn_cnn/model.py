"""The image classifier of the paper (section 4): patches, post-LayerNorm encoder layers, mean, Linear.

a = Dense(Attention(x));       x = LayerNorm(x + Dropout(a))
m = Dense(GELU(Dense(x)));     x = LayerNorm(x + Dropout(m))

Ours, not the paper's: before some layers the grid may halve, as the image does at the start, each 2x2 patch of it being
concatenated and mapped to the next layer's features. All that mixes pixels is still attention.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float

from attn_cnn import attention, encodings, resnet, schema
from attn_cnn.encodings import encoding_class, in_config
from attn_cnn.errors import UserError
from attn_cnn.layers import Convolution, Linear, dense
from attn_cnn.mixing import Device

LAYER_NORM_EPSILON = 1e-12

IMAGE_FIELDS = {
    "image_shape": schema.tuple_of(
        lambda v: len(v) == 3 and all(type(n) is int and 0 < n <= 4096 for n in v),
        "(height, width, channels), each from 1 to 4,096",
    ),
    "classes": schema.integer(2, 100_000),
}
ATTENTION_FIELDS = {
    "mixing": attention.FORMS,
    "layers": schema.integer(1, 100),
    "layer": schema.each_layer(schema.choice("attention", "convolution", default="attention")),
    "kernel_size": schema.integer(1, 4096, default=3),  # of the layers that are convolutions
    "heads": schema.each_layer(schema.integer(0, 1024)),
    "hidden_size": schema.each_layer(schema.integer(1, 65_536)),
    "mlp_size": schema.each_layer(schema.integer(1, 262_144)),
    "patch": schema.integer(1, 4096),
    "merge_before": schema.tuple_of(
        lambda v: all(type(i) is int and 0 < i < 100 for i in v) and sorted(set(v)) == list(v),
        "increasing numbers of layers, counted from 0 and without the first, as in (2, 4)",
        default=(),
    ),
    "max_side": schema.integer(1, 4096),
    "dropout": schema.number(0, 1, below=True),
    "attention_dropout": schema.number(0, 1, below=True),
    "attention_dropout_on": attention.DROPPED,
}


def model_fields() -> dict[str, dict[str, schema.Field]]:
    """Returns the fields of config.model for each config.model.name; encodings may have joined since the import."""
    encoding = {"encoding": schema.choice(*encodings.ENCODINGS)}
    return {
        "attention": IMAGE_FIELDS | ATTENTION_FIELDS | encodings.FIELDS | encoding,
        "resnet18": IMAGE_FIELDS | resnet.FIELDS,
    }


def patches(images: Float[Array, "batch height width channels"], patch: int) -> Float[Array, "batch H W features"]:
    """Concatenates the pixels of each patch, ordered by row, column, channel: an invertible pooling."""
    batch, height, width, channels = images.shape
    H, W = height // patch, width // patch
    grid = images.reshape(batch, H, patch, W, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    return grid.reshape(batch, H, W, patch * patch * channels)


def layer_norm(name: str) -> nn.LayerNorm:
    """Returns a LayerNorm in float32, of centered values, since epsilon is too small for E[x^2] - E[x]^2."""
    return nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, dtype=jnp.float32, use_fast_variance=False, name=name)


class EncoderLayer(nn.Module):
    """A layer that mixes pixels and a two-layer perceptron, each with its residual connection, which is float32.

    Attributes:
      mixer: makes the layer that mixes pixels: `SelfAttention`, or what takes the same arguments.
      mlp_size: features inside the perceptron.
      dropout: rate at which features are dropped before each residual connection.
      dtype: type of the computation.
    """

    mixer: Callable[[], nn.Module]
    mlp_size: int
    dropout: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch H W features"], tables: Any = None, *, train: bool = False
    ) -> Float[Array, "batch H W features"]:
        """Returns the grid after the layer; `tables` are the encoding's, where layers share them."""
        size = x.shape[-1]
        drop = nn.Dropout(self.dropout, deterministic=not train)
        output = Linear((size, size), (size,), size, name="attention_output")()
        a = self.mixer()(x, output, tables, train=train)
        x = layer_norm("attention_norm")(x + drop(a))
        m = dense(self.mlp_size, size, dtype=self.dtype, name="mlp_in")(x)
        m = dense(size, self.mlp_size, dtype=self.dtype, name="mlp_out")(nn.gelu(m, approximate=False))
        return layer_norm("mlp_norm")(x + drop(m))


class Classifier(nn.Module):
    """Images to logits.

    Attributes:
      mixers: for each layer, what makes the layer that mixes pixels.
      hidden_sizes: for each layer, features of a pixel; they change only where the grid halves.
      mlp_sizes: for each layer, features inside the perceptron.
      patch: side of a patch, in pixels of the image.
      classes: number of classes.
      merge_before: layers before which each 2x2 patch of the grid becomes one pixel.
      tables: declares what all layers share, given this module and the `features` of a pixel; None: nothing is shared.
      dropout: rate at which features are dropped before each residual connection.
      dtype: type of the computation.
    """

    mixers: tuple[Callable[[], nn.Module], ...]
    hidden_sizes: tuple[int, ...]
    mlp_sizes: tuple[int, ...]
    patch: int
    classes: int
    merge_before: tuple[int, ...] = ()
    tables: Callable[..., Any] | None = None
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Returns the logits of normalised images, NHWC."""
        x = self.embed(patches(images, self.patch), self.hidden_sizes[0], "patch_embedding")
        tables = self.tables(self, features=self.hidden_sizes[0]) if self.tables else None
        for i, (mixer, size, mlp_size) in enumerate(zip(self.mixers, self.hidden_sizes, self.mlp_sizes, strict=True)):
            if i in self.merge_before:
                x = self.embed(patches(x, 2), size, f"merge_{i}")
            x = EncoderLayer(mixer, mlp_size, self.dropout, self.dtype, name=f"layer_{i}")(x, tables, train=train)
        return dense(self.classes, x.shape[-1], name="classifier")(x.mean(axis=(1, 2)))

    def embed(self, x: Float[Array, "batch H W inputs"], size: int, name: str) -> Float[Array, "batch H W features"]:
        """Maps concatenated pixels to `size` features, in float32."""
        return dense(size, x.shape[-1], dtype=self.dtype, name=name)(x).astype(jnp.float32)


def create_model(
    model: ml_collections.ConfigDict,
    dtype: str = "float32",
    axis_name: str | None = None,
    device: Device | None = None,
) -> nn.Module:
    """Returns the Flax module that a config's `model` describes.

    Args:
      model: `config.model`; fields that have a default may be missing.
      dtype: type of the computation; parameters, softmax, normalisation and logits stay float32.
      axis_name: mapped axis over which batch statistics are averaged in training (ResNet only).
      device: the device to compile for; None: the one that JAX computes on.

    Raises:
      UserError: a field is missing, unknown or out of range, or the fields contradict each other.
    """
    model = checked_model(model)
    if model.name == "resnet18":
        return resnet.ResNet18(model.classes, model.width, axis_name, jnp.dtype(dtype), model.layer, device)
    tables = None
    if model.share_tables:
        declare = encoding_class(model.encoding).tables
        tables = functools.partial(declare, max_side=model.max_side, embedding_size=model.embedding_size)
    return Classifier(
        mixers=mixers(model, jnp.dtype(dtype), device),
        hidden_sizes=schema.for_each_layer(model.hidden_size, model.layers),
        mlp_sizes=schema.for_each_layer(model.mlp_size, model.layers),
        patch=model.patch,
        classes=model.classes,
        merge_before=model.merge_before,
        tables=tables,
        dropout=model.dropout,
        dtype=jnp.dtype(dtype),
    )


def mixers(model: ml_collections.ConfigDict, dtype: Any, device: Device | None) -> tuple[Callable[[], nn.Module], ...]:
    """Returns, for each layer, what makes the layer that mixes pixels."""
    convolution = functools.partial(Convolution, model.kernel_size, dtype, name="convolution")
    self_attention = functools.partial(
        attention.SelfAttention,
        model.encoding,
        max_side=model.max_side,
        embedding_size=model.embedding_size,
        start=model.init,
        init_spread=model.init_spread,
        content_start=model.content_init,
        mixing=model.mixing,
        dropout=model.attention_dropout,
        dropout_on=model.attention_dropout_on,
        dtype=dtype,
        device=device,
        name="attention",
    )
    return tuple(
        convolution if kind == "convolution" else functools.partial(self_attention, heads=heads)
        for kind, heads in kinds_and_heads(model)
    )


def kinds_and_heads(model: ml_collections.ConfigDict) -> list[tuple[str, int]]:
    """Returns of each layer what mixes its pixels, "attention" or "convolution", and its number of heads."""
    kinds, heads = (schema.for_each_layer(value, model.layers) for value in (model.layer, model.heads))
    return list(zip(kinds, heads, strict=True))


def grids(model: ml_collections.ConfigDict) -> list[tuple[int, int]]:
    """Returns (height, width) of the grid of each layer of an attention model."""
    height, width, _ = model.image_shape
    sides = [model.patch * 2 ** sum(merge <= layer for merge in model.merge_before) for layer in range(model.layers)]
    return [(height // side, width // side) for side in sides]


def abstract_variables(model: ml_collections.ConfigDict) -> dict:
    """Returns the shapes of the parameters and statistics of a config's `model`; nothing is computed."""
    images = jnp.zeros((1, *model.image_shape))
    return jax.eval_shape(create_model(model).init, jax.random.key(0), images)


def undecayed(model: ml_collections.ConfigDict) -> tuple[str, ...]:
    """Returns the names of the parameters that weight decay spares."""
    if model.name == "resnet18":
        return encodings.Quadratic.undecayed if model.layer == "attention" else ()
    return encoding_class(model.encoding).undecayed


def has_heads(model: ml_collections.ConfigDict) -> bool:
    """Returns whether the model has attention layers with heads."""
    return model.name == "attention" and any(kind == "attention" and heads for kind, heads in kinds_and_heads(model))


def has_penalty(model: ml_collections.ConfigDict) -> bool:
    """Returns whether the model has heads whose condition number can be penalised."""
    return has_heads(model) and encoding_class(model.encoding).penalty is not None


def checked_model(model: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns a config's `model` with defaults where fields are missing.

    Raises:
      UserError: a field is missing, unknown or out of range, or the fields contradict each other.
    """
    fields = model_fields()
    schema.check({"name": schema.flatten(model).get("name")}, {"name": schema.choice(*fields)}, "config.model.")
    model = schema.completed(model, fields[model.name])
    schema.check({k: v for k, v in schema.flatten(model).items() if k != "name"}, fields[model.name], "config.model.")
    if model.name == "attention":
        _check_attention(model)
    return model


def _check_attention(model: ml_collections.ConfigDict) -> None:
    height, width, _ = model.image_shape
    divisors = [d for d in range(1, min(height, width) + 1) if height % d == 0 and width % d == 0]
    if model.patch not in divisors:
        raise UserError(
            f"config.model.patch is {model.patch}, which does not divide the {height}x{width} image; "
            f"choose one of {', '.join(map(str, divisors))}."
        )
    for name in ("heads", "layer", "hidden_size", "mlp_size"):
        if len(schema.for_each_layer(model[name], model.layers)) != model.layers:
            raise UserError(
                f"config.model.{name} is {model[name]!r}, but config.model.layers is {model.layers}; "
                "give one for each layer, or one for all."
            )
    if model.kernel_size != 3 and "convolution" not in schema.for_each_layer(model.layer, model.layers):
        raise UserError(
            f"config.model.kernel_size is {model.kernel_size}, which attention ignores; leave it at 3, or set "
            "config.model.layer to convolution."
        )
    _check_merging(model)
    encoding = encoding_class(model.encoding)
    encoding.check(model)
    attention.check_form(encoding, model.mixing, model.attention_dropout, model.attention_dropout_on, in_config)


def _check_merging(model: ml_collections.ConfigDict) -> None:
    """Raises UserError if the grid cannot halve where it is to, or features change where it does not."""
    height, width, _ = model.image_shape
    if model.merge_before and model.merge_before[-1] >= model.layers:
        raise UserError(
            f"config.model.merge_before is {model.merge_before}, but config.model.layers is {model.layers}, and layers "
            "are counted from 0."
        )
    side = model.patch * 2 ** len(model.merge_before)
    if height % side or width % side:
        raise UserError(
            f"config.model.merge_before is {model.merge_before}, but the {height // model.patch}x"
            f"{width // model.patch} grid does not halve {len(model.merge_before)} times; leave some out."
        )
    sizes = schema.for_each_layer(model.hidden_size, model.layers)
    changes = [i for i in range(1, model.layers) if sizes[i] != sizes[i - 1] and i not in model.merge_before]
    if changes:
        raise UserError(
            f"config.model.hidden_size is {model.hidden_size}, which changes before layer {changes[0]}, counted from "
            "0; it can only change before the layers of config.model.merge_before."
        )
