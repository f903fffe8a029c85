"""A network with attention layers replaced by the convolutions that they are most like: what it costs.

A layer becomes the K x K window of its kernel on the grid (`kernels.cut_kernel`), zero-padded, with its bias. The
window may lie anywhere; where the network is trained on, as `config.model.layer=convolution`, it is the one around the
query.
"""

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from jaxtyping import Array, Float, UInt8

from attn_cnn import schema, train
from attn_cnn.attention import SelfAttention, layer_number
from attn_cnn.convolution.kernels import Window
from attn_cnn.errors import UserError
from attn_cnn.predict import Interceptor, batches, network
from attn_cnn.training import workdir as workdir_lib
from attn_cnn.training.experiment import create_experiment, precision_of, state_of
from attn_cnn.training.runs import Run, load_run

AROUND_QUERY = Window(-1, -1, 3)  # of the convolutions that are trained on
TUNED_LEARNING_RATE = 0.1  # of the run's own


class Cut(NamedTuple):
    """The convolution that a layer becomes: where its window lies, and the kernel there, HWIO."""

    window: Window
    kernel: Float[np.ndarray, "side side inputs outputs"]


class Errors(NamedTuple):
    """The relative error of a layer's output without its bias, |y - convolution| / |y|.

    Attributes:
      queries: how many queries of the grid have the whole window inside.
      inside: the error over those, None where there are none.
      everywhere: the error over the whole grid.
    """

    queries: int
    inside: float | None
    everywhere: float


def convolve(x: Float[Array, "batch H W inputs"], cut: Cut) -> Float[Array, "batch H W outputs"]:
    """Returns the zero-padded convolution of the grids with the window's kernel, as many pixels as before."""
    top, left, side = cut.window
    pads = ((-top, top + side - 1), (-left, left + side - 1))
    return jax.lax.conv_general_dilated(
        x, jnp.asarray(cut.kernel, x.dtype), (1, 1), pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def sees_all(window: Window, height: int, width: int) -> np.ndarray:
    """Returns which queries of a grid, (H, W), have the whole window inside it."""
    rows, columns = (
        (np.arange(side) + first >= 0) & (np.arange(side) + first + window.side <= side)
        for side, first in ((height, window.top), (width, window.left))
    )
    return rows[:, None] & columns


def is_attention(context: nn.module.InterceptorContext) -> bool:
    """Returns whether an intercepted call is that of an attention layer."""
    return isinstance(context.module, SelfAttention) and context.method_name == "__call__"


def replacing(cuts: Mapping[int, Cut]) -> Interceptor:
    """Returns what answers calls to the attention layers with the numbers in `cuts` by convolutions."""

    def call(next_call, args, kwargs, context):
        module = context.module
        if not is_attention(context) or layer_number(module.path[0]) not in cuts:
            return next_call(*args, **kwargs)
        x, then, *_ = args
        bias = module.variables["params"]["value"]["bias"]
        y = convolve(x.astype(module.dtype), cuts[layer_number(module.path[0])]) + bias
        return then(y.astype(module.dtype)).astype(module.dtype)

    return call


def layer_errors(
    run: Run, cuts: Mapping[int, list[Cut]], images: UInt8[np.ndarray, "images height width channels"]
) -> dict[int, list[Errors]]:
    """Returns, for each layer and each of its cuts, the error of its output when it is given what reaches it there."""
    step = jax.jit(lambda variables, batch: _squares(run, cuts, variables, batch))
    with precision_of(run.config):
        squares = [
            jax.tree.map(lambda a: np.asarray(a, np.float64), step(run.variables, batch))
            for batch in batches(run, images)
        ]
    totals = jax.tree.map(lambda *batches: sum(batches), *squares)
    return {
        layer: [_errors(cut.window, *sums) for cut, sums in zip(cuts[layer], of_layer, strict=True)]
        for layer, of_layer in totals.items()
    }


def _squares(
    run: Run, cuts: Mapping[int, list[Cut]], variables: dict, batch: Array
) -> dict[int, list[tuple[Array, Array]]]:
    """Returns the squares of the error and of the output at each query, summed over images and channels."""
    found = {}

    def call(next_call, args, kwargs, context):
        module = context.module
        if not is_attention(context):
            return next_call(*args, **kwargs)
        x, then, *rest = args
        y = next_call(x, None, *rest, **kwargs)
        if (layer := layer_number(module.path[0])) in cuts:
            mixed = y.astype(jnp.float32) - module.variables["params"]["value"]["bias"]
            differences = [mixed - convolve(x.astype(module.dtype), cut) for cut in cuts[layer]]
            found[layer] = [tuple(jnp.square(a).sum((0, 3)) for a in (error, mixed)) for error in differences]
        return then(y).astype(module.dtype)

    network(run, variables, batch, call)
    return found


def _errors(window: Window, error: np.ndarray, output: np.ndarray) -> Errors:
    inside = sees_all(window, *output.shape)

    def relative(where):
        return float(np.sqrt(error[where].sum() / output[where].sum()))

    everywhere = np.ones_like(inside)
    return Errors(int(inside.sum()), relative(inside) if inside.any() else None, relative(everywhere))


def tuned_run(run: Run, cuts: Mapping[int, Cut], out: epath.Path) -> Run:
    """Returns the run after an epoch of training with some layers replaced, which lives in the folder `out`.

    It starts from `out`/start, a run of the replaced network, and trains in `out`/tuned with a tenth of the learning
    rate; called again after a stop, it goes on.

    Args:
      run: the run.
      cuts: for each layer to replace, its window `AROUND_QUERY`.
      out: the folder.

    Raises:
      UserError: `out` has the start of another network, or of other convolutions.
    """
    config = replaced_config(run.config, set(cuts))
    start, tuned = out / "start", out / "tuned"
    params = replaced_params(run.params, cuts)
    if not (start / workdir_lib.CONFIG).exists():
        if start.exists():
            start.rmtree()  # it was cut short: its config comes last
        workdir_lib.create(start, config, run.spec, state_of(create_experiment(config, run.spec), {"params": params}))
    elif not same_network(load_run(start).params, params):
        reason = "was made from another network, or from maps of other images (--images)"
        raise UserError(f"{start} {reason}; move {out} away, or name another --out.")
    config.init_from = str(start)
    train.train(config, tuned)
    return load_run(tuned)


def same_network(a: dict, b: dict) -> bool:
    """Returns whether two trees of parameters have the same names and shapes, and are equal up to rounding."""
    if jax.tree.map(np.shape, a) != jax.tree.map(np.shape, b):
        return False
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.allclose(x, y, rtol=1e-3, atol=1e-5), a, b)))


def replaced_config(config: ml_collections.ConfigDict, layers: set[int]) -> ml_collections.ConfigDict:
    """Returns the config of an epoch of training with convolutions in the place of attention in some `layers`."""
    config = config.copy_and_resolve_references()
    kinds = schema.for_each_layer(config.model.layer, config.model.layers)
    changes = {
        "model.layer": tuple("convolution" if layer in layers else kind for layer, kind in enumerate(kinds)),
        "model.kernel_size": AROUND_QUERY.side,
        "epochs": 1,
        "init_except": (),
        "degenerate_heads": "keep",
        "freeze": "none",
        "condition_penalty": 0.0,
        "figures.every_epochs": 0,  # there may be no heads left to draw
        "optimizer.schedule": "cosine",
        "optimizer.decay_epochs": (),
        "optimizer.learning_rate": TUNED_LEARNING_RATE * config.optimizer.learning_rate,
    }
    with config.ignore_type():  # one layer's kind, or a tuple of them
        config.update_from_flattened_dict(changes)
    return config


def replaced_params(params: dict, cuts: Mapping[int, Cut]) -> dict:
    """Returns the parameters of the network whose layers in `cuts` are convolutions."""
    params = dict(params)
    for layer, cut in cuts.items():
        of_layer = dict(params[f"layer_{layer}"])
        bias = of_layer.pop("attention")["value"]["bias"]
        of_layer["convolution"] = {"convolution": {"kernel": jnp.asarray(cut.kernel), "bias": bias}}
        params[f"layer_{layer}"] = of_layer
    return params
