"""Resizing, cropping and flipping of uint8 arrays, for pictures (H, W, 3) and label maps (H, W)."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from vqgan_jax.conditions.coordinates import coordinate_tokens
from vqgan_jax.conditions.layouts import Box
from vqgan_jax.data.decoding import DEFAULT_OPTIONS
from vqgan_jax.data.resampling import resized_part
from vqgan_jax.errors import DataError

_LARGE_PIXELS = 2**24  # of a scaled image


def resize_shorter_side(
    image: np.ndarray, size: int, max_pixels: int = DEFAULT_OPTIONS.max_pixels
) -> np.ndarray:
    """Scales so that the shorter side has `size` pixels and the shape stays.

    Pictures are resampled with an antialiased bicubic filter, label maps take the nearest pixel.

    Args:
      image: uint8 (H, W, 3), or (H, W) for a label map.
      size: pixels.
      max_pixels: of the result.

    Raises:
      DataError: the result would have more.
    """
    height, width = _scaled_shape(*image.shape[:2], size)
    if height * width > max_pixels:
        raise DataError(
            f"{image.shape[1]} x {image.shape[0]} pixels would become {width} x {height}, and "
            f"config.data.max_pixels allows {max_pixels} in all."
        )
    return _resized(image, (height, width))


def _scaled_shape(height: int, width: int, size: int) -> tuple[int, int]:
    shorter = min(height, width)
    return max(size, round(height * size / shorter)), max(size, round(width * size / shorter))


def _resized(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    if image.shape[:2] == shape:
        return image
    filter_ = Image.Resampling.NEAREST if image.ndim == 2 else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(image).resize(shape[::-1], filter_))


@dataclasses.dataclass(frozen=True)
class Crop:
    """A square of a scaled image: the same one of every picture that shows the same.

    Attributes:
      original: height and width of the image before it was scaled.
      whole: height and width of the scaled image.
      top: its first row.
      left: its first column.
      side: pixels.
      flipped: mirrored left and right.
    """

    original: tuple[int, int]
    whole: tuple[int, int]
    top: int
    left: int
    side: int
    flipped: bool = False

    def cut(self, image: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3), or (H, W) for label maps, to (side, side, ...)."""
        return cut_all(image, [self])[0]

    def each(self, function: Callable[["Crop"], np.ndarray]) -> np.ndarray:
        """What a function gives for the crop; for `Crops`, what it gives for each of several."""
        return function(self)

    @property
    def box(self) -> Box:
        """The part of the whole, in shares of its width and height, before the mirroring."""
        height, width = self.whole
        return self.left / width, self.top / height, self.side / width, self.side / height

    def points(self, points: np.ndarray) -> np.ndarray:
        """Where points of the image before it was scaled lie in the crop before the mirroring.

        Args:
          points: (..., 2), x and y in pixels from the centre of the upper left pixel.

        Returns:
          The same of the crop; what lies outside of it has other numbers than 0 to side - 1.
        """
        scale = np.array(self.whole[::-1]) / np.array(self.original[::-1])
        return (points + 0.5) * scale - 0.5 - (self.left, self.top)

    def coordinates(self, factor: int, intervals: int) -> np.ndarray:
        """`coordinate_tokens` of where the crop lies in the whole, mirrored with it: int32 (n,).

        Args:
          factor: pixels per token along an axis.
          intervals: into how many the coordinates of the whole are divided.
        """
        box = (self.top, self.left, self.side, self.side)
        tokens = coordinate_tokens(*self.whole, factor, intervals, box)
        return (tokens[:, ::-1] if self.flipped else tokens).ravel()


def cut_all(image: np.ndarray, crops: Sequence[Crop]) -> np.ndarray:
    """Several crops of an image, which is scaled once to each size, stacked on a new first axis."""
    scaled = {
        whole: _resized(image, whole)
        for whole in {crop.whole for crop in crops}
        if not _is_extreme(image, whole)
    }
    squares = []
    for crop in crops:
        if crop.whole in scaled:
            square = scaled[crop.whole][crop.top :, crop.left :][: crop.side, : crop.side]
        else:
            square = resized_part(image, crop.whole, crop.top, crop.left, crop.side, crop.side)
        squares.append(square[:, ::-1] if crop.flipped else square)
    return np.stack(squares)


def _is_extreme(image: np.ndarray, whole: tuple[int, int]) -> bool:
    """Whether an image becomes so large that only the crops of it should be computed."""
    return image.shape[:2] != whole and whole[0] * whole[1] > _LARGE_PIXELS


@dataclasses.dataclass(frozen=True)
class Transform:
    """From an image of any size to a square of `resolution`.

    Attributes:
      resolution: pixels of the result.
      resize: shorter side before the crop; -1 crops the pixels as they are.
      random_crop: anywhere with equal chance, instead of the centre.
      random_flip: mirrored in half of the cases.
    """

    resolution: int
    resize: int
    random_crop: bool = False
    random_flip: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Of a label map that was transformed."""
        return self.resolution, self.resolution

    def place(self, height: int, width: int, rng: np.random.Generator | None = None) -> Crop:
        """Which part of an image of a size is taken; `rng` is needed for what is random.

        Raises:
          DataError: when the image is smaller than the crop, which only `resize=-1` allows.
        """
        original = height, width
        if self.resize > 0:
            height, width = _scaled_shape(height, width, self.resize)
        if min(height, width) < self.resolution:
            raise DataError(
                f"{width} x {height} pixels are too few for a crop of {self.resolution}. "
                "Set config.data.resize=0, which scales every image to the resolution."
            )
        # Runs that go on must draw as they began: top, left, flip.
        rows, columns = height - self.resolution, width - self.resolution
        if self.random_crop:
            top, left = int(rng.integers(rows + 1)), int(rng.integers(columns + 1))
        else:
            top, left = rows // 2, columns // 2
        flipped = self.random_flip and bool(rng.random() < 0.5)
        return Crop(original, (height, width), top, left, self.resolution, flipped)

    def __call__(self, image: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """Transforms one image, uint8 (H, W, 3), or (H, W) for a label map; see `place`."""
        return self.place(*image.shape[:2], rng).cut(image)


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
