"""Figures: every image and line that is given is drawn, and written whole."""

import numpy as np
import pytest
from etils import epath

from attn_cnn import drawing
from attn_cnn.errors import UserError


def test_by_shift_draws_each_image_with_its_title_label_and_outlines():
    images = [[np.eye(3), np.ones((5, 7))], [np.eye(3)]]
    figure = drawing.by_shift(images, [["a", "b"], ["c"]], ["first", "second"], {(0, 1): [(-1, -2, 3, 3)]})
    drawn = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in drawn] == ["a", "b", "c"]
    assert [axes.get_ylabel() for axes in drawn] == ["first", "", "second"]
    (outline,) = drawn[1].patches
    assert outline.get_xy() == (-2.5, -1.5) and (outline.get_width(), outline.get_height()) == (3, 3)
    # Shift (0, 0) is the middle of its pixel.
    assert drawn[1].images[0].get_extent() == [-3.5, 3.5, 2.5, -2.5]


def test_lines_draws_a_line_for_each_series():
    figure = drawing.lines([1, 2, 3], {"a": [1, 2, 3], "b": [3, 2, 1]}, xlabel="spread")
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines] == ["a", "b"] and axes.get_xlabel() == "spread"
    assert len({line.get_color() for line in axes.lines}) == len({line.get_marker() for line in axes.lines}) == 2


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/figure.png cannot be written"):
        drawing.save(drawing.lines([1], {"a": [1]}), epath.Path(tmp_path) / "file" / "figure.png")
