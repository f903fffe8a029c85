"""The convolutional baseline: ResNet-18 for CIFAR (He et al. 2016; the paper's section 4.1).

block(x) = ReLU(BN(Conv3x3(ReLU(BN(Conv3x3(x))))) + shortcut(x))

Each 3x3 convolution can be the attention layer that expresses it (Theorem 1). A 1x1 convolution stays one: it is a
linear map of each pixel, and its one head would have nothing to attend to but the pixel itself.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attn_cnn import schema
from attn_cnn.attention import ConvolutionalAttention
from attn_cnn.layers import dense, fan_in_uniform
from attn_cnn.mixing import Device

BLOCKS_PER_STAGE = 2
BATCH_NORM_EPSILON = 1e-5
BATCH_NORM_MOMENTUM = 0.9
FIELDS = {
    "width": schema.integer(1, 4096),
    "layer": schema.choice("convolution", "attention", default="convolution"),  # what mixes 3x3 pixels
}


def conv(features: int, kernel: int, stride: int, channels: int, **kwargs) -> nn.Conv:
    """A convolution without bias, padded as PyTorch does (kernel // 2 on every side), initialised likewise."""
    return nn.Conv(
        features,
        (kernel, kernel),
        (stride, stride),
        padding=kernel // 2,
        use_bias=False,
        kernel_init=fan_in_uniform(kernel * kernel * channels),
        **kwargs,
    )


def conv3x3(
    layer: str, features: int, stride: int, channels: int, dtype: Any, device: Device | None, name: str
) -> nn.Module:
    """A 3x3 convolution padded by one pixel or, where `layer` is attention, the attention layer in its place."""
    if layer == "attention":
        pads = ((1, 1), (1, 1))
        return ConvolutionalAttention(features, (3, 3), stride, padding=pads, dtype=dtype, device=device, name=name)
    return conv(features, 3, stride, channels, dtype=dtype, name=name)


class BatchNorm(nn.Module):
    """Normalises each channel over the images that count, on all devices together (Ioffe and Szegedy 2015).

    Flax's own weighs devices equally, whatever number of images each of them has. The running variance is the biased
    one; PyTorch's is larger by a factor of N / (N - 1).

    Attributes:
      counts: which images count; None: all of them do.
      axis_name: mapped axis of the devices, or None.
      train: whether to use, and keep, the batch's statistics; otherwise the running ones are used.
      dtype: type of the result; statistics are float32.
    """

    counts: Any
    axis_name: str | None
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "batch H W channels"]) -> Float[Array, "batch H W channels"]:
        """Returns the normalised grid."""
        shape = x.shape[-1:]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape)
        mean, var = running_mean.value, running_var.value
        if self.train:
            mean = self._mean(x.astype(jnp.float32))
            var = self._mean(jnp.square(x.astype(jnp.float32) - mean))
            if not self.is_initializing():
                for running, value in ((running_mean, mean), (running_var, var)):
                    running.value = BATCH_NORM_MOMENTUM * running.value + (1 - BATCH_NORM_MOMENTUM) * value
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        y = (x - mean) * (jax.lax.rsqrt(var + BATCH_NORM_EPSILON) * scale) + bias
        return y.astype(self.dtype)

    def _mean(self, values: Array) -> Array:
        """Returns the mean of each channel over the images that count."""
        counts = jnp.ones(len(values), bool) if self.counts is None else self.counts
        each = counts[:, None, None, None]
        sums = jnp.sum(values, (0, 1, 2), where=each), jnp.sum(counts) * values.shape[1] * values.shape[2]
        alone = self.axis_name is None or self.is_initializing()
        total, number = sums if alone else jax.lax.psum(sums, self.axis_name)
        return total / number


class Block(nn.Module):
    """Two 3x3 convolutions and a residual; where the shape changes, a 1x1 convolution on the shortcut."""

    features: int
    stride: int
    norm: Any
    dtype: Any
    layer: str
    device: Device | None

    @nn.compact
    def __call__(self, x: Float[Array, "batch H W channels"]) -> Float[Array, "batch H2 W2 features"]:
        channels, dtype = x.shape[-1], self.dtype
        y = conv3x3(self.layer, self.features, self.stride, channels, dtype, self.device, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        y = conv3x3(self.layer, self.features, 1, self.features, dtype, self.device, name="conv2")(y)
        y = self.norm(name="norm2")(y)
        if self.stride != 1 or channels != self.features:
            x = conv(self.features, 1, self.stride, channels, dtype=dtype, name="shortcut")(x)
            x = self.norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


class ResNet18(nn.Module):
    """Four stages of two blocks, at `width` times 1, 2, 4, 8 channels; 64 is the paper's width.

    `axis_name` is the mapped axis over which training averages batch statistics, so that a run does not
    depend on the number of devices. `layer` is what mixes 3x3 pixels: "convolution" or "attention". `device` is
    what the work of attention layers is cut into blocks for; None: the device that JAX computes on.
    """

    classes: int
    width: int = 64
    axis_name: str | None = None
    dtype: Any = jnp.float32
    layer: str = "convolution"
    device: Device | None = None

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "batch height width channels"],
        *,
        train: bool = False,
        counts: Bool[Array, "batch"] | None = None,
    ) -> Float[Array, "batch classes"]:
        """Returns the logits of normalised images; batch statistics are those of the images that count."""
        norm = partial(BatchNorm, counts, self.axis_name, train, self.dtype)
        x = conv3x3(self.layer, self.width, 1, images.shape[-1], self.dtype, self.device, name="conv1")(images)
        x = nn.relu(norm(name="norm1")(x))
        for stage, (multiple, stride) in enumerate(((1, 1), (2, 2), (4, 2), (8, 2))):
            for block in range(BLOCKS_PER_STAGE):
                x = Block(
                    self.width * multiple,
                    stride if block == 0 else 1,
                    norm,
                    self.dtype,
                    self.layer,
                    self.device,
                    name=f"stage{stage}_block{block}",
                )(x)
        x = x.mean(axis=(1, 2), dtype=jnp.float32)
        return dense(self.classes, 8 * self.width, name="classifier")(x)
