"""The image classifier of the paper (section 4): patches, post-LayerNorm encoder layers, mean, Linear.

a = Dense(Attention(x));       x = LayerNorm(x + Dropout(a))
m = Dense(GELU(Dense(x)));     x = LayerNorm(x + Dropout(m))
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float

from attn_cnn import config as config_lib
from attn_cnn.attention import Linear, SelfAttention, default_embedding_size, dense, embedding_tables
from attn_cnn.resnet import ResNet18

LAYER_NORM_EPSILON = 1e-12


def patches(images: Float[Array, "batch height width channels"], patch: int) -> Float[Array, "batch H W features"]:
    """Invertible pooling: the pixels of each patch concatenated, ordered by row, column, channel."""
    batch, height, width, channels = images.shape
    H, W = height // patch, width // patch
    grid = images.reshape(batch, H, patch, W, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    return grid.reshape(batch, H, W, patch * patch * channels)


def layer_norm(name: str) -> nn.LayerNorm:
    """In float32, with the variance of the centered values: epsilon is too small for E[x^2] - E[x]^2."""
    return nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, dtype=jnp.float32, use_fast_variance=False, name=name)


class EncoderLayer(nn.Module):
    """Attention and a two-layer perceptron, each with its residual connection; the residual is float32."""

    attention: Mapping[str, Any]
    mlp_size: int
    dropout: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch H W features"], tables=None, *, train: bool = False
    ) -> Float[Array, "batch H W features"]:
        size = x.shape[-1]
        drop = nn.Dropout(self.dropout, deterministic=not train)
        output = Linear((size, size), (size,), size, name="attention_output")()
        a = SelfAttention(**self.attention, dtype=self.dtype, name="attention")(x, tables, output, train=train)
        x = layer_norm("attention_norm")(x + drop(a))
        m = dense(self.mlp_size, size, dtype=self.dtype, name="mlp_in")(x)
        m = dense(size, self.mlp_size, dtype=self.dtype, name="mlp_out")(nn.gelu(m, approximate=False))
        return layer_norm("mlp_norm")(x + drop(m))


class Classifier(nn.Module):
    """Images to logits. `attention` holds the arguments of every layer's `SelfAttention`."""

    attention: Mapping[str, Any]
    layers: int
    hidden_size: int
    mlp_size: int
    patch: int
    classes: int
    share_tables: bool = False
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool = False
    ) -> Float[Array, "batch classes"]:
        x = patches(images, self.patch)
        x = dense(self.hidden_size, x.shape[-1], dtype=self.dtype, name="patch_embedding")(x)
        x = x.astype(jnp.float32)
        tables = None
        if self.share_tables:
            width = self.attention["embedding_size"] or default_embedding_size(
                self.attention["encoding"], self.hidden_size
            )
            tables = embedding_tables(self, self.attention["max_side"], width)
        for i in range(self.layers):
            x = EncoderLayer(self.attention, self.mlp_size, self.dropout, self.dtype, name=f"layer_{i}")(
                x, tables, train=train
            )
        return dense(self.classes, self.hidden_size, name="classifier")(x.mean(axis=(1, 2)))


def create_model(model: ml_collections.ConfigDict, dtype: str = "float32", axis_name: str | None = None) -> nn.Module:
    """The Flax module a config's `model` describes.

    Args:
      model: `config.model`.
      dtype: of the computation; parameters, softmax, normalisation and logits stay float32.
      axis_name: mapped axis over which batch statistics are averaged in training (ResNet only).

    Raises:
      UserError: a field is missing, unknown or out of range, or the fields contradict each other.
    """
    config_lib.check_model(model)
    if model.name == "resnet18":
        return ResNet18(model.classes, model.width, axis_name=axis_name, dtype=jnp.dtype(dtype))
    attention = {
        "encoding": model.encoding,
        "heads": model.heads,
        "max_side": model.max_side,
        "embedding_size": model.embedding_size,
        "mixing": model.mixing,
        "dropout": model.attention_dropout,
        "dropout_on": model.attention_dropout_on,
    }
    return Classifier(
        attention=attention,
        layers=model.layers,
        hidden_size=model.hidden_size,
        mlp_size=model.mlp_size,
        patch=model.patch,
        classes=model.classes,
        share_tables=model.share_tables,
        dropout=model.dropout,
        dtype=jnp.dtype(dtype),
    )
