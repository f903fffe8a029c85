"""Attention maps in a file: ours come back as they were, anyone's are read with or without special tokens."""

import re

import numpy as np
import pytest
from etils import epath

from attn_cnn.errors import UserError
from attn_cnn.maps import read_maps, write_maps


def probabilities(*shape, keys=(-1,)):
    values = np.random.default_rng(0).exponential(size=shape).astype(np.float32)
    return values / values.sum(keys, keepdims=True)


def grid_maps(images=2, heads=3, height=2, width=3):
    return probabilities(images, heads, height, width, height, width, keys=(-2, -1))


@pytest.fixture
def path(tmp_path):
    return epath.Path(tmp_path) / "maps.npz"


def test_maps_come_back_as_they_were(path):
    maps = [grid_maps(), grid_maps(images=1, heads=5, height=4)]
    write_maps(path, maps)
    for ours, read in zip(maps, read_maps(path), strict=True):
        np.testing.assert_array_equal(ours, read)


def test_half_precision_will_do(path):
    write_maps(path, [grid_maps().astype(np.float16)])
    np.testing.assert_allclose(read_maps(path)[0], grid_maps(), rtol=2e-3)


def test_tokens_become_the_grid_row_by_row(path):
    maps = grid_maps()
    np.savez(path, layer_0=maps.reshape(2, 3, 6, 6), grid=(2, 3))
    np.testing.assert_allclose(read_maps(path)[0], maps, rtol=1e-6)


def test_special_tokens_are_left_out_and_what_is_left_sums_to_1(path):
    maps = probabilities(2, 3, 8, 8)
    np.savez(path, layer_0=maps, grid=(2, 3), special_tokens=2)
    (read,) = read_maps(path)
    np.testing.assert_allclose(read.sum((-2, -1)), 1, rtol=1e-6)
    expected = maps[:, :, 2:, 2:] / maps[:, :, 2:, 2:].sum(-1, keepdims=True)
    np.testing.assert_allclose(read, expected.reshape(2, 3, 2, 3, 2, 3), rtol=1e-6)


TOKENS = probabilities(1, 2, 7, 7)
PROBLEMS = {
    "no layers": ({"grid": (2, 3)}, "holds no layers; the arrays are layer_0, layer_1, ..., grid and special_tokens"),
    "another array": ({"layer_0": TOKENS, "attn": TOKENS}, "holds an array 'attn'"),
    "a layer left out": ({"layer_0": TOKENS, "layer_2": TOKENS}, "holds layers 0, 2; number them from 0"),
    "integers": ({"layer_0": np.ones((1, 1, 1, 1, 1, 1), int)}, "layer_0 of .* holds int64"),
    "no numbers": ({"layer_0": np.ones((0, 1, 2, 2, 2, 2))}, r"shape \(0, 1, 2, 2, 2, 2\), without any numbers"),
    "axes": ({"layer_0": np.ones((3, 2, 2))}, r"layer_0 .* has shape \(3, 2, 2\); it must be \(images, heads, H"),
    "two grids": ({"layer_0": np.ones((1, 1, 2, 2, 2, 3)) / 6}, r"shape \(1, 1, 2, 2, 2, 3\); it must be"),
    "no grid": ({"layer_0": TOKENS}, r"has tokens, 7 of them, but the file no grid; add grid=\(H, W\)"),
    "another grid": ({"layer_0": TOKENS, "grid": (2, 3)}, "7 queries and 7 keys; a grid of 2x3 with 0 special tokens"),
    "a bad grid": ({"layer_0": TOKENS, "grid": (7, 0)}, r"grid in .* is \[7, 0\]"),
    "bad special tokens": ({"layer_0": TOKENS, "grid": (2, 3), "special_tokens": 0.5}, "special_tokens in .* is 0.5"),
    "a grid too many": ({"layer_0": grid_maps(), "grid": (2, 3)}, "beside which the file has a grid"),
    "scores": ({"layer_0": -TOKENS, "grid": (1, 7)}, "no probabilities .* apply the softmax"),
    "sums": ({"layer_0": 2 * TOKENS, "grid": (1, 7)}, "has a query whose probabilities sum to 2; they must sum to 1"),
    "special alone": ({"layer_0": np.eye(3)[None, None][..., [0, 0, 0], :], "grid": (1, 2), "special_tokens": 1},
                      "attends to special tokens alone"),
}  # fmt: skip


@pytest.mark.parametrize("arrays, message", PROBLEMS.values(), ids=PROBLEMS)
def test_what_is_wrong_with_a_file_is_said(path, arrays, message):
    np.savez(path, **arrays)
    with pytest.raises(UserError) as error:
        read_maps(path)
    assert re.search(message, str(error.value)), error.value


def test_a_file_that_is_missing_or_no_npz_is_named(path):
    with pytest.raises(UserError, match=r"maps.npz does not exist"):
        read_maps(path)
    path.write_text("maps")
    with pytest.raises(UserError, match=r"maps.npz is no .npz of plain arrays"):
        read_maps(path)
