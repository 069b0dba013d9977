"""Image files to uint8 arrays, whatever their mode."""

import io
import os

import numpy as np
from PIL import Image, ImageOps

from vqgan_jax.conditions.derived import depth_picture
from vqgan_jax.data.errors import DataError, UnreadableImage

# What Pillow raises for damaged files: its plugins differ.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def decode_image(source: bytes | str | os.PathLike) -> np.ndarray:
    """Decodes an encoded image or an image file to colour.

    The EXIF orientation is applied, transparency is composed on white, and every other mode is
    converted to RGB. Grey of more than 8 bits is taken for depth or another quantity of any unit,
    and fills the range: its smallest value in the image becomes 0 and its largest 255, as the
    reference scales depth.

    Returns:
      uint8 (H, W, 3).

    Raises:
      UnreadableImage: when it cannot be decoded; the message has a file's path.
    """
    image = _open(source)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        try:
            return depth_picture(np.asarray(image))
        except ValueError as error:
            raise UnreadableImage(f"{_name(source)} cannot be used: {error}") from error
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return np.asarray(image.convert("RGB"))


def decode_label_map(source: bytes | str | os.PathLike) -> np.ndarray:
    """Decodes a map of labels: a grey or palette image whose pixel values are the labels.

    Returns:
      uint8 (H, W).

    Raises:
      UnreadableImage: when it cannot be decoded.
      DataError: when it is a colour picture, or has more bits than uint8.
    """
    image = _open(source)
    if image.mode not in ("1", "L", "P"):
        raise DataError(
            f"{_name(source)} is no label map: its mode is {image.mode}, and a label map is grey "
            "or palette with 8 bits. Pictures are for tokenizers with config.data.num_labels=0."
        )
    return np.asarray(image).astype(np.uint8)


def _open(source: bytes | str | os.PathLike) -> Image.Image:
    """The decoded image, upright."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return ImageOps.exif_transpose(image)
    except _DAMAGE as error:
        reason = "it is not an image" if isinstance(error, Image.UnidentifiedImageError) else error
        raise UnreadableImage(f"{_name(source)} cannot be decoded: {reason}.") from error


def _name(source: bytes | str | os.PathLike) -> str:
    return "The image" if isinstance(source, bytes) else os.fspath(source)
