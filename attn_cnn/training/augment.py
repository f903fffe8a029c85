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
    border = ((padding, padding), (padding, padding), (0, 0))

    def one(image, position):
        crop_key, flip_key = jax.random.split(jax.random.fold_in(key, position))
        row, column = jax.random.randint(crop_key, (2,), 0, 2 * padding + 1)
        image = jax.lax.dynamic_slice(jnp.pad(image, border), (row, column, 0), image.shape)
        mirrored = flip & jax.random.bernoulli(flip_key)
        return jnp.where(mirrored, image[:, ::-1], image)

    if padding == 0 and not flip:
        return images
    return jax.vmap(one)(images, positions)


def normalize(
    images: UInt8[Array | np.ndarray, "batch height width channels"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "batch height width channels"]:
    """Returns pixels scaled to [0, 1], then (pixel - mean) / std in each channel."""
    return (images.astype(jnp.float32) / 255 - jnp.asarray(mean)) / jnp.asarray(std)
