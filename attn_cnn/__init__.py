"""attn_cnn: self-attention that expresses convolution, in JAX and Flax.

Cordonnier, Loukas and Jaggi, "On the Relationship between Self-Attention and Convolutional Layers",
ICLR 2020, arXiv:1911.03584.
"""

import importlib

_HOMES = {"load_run": "attn_cnn.training.runs"}


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
