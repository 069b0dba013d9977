"""Resizing, cropping and flipping of uint8 arrays, for pictures (H, W, 3) and label maps (H, W)."""

import dataclasses

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from vqgan_jax.data.errors import DataError


def resize_shorter_side(image: np.ndarray, size: int) -> np.ndarray:
    """Scales so that the shorter side has `size` pixels and the shape stays.

    Pictures are resampled with an antialiased bicubic filter, label maps take the nearest pixel.

    Args:
      image: uint8 (H, W, 3), or (H, W) for a label map.
      size: pixels.
    """
    height, width = image.shape[:2]
    shorter = min(height, width)
    if shorter == size:
        return image
    scaled = (max(size, round(width * size / shorter)), max(size, round(height * size / shorter)))
    filter_ = Image.Resampling.NEAREST if image.ndim == 2 else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(image).resize(scaled, filter_))


def crop(image: np.ndarray, size: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """A square of `size` pixels: anywhere with equal chance given `rng`, else the centre."""
    height, width = image.shape[:2]
    if rng is None:
        top, left = (height - size) // 2, (width - size) // 2
    else:
        top, left = rng.integers(height - size + 1), rng.integers(width - size + 1)
    return image[top : top + size, left : left + size]


def flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrors left and right in half of the cases."""
    return image[:, ::-1] if rng.random() < 0.5 else image


@dataclasses.dataclass(frozen=True)
class Transform:
    """From an image of any size to a square of `resolution`.

    Attributes:
      resolution: pixels of the result.
      resize: shorter side before the crop; -1 crops the pixels as they are.
      random_crop: anywhere instead of the centre.
      random_flip: mirrored in half of the cases.
    """

    resolution: int
    resize: int
    random_crop: bool = False
    random_flip: bool = False

    def __call__(self, image: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """Transforms one image; `rng` is needed for what is random.

        Raises:
          DataError: when the image is smaller than the crop, which only `resize=-1` allows.
        """
        if self.resize > 0:
            image = resize_shorter_side(image, self.resize)
        height, width = image.shape[:2]
        if min(height, width) < self.resolution:
            raise DataError(
                f"{width} x {height} pixels are too few for a crop of {self.resolution}. "
                "Set config.data.resize=0, which scales every image to the resolution."
            )
        image = crop(image, self.resolution, rng if self.random_crop else None)
        if self.random_flip:
            image = flip(image, rng)
        return np.ascontiguousarray(image)


def training_transform(config: ConfigDict, resolution: int) -> Transform:
    """What the keys of `config.data` ask for in training."""
    return Transform(
        resolution,
        _resize(config, resolution),
        random_crop=config.data.random_crop,
        random_flip=config.data.random_flip,
    )


def evaluation_transform(config: ConfigDict, resolution: int) -> Transform:
    """The same resizing, then the centre."""
    return Transform(resolution, _resize(config, resolution))


def _resize(config: ConfigDict, resolution: int) -> int:
    if config.data.name.partition("/")[0] == "earth":
        return -1  # its tiles are stored at 1.5 times the resolution, to be cropped
    resize = config.data.resize or resolution
    if resize != -1 and resize < resolution:
        raise DataError(
            f"config.data.resize is {resize}, smaller than the resolution {resolution}; it must "
            "be 0 (the resolution), -1 (no resizing), or at least the resolution."
        )
    return resize
