"""What is known of a data set: measured right, and kept."""

import numpy as np
import pytest

from attn_cnn.training.dataset import Spec, moments


def test_mean_and_deviation_are_those_of_each_channel():
    images = np.random.default_rng(0).integers(0, 256, (7, 5, 4, 3), np.uint8)
    mean, std = moments(images)
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(std, (images / 255).std((0, 1, 2)), atol=1e-6)


def test_a_constant_channel_has_deviation_one_since_images_are_divided_by_it():
    assert moments(np.full((2, 3, 3, 1), 51, np.uint8)) == ((0.2,), (1.0,))


def test_a_spec_is_the_same_after_it_was_written():
    spec = Spec((8, 6, 1), (0.1,), (0.3,), 12, ("chat", "à côté"))
    assert Spec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"image_shape": 3}'])
def test_what_is_no_spec_is_told_by_an_error(text):
    with pytest.raises((ValueError, KeyError, TypeError)):
        Spec.from_json(text)
