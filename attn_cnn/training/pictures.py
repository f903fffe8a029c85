"""Pictures, in files of any kind that Pillow reads, to arrays."""

import numpy as np
import PIL.Image
import PIL.ImageOps
from etils import epath
from jaxtyping import UInt8

from attn_cnn.errors import UserError, first_line


def decode(path: epath.Path, size: tuple[int, int] | None = None) -> PIL.Image.Image:
    """Returns a picture, upright, in grey (mode L) or in colour (mode RGB), resized to `size`, (height, width).

    What is transparent is black.

    Raises:
      UserError: the file is missing, no picture, or has more than 8 bits a channel.
    """
    try:
        with path.open("rb") as file, PIL.Image.open(file) as opened:
            if opened.mode[0] in "IF":
                raise ValueError("it has more than 8 bits a channel")
            picture = PIL.ImageOps.exif_transpose(opened)  # phones store the camera's turn beside the pixels
            kind = "L" if picture.mode in ("1", "L", "LA", "La") else "RGB"
            if picture.has_transparency_data:
                black = PIL.Image.new("RGBA", picture.size, "black")
                picture = PIL.Image.alpha_composite(black, picture.convert("RGBA"))
            picture = picture.convert(kind)
            return picture.resize(size[::-1], PIL.Image.Resampling.BICUBIC) if size else picture
    except Exception as error:  # of the disk, or Pillow's, which has types for each kind of picture
        raise UserError(f"{path} is no picture that can be read: {first_line(error)}") from None


def read(path: epath.Path, shape: tuple[int, int, int]) -> UInt8[np.ndarray, "height width channels"]:
    """Returns a picture, resized to `shape`: in colour, or grey where there is one channel.

    Raises:
      UserError: the file is missing, no picture, or has more than 8 bits a channel.
    """
    height, width, channels = shape
    picture = decode(path, (height, width)).convert("L" if channels == 1 else "RGB")
    return np.asarray(picture).reshape(shape)
