"""Linear maps and convolutions compute what they are named after, and start as PyTorch's do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import assert_close

from attn_cnn.layers import Bias, Convolution, Linear, LinearMap, dense, fan_in_uniform

X = jax.random.normal(jax.random.key(0), (2, 4, 5, 6))


def assert_uniform(values, fan_in):
    bound = fan_in**-0.5
    assert 0.95 * bound < np.abs(values).max() <= bound
    assert np.mean(values) == pytest.approx(0, abs=0.1 * bound)
    assert np.std(values) == pytest.approx(bound / 3**0.5, rel=0.05)


def test_values_start_uniform_in_the_inverse_root_of_fan_in():
    assert_uniform(fan_in_uniform(25)(jax.random.key(0), (5000,)), 25)


@pytest.mark.slow
def test_every_layer_starts_uniform_in_the_inverse_root_of_its_own_fan_in():
    params = jax.jit(dense(1000, 16).init)(jax.random.key(0), jnp.ones((1, 16)))["params"]
    assert_uniform(params["kernel"], 16)
    assert_uniform(params["bias"], 16)
    kernel, bias = jax.jit(Linear((30, 4, 30), (1000,), fan_in=120).init_with_output)(jax.random.key(0))[0]
    assert_uniform(kernel, 120)
    assert_uniform(bias, 120)
    assert_uniform(Bias(2000).init_with_output(jax.random.key(0))[0], 2000)
    then = LinearMap(jnp.ones((40, 1)), jnp.zeros(1))
    params = jax.jit(Convolution(3).init)(jax.random.key(0), jnp.ones((1, 3, 3, 40)), then)["params"]
    assert_uniform(params["convolution"]["kernel"], 3 * 3 * 40)


def linear_map(seed, *shape):
    return LinearMap(*(jax.random.normal(jax.random.key(seed + i), s) for i, s in enumerate((shape, shape[-1:]))))


def test_a_linear_map_composed_with_another_is_one_after_the_other():
    first, second = linear_map(1, 6, 3), linear_map(3, 3, 4)
    assert_close(first.then(second)(X), second(first(X)))
    assert_close(first(X), np.asarray(X, np.float64) @ np.asarray(first.kernel, np.float64) + first.bias)


def test_a_linear_map_cut_into_heads_composes_head_by_head():
    heads, second = linear_map(1, 5, 6, 3), linear_map(3, 3, 4)
    composed = heads.then(second)
    for head in range(5):
        assert_close(composed.kernel[head], heads.kernel[head] @ second.kernel)
    assert_close(composed.bias, second(heads.bias))


def test_a_linear_map_multiplies_in_the_type_of_its_input():
    wide = LinearMap(jnp.full((1, 1), 1 + 2**-12), jnp.zeros(1))
    assert wide(jnp.ones((1, 1)))[0, 0] == 1 + 2**-12
    assert wide(jnp.ones((1, 1), jnp.bfloat16))[0, 0] == 1


@pytest.mark.slow
@pytest.mark.parametrize("side", [1, 2, 3])
def test_a_convolution_sums_over_the_window_of_the_zero_padded_grid_and_applies_the_map(side):
    then = linear_map(1, 6, 4)
    layer = Convolution(side)
    params = jax.jit(layer.init)(jax.random.key(0), X, then)["params"]
    kernel, bias = params["convolution"]["kernel"], params["convolution"]["bias"]
    assert kernel.shape == (side, side, 6, 6)
    before = (side - 1) // 2
    padded = np.pad(X, ((0, 0), (before, side - 1 - before), (before, side - 1 - before), (0, 0)))
    convolved = bias + sum(
        padded[:, i : i + 4, j : j + 5] @ np.asarray(kernel[i, j]) for i in range(side) for j in range(side)
    )
    assert_close(layer.apply({"params": params}, X, then), then(convolved))
