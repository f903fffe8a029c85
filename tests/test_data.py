"""The data of a run: what is known of it, the part that is trained on, the order of its examples."""

import numpy as np
import pytest
from golden import same

from attn_cnn.errors import UserError
from attn_cnn.training import data
from configs import quadratic


def test_digits_are_split_in_fixed_strata():
    digits = data.load("digits")
    assert digits.train_images.shape == (1437, 8, 8, 1) and digits.test_images.shape == (360, 8, 8, 1)
    assert digits.train_images.dtype == np.uint8 and digits.train_images.max() == 255
    shares = [np.bincount(labels) / len(labels) for labels in (digits.train_labels, digits.test_labels)]
    np.testing.assert_allclose(*shares, atol=2e-3)
    again = data.load("digits")
    assert same(digits, again)


def test_what_is_written_of_the_digits_is_true():
    digits, spec = data.load("digits"), data.SPECS["digits"]
    assert spec.train_size == len(digits.train_labels)
    assert spec.image_shape == digits.train_images.shape[1:]
    assert spec.mean == pytest.approx([digits.train_images.mean() / 255], abs=1e-4)
    assert spec.std == pytest.approx([digits.train_images.std() / 255], abs=1e-4)


def test_an_epoch_visits_every_example_once_in_an_order_of_its_own():
    orders = [data.epoch_order(seed, epoch, 1000) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    assert len({order.tobytes() for order in orders}) == 3
    np.testing.assert_array_equal(orders[0], data.epoch_order(0, 0, 1000))


def test_an_order_is_not_written_to():
    with pytest.raises(ValueError, match="read-only"):
        data.epoch_order(0, 0, 10)[0] = 1


LABELS = np.repeat(np.arange(3), (50, 20, 10))


def small(labels=LABELS):
    """A data set whose images tell their place."""
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
    spec = data.Spec((1, 1, 1), (0.5,), (0.5,), len(labels), ("a", "b", "c"))
    return data.Dataset(images, labels, images[:0], labels[:0], spec)


def test_the_test_set_is_there_also_where_a_part_is_held_out():
    config = quadratic.get_config("digits").data
    config.validation_fraction = 0.2
    assert len(data.load_part(config).test_images) == 287  # a fifth of 1,437
    assert same(data.load_with_test_set(config)[2:4], data.load("digits")[2:4])


def test_a_fraction_of_the_training_set_has_the_same_share_of_each_class():
    part = data.part(small(), train_fraction=0.1, validation_fraction=0)
    assert np.bincount(part.train_labels).tolist() == [5, 2, 1]
    assert part.spec.train_size == 8
    np.testing.assert_array_equal(LABELS[part.train_images.ravel()], part.train_labels)


def test_a_larger_fraction_holds_the_smaller():
    parts = [data.part(small(), fraction, 0.2).train_images.ravel().tolist() for fraction in (0.2, 0.5, 1.0)]
    assert set(parts[0]) < set(parts[1]) < set(parts[2])


def test_what_is_held_out_is_not_trained_on_and_does_not_depend_on_the_fraction_that_is():
    parts = [data.part(small(), fraction, 0.2) for fraction in (0.5, 1.0)]
    held = [part.test_images.ravel().tolist() for part in parts]
    assert held[0] == held[1] and np.bincount(parts[0].test_labels).tolist() == [10, 4, 2]
    assert sorted(held[1] + parts[1].train_images.ravel().tolist()) == list(range(80))


def test_without_fractions_the_data_set_is_whole():
    assert same(small(), data.part(small(), 1.0, 0.0))


@pytest.mark.parametrize(
    "fractions, message",
    [
        ((0.0, 0.0), "train_fraction is 0.0, which leaves 3 of 3 classes no image"),
        ((0.04, 0.0), "train_fraction is 0.04, which leaves 1 of 3 classes no image"),
        ((1.0, 0.01), "validation_fraction is 0.01, which leaves 3 of 3"),
        ((1.0, 0.99), "validation_fraction is 0.99, which leaves 3 of 3"),
    ],
)
def test_a_fraction_that_leaves_a_class_without_images_is_refused(fractions, message):
    with pytest.raises(UserError, match=message):
        data.part(small(), *fractions)


def test_each_data_set_has_a_name_for_each_class():
    for spec in data.SPECS.values():
        assert len(spec.names) == len(set(spec.names)) > 1
