"""attn_cnn: self-attention that expresses convolution, in JAX and Flax.

Cordonnier, Loukas and Jaggi, "On the Relationship between Self-Attention and Convolutional Layers",
ICLR 2020, arXiv:1911.03584.

    SelfAttention               one layer, to be used in any Flax model
    ConvolutionalAttention      the layer that Theorem 1 puts in a convolution's place
    create_model                the paper's network, or its baseline, from a config
    attention_maps              what every head of a network attends to
    load_run                    a trained run: its model, parameters and config
    attention_from_convolution  a convolution as the parameters of an attention layer
    convolution_from_attention  the kernel that a layer amounts to
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attn_cnn.attention import ConvolutionalAttention, SelfAttention, attention_maps
    from attn_cnn.convolution import attention_from_convolution, convolution_from_attention
    from attn_cnn.model import create_model
    from attn_cnn.training.runs import load_run

__all__ = [
    "ConvolutionalAttention",
    "SelfAttention",
    "attention_from_convolution",
    "attention_maps",
    "convolution_from_attention",
    "create_model",
    "load_run",
]

_HOMES = {
    "ConvolutionalAttention": "attn_cnn.attention",
    "SelfAttention": "attn_cnn.attention",
    "attention_from_convolution": "attn_cnn.convolution",
    "attention_maps": "attn_cnn.attention",
    "convolution_from_attention": "attn_cnn.convolution",
    "create_model": "attn_cnn.model",
    "load_run": "attn_cnn.training.runs",
}


def __getattr__(name: str):
    """Loads modules and functions when they are first named, so that `import attn_cnn` is quick."""
    if home := _HOMES.get(name):
        return getattr(importlib.import_module(home), name)
    try:
        return importlib.import_module(f"attn_cnn.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"attn_cnn.{name}":
            raise
        raise AttributeError(f"module 'attn_cnn' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    """Returns the names that matter, for completion."""
    return __all__
