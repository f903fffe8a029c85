"""Regions hold the share of probability that they say, wherever the head looks and however sharply."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path

from attn_cnn.regions import Rectangle, fewest_pixels, outlines

SAMPLES = 251
GRID = Rectangle.around((3, 4), (8, 9))


def gaussian(center, precision):
    def score(rows, columns):
        d = np.stack(np.broadcast_arrays(rows - center[0], columns - center[1]), -1)
        return -0.5 * np.einsum("...x,xy,...y->...", d, np.asarray(precision, float), d)

    return score


def mass_inside(polygons, score, center, deviations, rectangle=GRID):
    """Integrates exp(score) inside the polygons, and over the rectangle, on a lattice fine enough around the center."""
    sides = []
    for middle, deviation, (low, high) in zip(center, deviations, (rectangle[:2], rectangle[2:]), strict=True):
        middle = np.clip(middle, low, high)
        low, high = max(low, middle - 7 * deviation), min(high, middle + 7 * deviation)
        sides.append(low + (np.arange(SAMPLES) + 0.5) / SAMPLES * (high - low))
    rows, columns = np.meshgrid(*sides, indexing="ij")
    values = score(rows, columns)
    density = np.exp(values - values.max()).ravel()
    points = np.stack([rows.ravel(), columns.ravel()], -1)
    inside = np.any([Path(polygon).contains_points(points) for polygon in polygons], 0)
    return density[inside].sum() / density.sum()


CASES = {
    "wide": ((0.3, -1.2), 0.2),
    "of about a pixel": ((1.0, 0.0), 1.4),
    "one pixel exactly": ((-2.0, 3.0), 16.0),
    "half out of the grid": ((-3.5, 1.0), 1.0),
    "out of the grid": ((-7.0, 2.0), 0.7),
}


@pytest.mark.parametrize("center, spread", CASES.values(), ids=CASES)
def test_contours_hold_their_share_of_the_mass_within_the_grid(center, spread):
    score = gaussian(center, spread**2 * np.eye(2))
    for share, polygons in zip((0.5, 0.9), outlines(score, GRID), strict=True):
        held = mass_inside(polygons, score, center, (1 / spread, 1 / spread))
        assert held == pytest.approx(share, abs=0.01)


@pytest.mark.slow
@settings(deadline=None, max_examples=15)
@given(st.floats(-3, 3), st.floats(-4, 4), st.floats(-1, 1.5), st.floats(0, 2), st.floats(0, np.pi))
def test_contours_of_tilted_heads_hold_their_share(row, column, log_precision, log_condition, angle):
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    precision = turn @ np.diag([10**log_precision, 10 ** (log_precision + log_condition)]) @ turn.T
    score = gaussian((row, column), precision)
    deviations = np.sqrt(np.diag(np.linalg.inv(precision)))
    for share, polygons in zip((0.5, 0.9), outlines(score, GRID), strict=True):
        assert mass_inside(polygons, score, (row, column), deviations) == pytest.approx(share, abs=0.01)


def test_contours_of_a_gaussian_far_from_the_border_are_the_circles_of_its_percentiles():
    (solid,), (dotted,) = outlines(gaussian((0.25, 0.5), 9 * np.eye(2)), GRID)
    for polygon, share in ((solid, 0.5), (dotted, 0.9)):
        radii = np.linalg.norm(polygon - [0.25, 0.5], axis=1)
        np.testing.assert_allclose(radii, np.sqrt(-2 * np.log(1 - share)) / 3, rtol=0.01)
        np.testing.assert_array_equal(polygon[0], polygon[-1])


def test_contours_close_along_the_border_and_do_not_leave_the_grid():
    for polygons in outlines(gaussian((-3.5, -4.5), 0.3 * np.eye(2)), GRID):
        for polygon in polygons:
            np.testing.assert_array_equal(polygon[0], polygon[-1])
            rows, columns = polygon.T
            assert rows.min() == pytest.approx(GRID.top, abs=1e-6) and columns.min() == pytest.approx(
                GRID.left, abs=1e-6
            )


def test_two_far_modes_have_two_outlines():
    def score(rows, columns):
        return np.logaddexp(
            gaussian((-2, -2), 30 * np.eye(2))(rows, columns), gaussian((2, 2), 30 * np.eye(2))(rows, columns)
        )

    assert [len(polygons) for polygons in outlines(score, GRID)] == [2, 2]


@given(st.integers(1, 6), st.integers(1, 6), st.floats(0.05, 0.95), st.integers(0, 2**31))
def test_the_fewest_pixels_reach_the_share_and_none_can_be_spared(height, width, share, seed):
    P = np.random.default_rng(seed).dirichlet(np.full(height * width, 0.5)).reshape(height, width)
    held, mass = fewest_pixels(P, share)
    assert mass == pytest.approx(P[held].sum()) and mass >= share - 1e-9
    assert mass - P[held].min() < share + 1e-9
    assert P[~held].max(initial=0) <= P[held].min()
