"""How many images the logits of a network are right about."""

import numpy as np
from jaxtyping import Float, Int


def accuracy(logits: Float[np.ndarray, "images classes"], labels: Int[np.ndarray, "images"]) -> float:
    """Returns the share of images whose largest logit is that of their label."""
    return float((logits.argmax(-1) == labels).mean())
