"""Attention by shift: maps with known answers, anyone's, give those answers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_cnn.convolution import kernels as kernels_lib
from attn_cnn.convolution.kernels import Average, Window, best_window, smallest_window
from attn_cnn.convolution.recover import recover_maps
from attn_cnn.maps import Maps

SIDE = 8


def shift(d, side=SIDE):
    """One head that attends to the pixel at shift d, or where that is outside to the nearest one inside."""
    maps = np.zeros((1, 1, side, side, side, side))
    for i in range(side):
        for j in range(side):
            maps[0, 0, i, j, min(max(i + d[0], 0), side - 1), min(max(j + d[1], 0), side - 1)] = 1
    return maps


def box(side=SIDE):
    """One head that attends alike to the 3x3 pixels around the query, to those of them that there are."""
    maps = np.zeros((1, 1, side, side, side, side))
    for i in range(side):
        for j in range(side):
            maps[0, 0, i, j, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2] = 1
    return maps / maps.sum((-2, -1), keepdims=True)


def uniform(side=SIDE):
    return np.full((1, 1, side, side, side, side), 1 / side**2)


def by_content(images=200, side=4):
    """One head whose queries each attend to one pixel, drawn anew for each image."""
    maps = np.zeros((images, 1, side**2, side**2))
    drawn = np.random.default_rng(0).integers(side**2, size=(images, 1, side**2))
    np.put_along_axis(maps, drawn[..., None], 1, -1)
    return maps.reshape(images, 1, side, side, side, side)


def heads_of(*maps):
    """The report of one layer with these heads, one each."""
    return recover_maps(Maps([np.concatenate(maps, 1)]))["layers"][0]


def test_a_pure_shift_is_a_convolution_with_one_pixel_but_for_the_border():
    (head,) = heads_of(shift((-2, 1)))["heads"]
    assert head["peak_shift"] == head["target"] == (-2, 1)
    assert head["peak"] == 1.0
    # Rows 0 and 1 and the last column look at nearer pixels: 22 of the 64 queries.
    assert head["by_place"] > 0.1 and head["by_content"] == 0.0
    (head,) = heads_of(shift((0, 0)))["heads"]
    assert head["windows"] == (1, 1, 1) and head["mean_shift"] == head["deviation"] == (0.0, 0.0)
    assert head["by_shift"] == pytest.approx(1) and head["by_place"] == pytest.approx(0, abs=1e-12)


def test_a_box_fills_its_window():
    (head,) = heads_of(box())["heads"]
    assert head["windows"] == (3, 3, 3)
    assert head["mean_shift"] == pytest.approx((0, 0), abs=1e-12)
    assert 1 / 9 < head["peak"] < 0.15  # a ninth, and more near the border
    assert head["by_shift"] > 0.9 and head["by_content"] == 0.0


def test_uniform_attention_fills_all_shifts_and_has_no_target():
    (head,) = heads_of(uniform())["heads"]
    shifts = 2 * SIDE - 1
    assert head["windows"] == tuple(int(np.ceil(np.sqrt(share) * shifts - 1e-6)) for share in kernels_lib.WINDOW_SHARES)
    assert head["peak"] == pytest.approx(1 / SIDE**2) and head["target"] is None
    assert head["deviation"] == pytest.approx([np.sqrt((shifts**2 - 1) / 12)] * 2)
    assert head["by_shift"] == pytest.approx(1)


def test_attention_by_content_is_told_from_attention_by_shift():
    (head,) = heads_of(by_content())["heads"]
    # Of squares 1 each query keeps 1/16 in the mean over images, and a little more of 200 of them.
    assert head["by_content"] == pytest.approx(15 / 16, abs=0.01)
    assert head["by_shift"] + head["by_place"] + head["by_content"] == pytest.approx(1)


def test_attention_to_one_place_is_told_from_attention_by_shift():
    maps = np.zeros((1, 1, 4, 4, 4, 4))
    maps[..., 2, 1] = 1
    (head,) = heads_of(maps)["heads"]
    assert head["by_place"] > 0.8 and head["by_content"] == 0.0


def test_heads_that_share_a_target_and_heads_that_mirror_each_other_are_named():
    layer = heads_of(shift((0, 1)), shift((1, 0)), uniform(), shift((0, 1)), shift((0, -1)), shift((0, 0)), uniform())
    assert layer["sharing"] == [[0, 3]]
    assert layer["mirrored"] == [(0, 4), (3, 4)]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**16))
def test_the_parts_of_any_maps_are_the_squares_of_what_they_are_called(height, width, images, seed):
    maps = np.random.default_rng(seed).exponential(size=(images, 2, height, width, height, width))
    maps /= maps.sum((-2, -1), keepdims=True)
    average = Average.of(maps[:1])
    for image in maps[1:]:
        average = average.with_more(Average.of(image[None]))
    kernel, mean = kernels_lib.kernels(average.mean), maps.mean(0)
    by_shift = np.empty_like(mean)
    for i, j, k, l in np.ndindex(height, width, height, width):
        by_shift[:, i, j, k, l] = kernel[:, k - i + height - 1, l - j + width - 1]

    def squares(values):
        return np.square(values).sum((-1, -2, -3, -4)).reshape(-1, 2).mean(0)

    expected = [squares(part) / squares(maps) for part in (by_shift, mean - by_shift, maps - mean)]
    np.testing.assert_allclose(kernels_lib.dependence(average), expected, atol=1e-12)


def test_the_best_window_is_the_one_with_most_and_among_equals_the_nearest():
    values = np.zeros((7, 9))
    values[1, 6] = 2.0
    assert best_window(values, 1) == (Window(-2, 2, 1), 2.0)
    window, total = best_window(values, 3)
    assert (window, total) == (Window(-2, 0, 3), 2.0)  # of the nine that hold it
    assert best_window(np.ones((7, 9)), 3) == (Window(-1, -1, 3), 9.0)


@pytest.mark.parametrize("share, side", [(0.4, 1), (0.5, 1), (0.51, 3), (0.99, 5)])
def test_the_smallest_window_holds_the_share(share, side):
    mass = np.zeros((9, 9))
    mass[4, 4], mass[2, 4], mass[4, 8] = 0.5, 0.4, 0.1
    assert smallest_window(mass, share) == side


def test_energy_and_cuts_are_those_of_the_layers_kernel():
    rng = np.random.default_rng(0)
    kernels, value = rng.normal(size=(3, 5, 7)), rng.normal(size=(3, 2, 4))
    whole = np.einsum("hrc,hio->rcio", kernels, value)
    np.testing.assert_allclose(kernels_lib.energy(kernels, value), np.square(whole).sum((2, 3)))
    np.testing.assert_allclose(kernels_lib.cut_kernel(kernels, value, Window(-2, 1, 3)), whole[0:3, 4:7], rtol=1e-6)
