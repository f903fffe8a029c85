"""Attention maps in a file: ours come back as they were, anyone's are read with or without prefix tokens."""

import logging
import re

import numpy as np
import pytest
from etils import epath

from attn_cnn import maps
from attn_cnn.errors import UserError
from attn_cnn.maps import Maps


def probabilities(*shape, keys=(-1,)):
    values = np.random.default_rng(0).exponential(size=shape).astype(np.float32)
    return values / values.sum(keys, keepdims=True)


def grid_maps(images=2, heads=3, height=2, width=3):
    return probabilities(images, heads, height, width, height, width, keys=(-2, -1))


def softmax(scores):
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def vision_transformer(layers=2, heads=3, grid=(2, 3), prefix=1, width=12, images=2):
    """Returns the attentions of a random vision transformer in plain NumPy, (layers, images, heads, N, N)."""
    draw, tokens = np.random.default_rng(0), prefix + grid[0] * grid[1]
    x, attentions = draw.normal(size=(images, tokens, width)), []
    for _ in range(layers):
        q, k, v = (x @ draw.normal(size=(heads, 1, width, width)) / width**0.5 for _ in range(3))
        attentions.append(softmax(q @ k.swapaxes(-2, -1) / width**0.5).swapaxes(0, 1))
        mixed = np.einsum("bhqk,hbkd->bqd", attentions[-1], v)
        x = x + mixed + np.maximum(x @ draw.normal(size=(width, width)) / width**0.5, 0)
    return np.stack(attentions)


@pytest.fixture
def path(tmp_path):
    return epath.Path(tmp_path) / "maps.npz"


@pytest.mark.parametrize("second", [grid_maps(), grid_maps(images=1, heads=5, height=4)], ids=["alike", "different"])
def test_maps_and_images_come_back_as_they_were(path, second):
    layers, images = [grid_maps(), second], np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)
    maps.write(path, Maps(layers, images))
    read = maps.read(path)
    for ours, theirs in zip(layers, read.layers, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(read.images, images)


def test_maps_of_one_image_need_no_axis_of_images(path):
    np.savez(path, maps=np.stack([grid_maps(images=1)[0]] * 2))
    assert [layer.shape for layer in maps.read(path).layers] == [(1, 3, 2, 3, 2, 3)] * 2


def test_half_precision_will_do(path):
    np.savez(path, maps=grid_maps()[None].astype(np.float16))
    np.testing.assert_allclose(maps.read(path).layers[0], grid_maps(), rtol=2e-3)


def test_tokens_become_the_grid_row_by_row(path):
    expected = grid_maps()
    np.savez(path, attentions=expected.reshape(1, 2, 3, 6, 6), grid=(2, 3))
    np.testing.assert_allclose(maps.read(path).layers[0], expected, rtol=1e-6)


def test_a_vision_transformer_is_read_without_its_class_token_and_the_log_says_so(path, caplog):
    attentions = vision_transformer()
    np.savez(path, attentions=attentions, grid=(2, 3), prefix_tokens=1)
    with caplog.at_level(logging.INFO, "attn_cnn"):
        layers = maps.read(path).layers
    np.testing.assert_allclose([layer.sum((-2, -1)) for layer in layers], 1, rtol=1e-5)
    pixels = attentions[..., 1:, 1:]
    expected = (pixels / pixels.sum(-1, keepdims=True)).reshape(2, 2, 3, 2, 3, 2, 3)
    np.testing.assert_allclose(layers, expected, rtol=1e-5)
    left_out = attentions[..., 1:, 0].mean()
    assert f"prefix tokens (1) are left out; what pixels attended to them, {left_out:.1%}" in caplog.text


def test_layers_of_a_pyramid_have_grids_of_their_own(path):
    first, second = probabilities(1, 2, 24, 24), probabilities(1, 4, 6, 6)
    np.savez(path, attentions_0=first, attentions_1=second, grid=((4, 6), (2, 3)))
    assert [layer.shape for layer in maps.read(path).layers] == [(1, 2, 4, 6, 4, 6), (1, 4, 2, 3, 2, 3)]


def test_numbers_of_layers_may_have_zeros_in_front(path):
    layers = [grid_maps(), grid_maps()[:, :1]]
    np.savez(path, maps_01=layers[1], maps_00=layers[0])
    assert all(map(np.array_equal, maps.read(path).layers, layers))


TOKENS = probabilities(1, 2, 7, 7)
GRID = grid_maps()
PROBLEMS = {
    "no maps": ({"grid": (2, 3)}, "holds no maps; the arrays are maps, or attentions with grid"),
    "another array": ({"attentions": TOKENS, "attn": TOKENS}, "holds an array 'attn'"),
    "both forms": ({"attentions": TOKENS, "maps": GRID}, "holds both maps and attentions"),
    "all and each": ({"maps": GRID[None], "maps_0": GRID}, "holds maps and maps_0; leave maps out"),
    "a layer left out": ({"maps_0": GRID, "maps_2": GRID}, "holds layers 0, 2; number them from 0"),
    "a layer twice": ({"maps_0": GRID, "maps_00": GRID}, "holds layers 0; number them from 0"),
    "integers": ({"maps": np.ones((1, 1, 1, 1, 1, 1), int)}, "layer 0 of maps in .* holds int64"),
    "no numbers": ({"maps_0": np.ones((0, 1, 2, 2, 2, 2))}, r"shape \(0, 1, 2, 2, 2, 2\); it must .* none of them 0"),
    "no layers": ({"maps": np.ones((0, 1, 2, 2, 2, 2))}, r"shape \(0, 1, 2, 2, 2, 2\); it must be \(layers, "),
    "several images": ({"maps_0": GRID, "maps_1": np.concatenate([GRID, GRID])[:3]}, "maps of 2 and of 3 images"),
    "axes": ({"maps_0": np.ones((3, 2, 2))}, r"has shape \(3, 2, 2\); it must be \(\[images,\] heads, H, W, H, W\)"),
    "two grids": ({"maps_0": np.ones((1, 2, 2, 2, 3)) / 6}, r"shape \(1, 2, 2, 2, 3\); it must be"),
    "no grid": ({"attentions": TOKENS}, r"holds attentions, but no grid; add grid=\(H, W\)"),
    "another grid": ({"attentions_0": TOKENS, "grid": (2, 3)}, "7 queries and 7 keys; a grid of 2x3 with 0 prefix tok"),
    "a bad grid": ({"attentions": TOKENS, "grid": (7, 0)}, r"grid in .* is \[7, 0\]"),
    "bad prefix tokens": ({"attentions": TOKENS, "grid": (2, 3), "prefix_tokens": 0.5}, "prefix_tokens in .* is 0.5"),
    "a grid too many": ({"maps_0": GRID, "grid": (2, 3)}, "leave out grid and prefix_tokens"),
    "scores": ({"attentions": -TOKENS, "grid": (1, 7)}, "no probabilities .* apply the softmax"),
    "sums": ({"attentions": 2 * TOKENS, "grid": (1, 7)}, "has a query whose probabilities sum to 2; they must sum to"),
    "prefix alone": ({"attentions_0": np.eye(3)[None][..., [0, 0, 0], :], "grid": (1, 2), "prefix_tokens": 1},
                     "attends to prefix tokens alone"),
    "images of another kind": ({"maps_0": GRID, "images": np.zeros((2, 4, 6, 3))}, "images in .* is float64"),
    "other images": ({"maps_0": GRID, "images": np.zeros((3, 4, 6, 3), np.uint8)}, "maps of 2 images .* but 3 images"),
}  # fmt: skip


@pytest.mark.parametrize("arrays, message", PROBLEMS.values(), ids=PROBLEMS)
def test_what_is_wrong_with_a_file_is_said(path, arrays, message):
    np.savez(path, **arrays)
    with pytest.raises(UserError) as error:
        maps.read(path)
    assert re.search(message, str(error.value)), error.value


def test_a_file_that_is_missing_or_no_npz_is_named(path):
    with pytest.raises(UserError, match=r"maps.npz does not exist"):
        maps.read(path)
    path.write_text("maps")
    with pytest.raises(UserError, match=r"maps.npz is no .npz of plain arrays"):
        maps.read(path)
