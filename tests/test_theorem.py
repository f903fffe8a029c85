"""The theorem both ways: a convolution is an attention layer, and a position-only layer a convolution."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from program import readme_cell

from attn_cnn.attention import ConvolutionalAttention, SelfAttention, check_window
from attn_cnn.convolution import attention_from_convolution, convolution_from_attention
from attn_cnn.convolution.theorem import (
    EXACT_SPREAD,
    border_bound,
    error_bound,
    kernels_by_shift,
    outside,
    position_encoding,
    probability_off_target,
)
from attn_cnn.encodings import ENCODINGS, encoding_class, window
from attn_cnn.errors import UserError

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
ROUNDING = 3e-6  # of the sum of |x| |W| that an output is


def random(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape)


@functools.partial(jax.jit, static_argnames=("stride", "dilation", "groups", "padding"))
def convolved(x, kernel, stride=1, dilation=1, groups=1, padding="SAME"):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=DIMENSIONS,
        feature_group_count=groups,
        precision="highest",
    )


def attended(x, kernel, bias=None, *, spread=EXACT_SPREAD, stride=1, dilation=1, groups=1, padding="SAME"):
    """Returns what the attention layer makes of x that `attention_from_convolution` gives the parameters of."""
    geometry = {"stride": stride, "dilation": dilation, "padding": padding}
    params = attention_from_convolution(kernel, bias, spread=spread, groups=groups, **geometry)
    layer = ConvolutionalAttention(kernel.shape[-1], kernel.shape[:2], **geometry)
    return jax.jit(layer.apply)({"params": params}, x)


def assert_expresses(kernel_size, groups=1, grid=(9, 12), **geometry):
    x, kernel, bias = random(0, (2, *grid, 4)), random(1, (*kernel_size, 4 // groups, 6)), random(2, (6,))
    y = attended(x, kernel, bias, groups=groups, **geometry)
    expected = convolved(x, kernel, groups=groups, **geometry) + bias
    largest = convolved(abs(x), abs(kernel), groups=groups, **geometry).max()
    np.testing.assert_allclose(y, expected, rtol=0, atol=ROUNDING * float(largest))


# Convolution to attention


@pytest.mark.parametrize(
    "kernel_size, geometry",
    [
        ((1, 1), {}),
        ((3, 3), {"stride": 2}),
        ((5, 5), {}),
        ((7, 7), {"stride": 2}),
        ((2, 4), {"stride": 2, "padding": "VALID"}),
        ((5, 2), {"dilation": 2, "groups": 2}),
        ((3, 1), {"stride": 2, "dilation": 3, "padding": ((6, 7), (0, 2))}),
    ],
    ids=str,
)
def test_attention_is_the_convolution(kernel_size, geometry):
    assert_expresses(kernel_size, **geometry)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    kernel_size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
    padding=st.sampled_from(["SAME", "VALID"]) | st.tuples(*[st.tuples(st.integers(0, 20), st.integers(0, 20))] * 2),
)
def test_attention_is_any_convolution(kernel_size, grid, stride, dilation, groups, padding):
    extents = [dilation * (side - 1) + 1 for side in kernel_size]
    pads = {"SAME": None, "VALID": ((0, 0), (0, 0))}.get(padding, padding)
    geometry = {"stride": stride, "dilation": dilation, "groups": groups, "padding": padding}
    if pads and any(side + sum(pad) < extent for side, pad, extent in zip(grid, pads, extents, strict=True)):
        with pytest.raises(UserError, match="smaller than the"):
            assert_expresses(kernel_size, grid=grid, **geometry)
    else:
        assert_expresses(kernel_size, grid=grid, **geometry)


def test_at_the_exact_spread_every_probability_is_0_or_1():
    params = attention_from_convolution(random(0, (3, 3, 1, 1)), spread=EXACT_SPREAD)
    _, collected = SelfAttention("quadratic", 9).apply(
        {"params": params}, random(1, (1, 32, 32, 1)), mutable=["intermediates"]
    )
    assert set(np.unique(collected["intermediates"]["probabilities"][0])) == {0.0, 1.0}


def gradients_of(layer, params):
    """Returns the gradients of a layer's squares, summed, for random images of 3 channels."""
    x = random(0, (2, 6, 6, 3))
    return jax.jit(jax.grad(lambda params: jnp.square(layer.apply({"params": params}, x)).sum()))(params)


@pytest.mark.slow
def test_heads_start_on_the_dilated_window_and_gradients_move_them():
    layer = ConvolutionalAttention(3, (3, 2), dilation=2)
    params = layer.init(jax.random.key(1), random(0, (2, 6, 6, 3)))["params"]
    np.testing.assert_array_equal(params["centers"], 2 * window(3, 2))
    np.testing.assert_allclose(params["spreads"] ** 2, 10, rtol=1e-6)
    gradients = gradients_of(layer, params)
    assert (abs(gradients["centers"]) > 1e-3).all() and (abs(gradients["spreads"]) > 1e-3).all()


@pytest.mark.slow
def test_at_the_exact_spread_no_gradient_moves_a_head():
    params = attention_from_convolution(random(1, (3, 3, 3, 3)), spread=EXACT_SPREAD)
    gradients = gradients_of(ConvolutionalAttention(3, (3, 3)), params)
    assert not gradients["centers"].any() and not gradients["spreads"].any()
    assert gradients["value"]["kernel"].all()


@pytest.mark.parametrize("groups", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("spread", [0.3, 1.0, 2.0, 10**0.5, 5.0])
def test_the_error_of_a_smaller_spread_is_within_its_bound(spread, groups):
    x, kernel = random(0, (2, 8, 8, 4)), random(1, (3, 3, 4 // groups, 4))
    error = abs(attended(x, kernel, spread=spread, groups=groups) - convolved(x, kernel, groups=groups)).max()
    assert error <= error_bound(kernel, spread, float(abs(x).max())) + 1e-4


@pytest.mark.parametrize("spread", [0.8, 1.0, 2.0, 3.0])
def test_the_bound_is_attained(spread):
    x = jnp.full((1, 31, 31, 1), 3.0).at[0, 15, 15].set(-3.0)  # one pixel against all others
    kernel = jnp.full((1, 1, 1, 1), 2.0)
    error = abs(attended(x, kernel, spread=spread) - convolved(x, kernel))[0, 15, 15, 0]
    np.testing.assert_allclose(error, error_bound(kernel, spread, 3.0), rtol=1e-5)


def test_the_probability_off_target_falls_with_the_spread_to_nothing():
    off = [probability_off_target(spread) for spread in (0.01, 0.1, 1.0, 10**0.5, 5.0, EXACT_SPREAD)]
    assert off == sorted(off, reverse=True) and off[0] > 0.999 and off[-1] < 1e-50
    np.testing.assert_allclose(off[3], 4 * np.exp(-5), rtol=0.02)  # four neighbours


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"stride": 0}, "stride is 0"),
        ({"dilation": -1}, "dilation is -1"),
        ({"groups": 4}, "groups is 4, which does not divide the 6 channels"),
        ({"padding": "FULL"}, "padding is 'FULL'; it must be SAME, VALID"),
        ({"padding": ((0, -1), (0, 0))}, r"padding is \(\(0, -1\), \(0, 0\)\)"),
        ({"spread": 0.0}, "spread is 0.0; it must be above 0"),
    ],
)
def test_what_is_no_convolution_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        attention_from_convolution(random(0, (3, 3, 2, 6)), **{"spread": 16.0} | arguments)


@pytest.mark.parametrize("padding", [1, (1, 1), ((1, 2), (3,)), "FULL"])
def test_padding_of_another_form_is_refused_with_the_form_it_has(padding):
    with pytest.raises(UserError, match=r"it must be SAME, VALID, or zeros as \(\(top, bottom\), \(left, right\)\)"):
        inspect.unwrap(check_window)((3, 3), 1, 1, padding)


def test_a_grid_smaller_than_the_window_is_refused():
    with pytest.raises(UserError, match="grid is 4x9, and 4x9 when padded, smaller than the 5x5 window"):
        attended(random(0, (1, 4, 9, 2)), random(1, (3, 3, 2, 2)), dilation=2, padding="VALID")


def test_the_cell_in_the_readme_shows_equality():
    *lines, last = filter(None, readme_cell("attention_from_convolution").splitlines())
    assert len(lines) == 4
    names = {}
    exec("\n".join(lines), names)
    assert eval(last, names) < 1e-4


# Attention to convolution


POSITION_ONLY = [name for name, encoding in ENCODINGS.items() if not encoding.needs_x]


def layer_of(encoding, grid=(5, 7), features=3, heads=4):
    """Returns an attention layer with random parameters, and images."""
    layer, x = SelfAttention(encoding, heads), random(0, (2, *grid, features))
    return layer, layer.init(jax.random.key(1), x)["params"], x


def convolved_with(params, x):
    """Returns the zero-padded convolution of `convolution_from_attention`, with the layer's bias."""
    height, width = grid = x.shape[1:3]
    kernel = convolution_from_attention(params, grid)
    assert kernel.shape == (2 * height - 1, 2 * width - 1, *params["value"]["kernel"].shape[1:])
    return convolved(x, kernel, padding=((height - 1,) * 2, (width - 1,) * 2)) + params["value"]["bias"]


@pytest.mark.slow
@pytest.mark.parametrize("encoding", POSITION_ONLY)
def test_a_position_only_layer_is_a_convolution_within_its_bound(encoding):
    layer, params, x = layer_of(encoding)
    error = abs(layer.apply({"params": params}, x) - convolved_with(params, x)).max(0)
    bound = border_bound(params, (5, 7), float(abs(x).max()))
    assert (error <= bound + 1e-5).all()
    assert error.max() > 1e-2  # the border does cut off something


@pytest.mark.slow
def test_where_nothing_is_outside_the_grid_the_layer_is_the_convolution():
    kernel, x = random(0, (3, 3, 2, 2)), random(1, (2, 9, 8, 2))
    params = attention_from_convolution(kernel, random(2, (2,)), spread=8.0)
    out = np.asarray(outside(kernels_by_shift(position_encoding(params), (9, 8))))
    exact = (out < 1e-7).all(0)
    assert exact[1:-1, 1:-1].all() and exact.sum() == 7 * 6
    error = abs(SelfAttention("quadratic", 9).apply({"params": params}, x) - convolved_with(params, x)).max((0, 3))
    assert error[exact].max() < 1e-5 < error[~exact].min()


def test_outside_is_what_the_grid_does_not_see():
    kernels = jax.nn.softmax(random(0, (2, 5 * 7))).reshape(2, 5, 7)  # a 3x4 grid
    out = np.asarray(outside(kernels))
    for i in range(3):
        for j in range(4):
            seen = [kernels[:, k - i + 2, l - j + 3] for k in range(3) for l in range(4)]
            np.testing.assert_allclose(out[:, i, j], 1 - sum(seen), atol=1e-6)


def test_there_and_back_gives_the_kernel():
    kernel = random(0, (3, 5, 2, 4))
    back = convolution_from_attention(attention_from_convolution(kernel, spread=EXACT_SPREAD), (8, 8))
    np.testing.assert_array_equal(back[6:9, 5:10], kernel)
    assert abs(back).sum() == abs(back[6:9, 5:10]).sum()


@pytest.mark.parametrize("encoding", POSITION_ONLY)
def test_parameters_tell_their_encoding(encoding):
    _, params, _ = layer_of(encoding)
    assert type(position_encoding(params)) is encoding_class(encoding)


def test_attention_that_reads_the_image_is_no_convolution():
    _, params, _ = layer_of("learned_content", features=4)
    with pytest.raises(UserError, match="are of no layer whose attention depends on positions alone"):
        convolution_from_attention(params, (5, 7))


def test_parameters_of_a_whole_network_are_refused_with_what_to_give():
    _, params, _ = layer_of("quadratic")
    with pytest.raises(UserError, match=r'give those of one, as in params\["layer_0"\]\["attention"\]'):
        convolution_from_attention({"layer_0": {"attention": params}}, (5, 7))


def test_a_grid_beyond_the_tables_is_refused():
    _, params, _ = layer_of("learned")
    with pytest.raises(UserError, match="grid is 17x3"):
        convolution_from_attention(params, (17, 3))
