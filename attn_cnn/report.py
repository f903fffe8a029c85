"""What a model costs: its parameters and FLOPs, as the paper counts them and as the compiler does."""

import math
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import tabulate
from flax import traverse_util

from attn_cnn.attention import Linear
from attn_cnn.model import Classifier, create_model


def count_parameters(params: dict) -> int:
    """Numbers in a tree of arrays or shapes."""
    return sum(math.prod(p.shape) for p in jax.tree.leaves(params))


def paper_flops(model: ml_collections.ConfigDict) -> int:
    """FLOPs of one image: 2 x multiply-adds of the Linear and convolution layers, mixing left out.

    The layers count as the paper has them, composed here or not.
    """
    total = 0

    def count(next_call, args, kwargs, context):
        nonlocal total
        out = next_call(*args, **kwargs)
        if isinstance(context.module, (nn.Dense, nn.Conv)):
            kernel = context.module.variables["params"]["kernel"]
            total += 2 * math.prod(out.shape) * math.prod(kernel.shape) // context.module.features
        elif isinstance(context.module, Linear):  # of a layer, for every pixel of its grid
            height, width, _ = model.image_shape
            total += 2 * (height // model.patch) * (width // model.patch) * math.prod(out[0].shape)
        return out

    with nn.intercept_methods(count):
        abstract_variables(model)
    return total


def compiled_flops(model: ml_collections.ConfigDict) -> float:
    """FLOPs of one image's evaluation in float32 (so factored, where it may be), as the compiler counts them."""
    module, variables = in_one_block(create_model(model)), abstract_variables(model)
    images = jax.ShapeDtypeStruct((1, *model.image_shape), jnp.float32)
    compiled = jax.jit(module.apply).lower(variables, images).compile()
    return compiled.cost_analysis()["flops"]


def in_one_block(module: nn.Module) -> nn.Module:
    """The same module with all images and heads at once: of a loop the compiler counts one round."""
    if isinstance(module, Classifier):
        module = module.clone(attention={**module.attention, "block": sys.maxsize})
    return module


def abstract_variables(model: ml_collections.ConfigDict) -> dict:
    """Shapes of the model's parameters and statistics."""
    images = jnp.zeros((1, *model.image_shape))
    return jax.eval_shape(create_model(model).init, jax.random.key(0), images)


def describe(model: ml_collections.ConfigDict) -> str:
    """A table of every parameter, the totals and the FLOPs, to read."""
    params = abstract_variables(model)["params"]
    rows = [
        ("/".join(path), "x".join(map(str, leaf.shape)), math.prod(leaf.shape))
        for path, leaf in traverse_util.flatten_dict(params).items()
    ]
    table = tabulate.tabulate(rows, headers=("parameter", "shape", "size"), intfmt=",")
    return "\n".join(
        [
            table,
            "",
            f"parameters                    {count_parameters(params):,}",
            f"FLOPs per image, paper's way  {_si(paper_flops(model))}  (2 x multiply-adds of Linear and "
            "convolution layers; mixing left out)",
            f"FLOPs per image, compiler's   {_si(compiled_flops(model))}  (the whole forward pass)",
        ]
    )


def _si(number: float) -> str:
    """Two significant digits, with the paper's letters."""
    for power, letter in ((9, "B"), (6, "M"), (3, "K")):
        if number >= 10**power:
            return f"{float(f'{number / 10**power:.2g}'):g}{letter}"
    return f"{number:g}"
