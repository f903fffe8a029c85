"""The convolutional baseline: ResNet-18 for CIFAR (He et al. 2016; the paper's section 4.1).

block(x) = ReLU(BN(Conv3x3(ReLU(BN(Conv3x3(x))))) + shortcut(x))
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from attn_cnn import schema
from attn_cnn.layers import dense, fan_in_uniform

BLOCKS_PER_STAGE = 2
FIELDS = {"width": schema.integer(1, 4096)}


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


class Block(nn.Module):
    """Two 3x3 convolutions and a residual; where the shape changes, a 1x1 convolution on the shortcut."""

    features: int
    stride: int
    norm: Any
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "batch H W channels"]) -> Float[Array, "batch H2 W2 features"]:
        channels, dtype = x.shape[-1], self.dtype
        y = conv(self.features, 3, self.stride, channels, dtype=dtype, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        y = conv(self.features, 3, 1, self.features, dtype=dtype, name="conv2")(y)
        y = self.norm(name="norm2")(y)
        if self.stride != 1 or channels != self.features:
            x = conv(self.features, 1, self.stride, channels, dtype=dtype, name="shortcut")(x)
            x = self.norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


class ResNet18(nn.Module):
    """Four stages of two blocks, at `width` times 1, 2, 4, 8 channels; 64 is the paper's width.

    `axis_name` is the mapped axis over which training averages batch statistics, so that a run does not
    depend on the number of devices. Their running variance is the biased one, PyTorch's is not: 1/(N - 1) of it apart.
    """

    classes: int
    width: int = 64
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool = False
    ) -> Float[Array, "batch classes"]:
        norm = partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            axis_name=self.axis_name if train else None,
            use_fast_variance=False,
            dtype=self.dtype,
        )
        x = conv(self.width, 3, 1, images.shape[-1], dtype=self.dtype, name="conv1")(images)
        x = nn.relu(norm(name="norm1")(x))
        for stage, (multiple, stride) in enumerate(((1, 1), (2, 2), (4, 2), (8, 2))):
            for block in range(BLOCKS_PER_STAGE):
                x = Block(
                    self.width * multiple,
                    stride if block == 0 else 1,
                    norm,
                    self.dtype,
                    name=f"stage{stage}_block{block}",
                )(x)
        x = x.mean(axis=(1, 2), dtype=jnp.float32)
        return dense(self.classes, 8 * self.width, name="classifier")(x)
