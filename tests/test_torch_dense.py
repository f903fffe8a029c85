"""The dense PyTorch network of the benchmark is the same function as ours, so that their times compare."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import program
import pytest

from attn_cnn.model import create_model
from attn_cnn.torch_export import export_variables
from attn_cnn.training.experiment import random_state
from benchmarks import common
from configs import quadratic

torch = pytest.importorskip("torch", reason="needs PyTorch")
pytestmark = pytest.mark.slow
from benchmarks.torch_dense import QuadraticClassifier  # noqa: E402


@pytest.fixture
def config():
    config = quadratic.get_config()
    config.batch_size = 2
    config.model.update(image_shape=(8, 8, 3), layers=2, hidden_size=12, mlp_size=8, dropout=0.0, attention_dropout=0.0)
    return config


@pytest.fixture
def twins(config):
    """Our model and parameters, and PyTorch's model with the same."""
    params = random_state(common.on_random_images(config)).params
    twin = QuadraticClassifier(config.model)
    arrays = export_variables({"params": params}, config.model)
    twin.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})
    return create_model(config.model), params, twin


def test_the_same_parameters_give_the_same_loss_and_gradients(config, twins):
    model, params, twin = twins
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    labels = np.array([3, 7])

    def loss_of(params):
        logits = model.apply({"params": params}, jnp.asarray(images), train=False)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    ours, gradients = jax.value_and_grad(loss_of)(params)
    theirs = torch.nn.functional.cross_entropy(twin(torch.tensor(images)), torch.tensor(labels))
    theirs.backward()
    np.testing.assert_allclose(theirs.item(), ours, rtol=1e-5)
    gradients = export_variables({"params": gradients}, config.model)
    for name, parameter in twin.named_parameters():
        np.testing.assert_allclose(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4, err_msg=name)


STEP = """
import torch
from benchmarks.torch_dense import QuadraticClassifier, training_step
from configs import quadratic

model = quadratic.get_config().model
model.update(image_shape=(8, 8, 3), layers=2, hidden_size=12, mlp_size=8)
twin = QuadraticClassifier(model)
before = [parameter.detach().clone() for parameter in twin.parameters()]
training_step(twin, torch.randn(2, 8, 8, 3), torch.tensor([3, 7]), torch.{dtype})()
assert all((a != b).any() for a, b in zip(before, twin.parameters(), strict=True))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_step_moves_every_parameter(dtype):
    # In a process of its own: PyTorch's optimizers load Triton, which crashes beside TensorFlow.
    subprocess.run([sys.executable, "-c", STEP.format(dtype=dtype)], cwd=program.ROOT, check=True, timeout=300)
