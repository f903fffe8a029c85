"""What compilers for TPUs and GPUs make of the steps: gradients summed at once, no loops, half precision."""

import importlib.util
import re

import pytest
from program import tiny_config

from attn_cnn.errors import UserError
from attn_cnn.report import count_parameters
from attn_cnn.training.experiment import abstract_state
from benchmarks import accelerators
from benchmarks.accelerators import INSTALL, TARGETS, Products, collectives, loops, products
from configs import gated, learned_content, quadratic, resnet18

INSTALLED = {
    "tpu": importlib.util.find_spec("libtpu") is not None,
    "gpu": importlib.util.find_spec("jax_cuda13_plugin") is not None,
}

# A GPU's compiler leaves some gradients of a model as small as this in sums of their own.
LARGE_SUMS, SMALL_SUMS = {"tpu": 3, "gpu": 4}, {"tpu": 0.2, "gpu": 0.4}


def needs_compiler(name):
    """The target of that name, for tests that are skipped where nothing compiles for it."""
    kind = TARGETS[name].kind
    reason = f"needs a compiler, as from {INSTALL[kind]}"
    return pytest.param(TARGETS[name], marks=pytest.mark.skipif(not INSTALLED[kind], reason=reason), id=name)


@pytest.fixture(scope="module", params=[needs_compiler("v5e-8"), needs_compiler("h100-8")])
def target(request):
    return request.param


@pytest.fixture(
    scope="module", params=[quadratic, learned_content, gated, resnet18], ids=lambda module: module.__name__
)
def compiled(request, target):
    """An experiment, its training step in bfloat16 for 8 devices, and the program's text."""
    config = tiny_config(request.param, batch_size=100, dtype="bfloat16")  # shares of 13, the last of 9
    experiment = accelerators.experiment_for(target, config)
    program = accelerators.compile_training(experiment, accelerators.mesh_of(target))
    return experiment, program, program.compiled.as_text()


@pytest.mark.slow
def test_gradients_cross_devices_once_and_nothing_else_does_that_grows_with_the_model(compiled, target):
    experiment, _, text = compiled
    gradients = 4 * count_parameters(abstract_state(experiment).params)  # in float32
    small = [size for size in collectives(text) if size < 0.1 * gradients]
    large = [size for size in collectives(text) if size >= 0.1 * gradients]
    assert 1 <= len(large) <= LARGE_SUMS[target.kind] and sum(large) <= 1.1 * gradients
    assert sum(small) <= SMALL_SUMS[target.kind] * gradients  # batch statistics, loss, accuracy
    assert sum(large) + sum(small) <= 1.3 * gradients


def transfers(hlo):
    """How many operations there are in a compiled program that wait for the host."""
    return len(re.findall(r" (?:infeed|outfeed|send|recv)(?:-start)?\(", hlo))


@pytest.mark.slow
def test_there_is_no_loop_and_the_host_is_not_waited_for(compiled):
    _, _, text = compiled
    assert loops(text) == 0 and transfers(text) == 0


@pytest.mark.slow
def test_products_of_pixels_take_half_precision_forward_and_backward(compiled):
    _, program, _ = compiled
    assert program.products.keys() <= {"bfloat16 x bfloat16", "float32 x float32"}
    flops = {types: found.flops for types, found in program.products.items()}
    assert flops["bfloat16 x bfloat16"] > 0.9 * sum(flops.values())  # the rest are of parameters with parameters


def test_texts_are_read_for_what_they_say():
    hlo = """
  %all-reduce.5 = (f32[10]{0:T(128)}, bf16[64,10]{0,1}) all-reduce(%a, %b), channel_id=1
  %ag = f32[2,3] all-gather-start(%c)
  %w = (s32[], f32[3]) while(%t), condition=%c, body=%b
  %i = token[] infeed(%x)
"""
    assert collectives(hlo) == [40 + 1280, 24] and loops(hlo) == 1 and transfers(hlo) == 1
    line = "= stablehlo.dot_general %a, %b, contracting_dims = [1] x [0] : (tensor<2x3xbf16>, tensor<3x4xf32>) -> "
    assert products(f"{line}tensor<2x4xf32>") == {"bfloat16 x float32": Products(1, 2 * 2 * 3 * 4)}
    line = "= stablehlo.convolution(%a, %b) dim_numbers = [b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f], window = {} : "
    line += "(tensor<7x8x8x2xf32>, tensor<3x3x2x5xf32>) -> tensor<7x8x8x5xf32>"
    assert products(line) == {"float32 x float32": Products(1, 2 * (3 * 3 * 2) * (7 * 8 * 8 * 5))}


@pytest.mark.skipif(INSTALLED["tpu"], reason="the TPU's compiler is installed")
def test_a_compiler_that_is_missing_is_one_message():
    with pytest.raises(UserError, match=r'pip install "libtpu'):
        accelerators.mesh_of(TARGETS["v5e-8"])
