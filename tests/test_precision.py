"""Whatever is computed with a run, its matrix products are as precise as its config says."""

from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

from attn_cnn import load_run
from attn_cnn.convolution.express import compare_layers
from attn_cnn.convolution.recover import maps_of_run
from attn_cnn.convolution.replace import layer_errors
from attn_cnn.explorer import network, view
from attn_cnn.figures.sources import RunSource
from attn_cnn.heads.__main__ import report
from attn_cnn.predict import predict

WORKDIRS = Path(__file__).parent / "workdirs"
IMAGES = np.zeros((2, 8, 8, 1), np.uint8)
COMPUTED = {
    "probabilities of classes": ("11_gated", lambda run: predict(run, IMAGES)),
    "maps": ("11_gated", lambda run: maps_of_run(run, IMAGES)),
    "errors of layers": ("11_gated", lambda run: layer_errors(run, {}, IMAGES)),
    "numbers of heads": ("11_gated", report),
    "figures": ("11_gated", lambda run: RunSource(run, 2).numbers()),
    "a page": ("11_gated", lambda run: view.of_run(run, "gated", 2, network.steps(run), half=False)),
    "layers beside attention": ("before_11_resnet18", lambda run: compare_layers(run, 3.0, IMAGES)),
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
