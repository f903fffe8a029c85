"""What a model costs: its parameters and FLOPs, as the paper counts them and as the compiler does."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from clu import parameter_overview

from attn_cnn.attention import ConvolutionalAttention, layer_number
from attn_cnn.layers import Linear
from attn_cnn.mixing import UNBOUNDED
from attn_cnn.model import abstract_variables, create_model, grids


def count_parameters(params: dict) -> int:
    """Returns how many numbers there are in a tree of arrays or shapes."""
    return int(parameter_overview.count_parameters(params))


def paper_flops(model: ml_collections.ConfigDict) -> int:
    """Returns the FLOPs of one image: 2 x multiply-adds of the Linear and convolution layers, mixing left out.

    The layers count as the paper has them, composed here or not.
    """
    total = 0

    def count(next_call, args, kwargs, context):
        nonlocal total
        out = next_call(*args, **kwargs)
        if isinstance(context.module, (nn.Dense, nn.Conv)):
            kernel = context.module.variables["params"]["kernel"]
            total += 2 * math.prod(out.shape) * math.prod(kernel.shape) // context.module.features
        elif isinstance(context.module, ConvolutionalAttention) and context.method_name == "__call__":
            kernel = context.module.variables["params"]["value"]["kernel"]
            total += 2 * math.prod(out.shape) * math.prod(kernel.shape) // context.module.features
        elif isinstance(context.module, Linear) and not isinstance(context.module.parent, ConvolutionalAttention):
            layer = layer_number(context.module.path[0])
            total += 2 * math.prod(grids(model)[layer]) * math.prod(out.kernel.shape)  # for every pixel of its grid
        return out

    with nn.intercept_methods(count):
        abstract_variables(model)
    return total


def compiled_flops(model: ml_collections.ConfigDict) -> float:
    """Returns the FLOPs of one image's evaluation in float32 (so factored, where it may be), as the compiler counts."""
    module, variables = create_model(model, device=UNBOUNDED), abstract_variables(model)
    images = jax.ShapeDtypeStruct((1, *model.image_shape), jnp.float32)
    costs = jax.jit(module.apply).lower(variables, images).compile().cost_analysis()
    assert costs is not None  # XLA counts them
    return costs["flops"]


def describe(model: ml_collections.ConfigDict) -> str:
    """Returns a table of every parameter, the totals and the FLOPs, to read."""
    params = abstract_variables(model)["params"]
    return "\n".join(
        [
            parameter_overview.get_parameter_overview(params, include_stats=False),
            "",
            f"parameters                    {count_parameters(params):,}",
            f"FLOPs per image, paper's way  {in_letters(paper_flops(model))}  (2 x multiply-adds of Linear and "
            "convolution layers; mixing left out)",
            f"FLOPs per image, compiler's   {in_letters(compiled_flops(model))}  (the whole forward pass)",
        ]
    )


def in_letters(number: float) -> str:
    """Returns two significant digits with the paper's letters, as in 6.2B."""
    for power, letter in ((9, "B"), (6, "M"), (3, "K")):
        if number >= 10**power:
            return f"{float(f'{number / 10**power:.2g}'):g}{letter}"
    return f"{number:g}"
