"""What happens to images on the device, inside the step: random crop, horizontal flip, normalisation."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8


def augment(
    key: Key[Array, ""],
    images: UInt8[Array, "batch height width channels"],
    positions: Int[Array, "batch"],
    padding: int,
    flip: bool,
) -> UInt8[Array, "batch height width channels"]:
    """Pads with black, crops at random to the same size, and mirrors half of the images.

    Each image draws from (key, its position in the global batch), so the result does not depend on how the
    batch is spread over devices.
    """
    if padding == 0 and not flip:
        return images

    def draw(position):
        crop_key, flip_key = jax.random.split(jax.random.fold_in(key, position))
        return jax.random.randint(crop_key, (2,), 0, 2 * padding + 1), flip & jax.random.bernoulli(flip_key)

    starts, mirrored = jax.vmap(draw)(positions)
    images = shifted(shifted(images, starts[:, 0], padding, 1), starts[:, 1], padding, 2)
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def shifted(
    images: UInt8[Array, "batch height width channels"], starts: Int[Array, "batch"], padding: int, axis: int
) -> UInt8[Array, "batch height width channels"]:
    """Pads `axis` with black and returns as much of it as there was, for each image from one of its `starts`.

    It chooses between slices, of which there are few: slices at places that differ from image to image are a loop over
    images on a TPU.
    """
    size = images.shape[axis]
    padded = jnp.pad(images, [(padding, padding) if a == axis else (0, 0) for a in range(4)])
    for start in range(2 * padding + 1):
        chosen = jnp.expand_dims(starts == start, (1, 2, 3))
        images = jnp.where(chosen, jax.lax.slice_in_dim(padded, start, start + size, axis=axis), images)
    return images


def normalize(
    images: UInt8[Array | np.ndarray, "batch height width channels"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "batch height width channels"]:
    """Returns pixels scaled to [0, 1], then (pixel - mean) / std in each channel."""
    scaled = jnp.asarray(images.astype(jnp.float32) / 255)
    return (scaled - jnp.asarray(mean)) / jnp.asarray(std)
