"""Augmentation on the device: crops of the padded image, mirrored half of the time, then normalised."""

import jax
import jax.numpy as jnp
import numpy as np

from attn_cnn.training import augment as augment_lib
from attn_cnn.training.augment import normalize

augment = jax.jit(augment_lib.augment, static_argnames=("padding", "flip"))
IMAGES = jax.random.randint(jax.random.key(0), (64, 8, 8, 3), 1, 256).astype(jnp.uint8)
PLACES = jnp.arange(64)


def windows(image, padding):
    """Every crop of the padded image, and every mirrored one."""
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    crops = [padded[r : r + 8, c : c + 8] for r in range(2 * padding + 1) for c in range(2 * padding + 1)]
    return {crop.tobytes() for crop in crops}, {crop[:, ::-1].tobytes() for crop in crops}


def test_every_image_is_a_crop_of_its_padded_self_and_half_are_mirrored():
    result = np.asarray(augment(jax.random.key(1), IMAGES, PLACES, padding=2, flip=True))
    mirrored = 0
    for image, augmented in zip(np.asarray(IMAGES), result, strict=True):
        straight, flipped = windows(image, 2)
        assert augmented.tobytes() in straight | flipped
        mirrored += augmented.tobytes() in flipped
    assert 20 < mirrored < 44
    assert len({(image == 0).all(-1).tobytes() for image in result}) > 5  # many different crops


def test_without_flip_none_is_mirrored():
    result = np.asarray(augment(jax.random.key(1), IMAGES, PLACES, padding=1, flip=False))
    for image, augmented in zip(np.asarray(IMAGES), result, strict=True):
        assert augmented.tobytes() in windows(image, 1)[0]


def test_without_padding_and_flip_images_stay():
    np.testing.assert_array_equal(augment(jax.random.key(1), IMAGES, PLACES, padding=0, flip=False), IMAGES)


def test_an_image_depends_on_its_place_in_the_batch_not_on_its_device():
    whole = augment(jax.random.key(1), IMAGES, PLACES, padding=2, flip=True)
    halves = [augment(jax.random.key(1), IMAGES[i::2], PLACES[i::2], padding=2, flip=True) for i in (0, 1)]
    np.testing.assert_array_equal(whole[0::2], halves[0])
    np.testing.assert_array_equal(whole[1::2], halves[1])
    assert not np.array_equal(whole, augment(jax.random.key(2), IMAGES, PLACES, padding=2, flip=True))


def test_normalize_by_channel():
    image = jnp.full((1, 2, 2, 2), 255, jnp.uint8).at[..., 1].set(51)
    np.testing.assert_allclose(normalize(image, (0.5, 0.2), (0.25, 0.1))[0, 0, 0], [2, 0], atol=1e-6)
