"""The test set of a run, and how many of its images logits are right about."""

import numpy as np
from jaxtyping import Float, Int

from attn_cnn.training import data
from attn_cnn.training.dataset import Dataset
from attn_cnn.training.runs import Run


def evaluation_data(run: Run) -> Dataset:
    """Returns the run's data with its test set, also where the run was evaluated on a part that it held out."""
    config = run.config.data.copy_and_resolve_references()
    config.validation_fraction = 0.0
    return data.load_part(config)


def accuracy(logits: Float[np.ndarray, "images classes"], labels: Int[np.ndarray, "images"]) -> float:
    """Returns the share of images whose largest logit is that of their label."""
    return float((logits.argmax(-1) == labels).mean())
