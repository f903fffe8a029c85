"""Matrix products are as precise as a run's config says where its network is computed, and float32 in formulas."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from program import WORKDIRS

from attn_cnn import attention_from_convolution, convolution_from_attention, load_run
from attn_cnn.convolution.express import compare_layers
from attn_cnn.convolution.recover import maps_of_run
from attn_cnn.convolution.replace import layer_errors
from attn_cnn.convolution.theorem import EXACT_SPREAD, border_bound
from attn_cnn.encodings import QuadraticGeneralized
from attn_cnn.explorer import network, view
from attn_cnn.figures.sources import RunSource
from attn_cnn.heads import report
from attn_cnn.predict import predict

IMAGES = np.zeros((2, 8, 8, 1), np.uint8)
COMPUTED = {
    "probabilities of classes": ("gated", lambda run: predict(run, IMAGES)),
    "maps": ("gated", lambda run: maps_of_run(run, IMAGES)),
    "errors of layers": ("gated", lambda run: layer_errors(run, {}, IMAGES)),
    "numbers of heads": ("gated", report.of_run),
    "figures": ("gated", lambda run: RunSource(run, 2).numbers()),
    "a page": ("gated", lambda run: view.of_run(run, "gated", 2, network.steps(run), half=False)),
    "layers beside attention": ("resnet18", lambda run: compare_layers(run, 3.0, IMAGES)),
}


@pytest.mark.slow
@pytest.mark.parametrize("workdir, compute", COMPUTED.values(), ids=COMPUTED)
def test_the_network_is_computed_in_the_precision_of_its_config(workdir, compute):
    run, precisions = load_run(WORKDIRS / workdir), set()
    run.config.matmul_precision = "highest"

    def keep_precision(next_call, args, kwargs, context):
        precisions.add(jax.config.jax_default_matmul_precision)
        return next_call(*args, **kwargs)

    with nn.intercept_methods(keep_precision):
        compute(run)
    assert precisions == {"highest"}


KERNEL = np.ones((3, 3, 2, 4), np.float32)
PARAMS = attention_from_convolution(KERNEL, spread=EXACT_SPREAD)


def penalty(spreads):
    return QuadraticGeneralized(jnp.zeros((len(spreads), 2)), spreads).penalty().sum()


@pytest.mark.parametrize(
    "formula, argument",
    [
        (jax.value_and_grad(penalty), np.ones((3, 2, 2), np.float32)),
        (lambda params: convolution_from_attention(params, (5, 7)), PARAMS),
        (lambda params: border_bound(params, (5, 7), 1.0), PARAMS),
    ],
    ids=["penalty", "convolution from attention", "bound at the border"],
)
def test_the_products_of_a_formula_are_in_float32_on_every_device(formula, argument):
    text = jax.jit(formula).lower(argument).as_text()
    assert text.count("dot_general") == text.count("precision = [HIGHEST, HIGHEST]") > 0
