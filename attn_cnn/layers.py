"""Linear maps and convolutions that start as PyTorch's do, which the paper trains from.

Weights and biases are uniform in +-1/sqrt(fan_in), fan_in being the number of values that each output sums over.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def fan_in_uniform(fan_in: int) -> nn.initializers.Initializer:
    """Returns the initializer that draws uniformly from +-1/sqrt(fan_in)."""

    def init(key, shape, dtype=jnp.float32):
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def dense(features: int, fan_in: int, **kwargs) -> nn.Dense:
    """Returns a Dense layer of `features` outputs and `fan_in` inputs that starts as PyTorch's Linear does."""
    init = fan_in_uniform(fan_in)
    return nn.Dense(features, kernel_init=init, bias_init=init, **kwargs)


class LinearMap(NamedTuple):
    """The map x -> x kernel + bias, as a value that can be applied, cut into heads, or composed with another."""

    kernel: Float[Array, "*heads inputs outputs"]
    bias: Float[Array, "outputs"]

    def __call__(self, x: Float[Array, "*grid inputs"]) -> Float[Array, "*grid outputs"]:
        """Applies the map, with the product computed in the type of x."""
        return x @ self.kernel.astype(x.dtype) + self.bias

    def then(self, other: "LinearMap") -> "LinearMap":
        """Returns the one map that applies this map first and `other` second."""
        return LinearMap(self.kernel @ other.kernel, other(self.bias))


class Linear(nn.Module):
    """The parameters of a linear map, for a caller that composes the map with others before applying it.

    Attributes:
      kernel: shape of the kernel.
      bias: shape of the bias.
      fan_in: number of values that each output sums over.
      kernel_init: how the kernel starts; None: as PyTorch's does.
    """

    kernel: tuple[int, ...]
    bias: tuple[int, ...]
    fan_in: int
    kernel_init: nn.initializers.Initializer | None = None

    @nn.compact
    def __call__(self) -> LinearMap:
        """Returns the map that the parameters make."""
        init = fan_in_uniform(self.fan_in)
        kernel = self.param("kernel", self.kernel_init or init, self.kernel)
        return LinearMap(kernel, self.param("bias", init, self.bias))


class Bias(nn.Module):
    """The bias of a linear map that has lost all its inputs.

    It stands alone since orbax saves no kernel without numbers.
    """

    features: int

    @nn.compact
    def __call__(self) -> Float[Array, "features"]:
        """Returns the bias, which starts as if there were as many inputs as outputs."""
        return self.param("bias", fan_in_uniform(self.features), (self.features,))


class Convolution(nn.Module):
    """A convolution with as many channels out as in, which can stand where a `SelfAttention` layer stands.

    Attributes:
      kernel_size: side of its square kernel.
      dtype: type of the computation; parameters are float32.
    """

    kernel_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch H W features"], then: LinearMap, tables: Any = None, *, train: bool = False
    ) -> Float[Array, "batch H W out"]:
        """Convolves the zero-padded grid and applies `then`; `tables` and `train` are for attention layers."""
        features, side = x.shape[-1], self.kernel_size
        init = fan_in_uniform(side * side * features)
        convolution = nn.Conv(
            features, (side, side), kernel_init=init, bias_init=init, dtype=self.dtype, name="convolution"
        )
        return then(convolution(x)).astype(self.dtype)
