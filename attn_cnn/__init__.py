"""attn_cnn: self-attention that expresses convolution, in JAX and Flax.

Cordonnier, Loukas and Jaggi, "On the Relationship between Self-Attention and Convolutional Layers",
ICLR 2020, arXiv:1911.03584.
"""

import importlib


def __getattr__(name: str):
    """Modules load when they are first named, so that `import attn_cnn` is quick and `attn_cnn.model` just works."""
    try:
        return importlib.import_module(f"attn_cnn.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"attn_cnn.{name}":
            raise
        raise AttributeError(f"module 'attn_cnn' has no attribute {name!r}") from None
