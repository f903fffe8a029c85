"""A run's network on test images, as it is or with some of its calls answered by others."""

import contextlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from attn_cnn.training import augment, data
from attn_cnn.training.dataset import Dataset
from attn_cnn.training.runs import Run

Interceptor = Callable[..., Any]  # as flax.linen.intercept_methods takes it


def variables(run: Run) -> dict:
    """Returns what the run's network is applied to; as arguments of a compiled function it is not folded into it."""
    return {"params": run.params, "batch_stats": run.batch_stats}


def network(
    run: Run,
    variables: dict,
    images: UInt8[Array | np.ndarray, "batch height width channels"],
    interceptor: Interceptor | None = None,
) -> Float[Array, "batch classes"]:
    """Returns the logits of pictures, with calls to the network's modules going by `interceptor`."""
    with nn.intercept_methods(interceptor) if interceptor else contextlib.nullcontext():
        result: Any = run.model.apply(variables, augment.normalize(images, run.mean, run.std), train=False)
        return result


def logits(
    run: Run, images: UInt8[np.ndarray, "images height width channels"], interceptor: Interceptor | None = None
) -> Float[np.ndarray, "images classes"]:
    """Returns the logits of all `images`, computed in batches of config.eval_batch_size."""
    size = run.config.eval_batch_size
    with jax.default_matmul_precision(run.config.matmul_precision):
        of_batch = jax.jit(lambda variables, batch: network(run, variables, batch, interceptor))
        starts = range(0, len(images), size)
        return np.concatenate([of_batch(variables(run), images[start : start + size]) for start in starts])


def evaluation_data(run: Run) -> Dataset:
    """Returns the run's data with its test set, also where the run was evaluated on a part that it held out."""
    config = run.config.data.copy_and_resolve_references()
    config.validation_fraction = 0.0
    return data.load_part(config)


def accuracy(logits: Float[np.ndarray, "images classes"], labels: Int[np.ndarray, "images"]) -> float:
    """Returns the share of images whose largest logit is that of their label."""
    return float((logits.argmax(-1) == labels).mean())
