"""What is read beside an image as a condition: other pictures of the same place, and the place.

Every condition gets the resizing, the crop and the mirroring of its image, so that what lies at a
pixel of the one belongs to the same pixel of the other.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np

from vqgan_jax.conditions.derived import canny_edges, low_resolution
from vqgan_jax.data.errors import DataError

DERIVED = ("edges", "low_resolution")
_TAKEN = ("image", "label", "codes", "labels", "mask", "index", "skipped")  # keys of batches


class Place(Protocol):
    """Which part, or which parts, of an image are taken: `transforms.Crop`, `augmentations.Crops`.

    The parts of several stand on an axis of their own in front.
    """

    def cut(self, image: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3) or (H, W) to (..., side, side, 3) or (..., side, side)."""

    def coordinates(self, factor: int, intervals: int) -> np.ndarray:
        """int32 (..., n), of `coordinate_tokens`."""


@dataclasses.dataclass(frozen=True)
class ConditionImage:
    """An image of another kind: another feature of the example, or derived from the image.

    Attributes:
      name: its key in batches.
      image_key: the feature that is read; not used where the condition is derived.
      num_labels: of a label map; 0 for pictures.
      derive: "edges" or "low_resolution", made from the image as it was cropped; empty for a
        feature.
      scale: how many times smaller the low resolution is.
    """

    name: str
    image_key: str = "image"
    num_labels: int = 0
    derive: str = ""
    scale: int = 4

    @property
    def feature(self) -> str:
        """The feature that has to be read; empty where the condition is derived."""
        return "" if self.derive else self.image_key

    def blank(self, shape: tuple[int, ...]) -> np.ndarray:
        """Zeros like those of `make` for label maps of a shape (..., H, W)."""
        return np.zeros(shape if self.num_labels else (*shape, 3), np.uint8)

    def make(self, image: np.ndarray, features: Mapping[str, np.ndarray], place: Place):
        """The condition of an example.

        Args:
          image: uint8 (..., H, W, 3), as it was cropped.
          features: uint8 (H, W, 3) or (H, W) of the whole example, by key.
          place: what was taken of the example.

        Returns:
          uint8 (..., H, W, 3), or (..., H, W) for label maps.
        """
        if not self.derive:
            return place.cut(features[self.feature])
        derive = canny_edges
        if self.derive == "low_resolution":
            derive = functools.partial(low_resolution, factor=self.scale)
        pictures = image.reshape(-1, *image.shape[-3:])
        return np.stack([derive(picture) for picture in pictures]).reshape(image.shape)

    def check(self, resolution: int, label_maps: bool) -> None:
        """Raises `DataError` where it cannot be made of images, or label maps, of a resolution."""
        if not self.derive:
            return
        if self.derive not in DERIVED:
            raise DataError(
                f"The condition {self.name} is derived as {self.derive!r}; there are "
                f"{', '.join(DERIVED)}."
            )
        if label_maps or self.num_labels:
            what = "images are" if label_maps else "tokenizer is one of"
            raise DataError(
                f"The condition {self.name} is derived from pictures, as a picture; here the "
                f"{what} label maps."
            )
        if self.derive == "low_resolution" and not 1 <= self.scale <= resolution:
            raise DataError(
                f"The condition {self.name} is {self.scale} times smaller; it must be 1 to "
                f"{resolution} times, the resolution."
            )


@dataclasses.dataclass(frozen=True)
class Coordinates:
    """Tokens of where the crop lies in the whole resized image, mirrored with it.

    Attributes:
      factor: pixels per token along an axis.
      intervals: into how many the coordinates of the whole are divided.
    """

    factor: int
    intervals: int

    name = "coordinates"
    feature = ""

    def blank(self, shape: tuple[int, ...]) -> np.ndarray:
        """Zeros like those of `make` for label maps of a shape (..., H, W)."""
        *views, height, width = shape
        return np.zeros((*views, height // self.factor * (width // self.factor)), np.int32)

    def make(self, image: np.ndarray, features: Mapping[str, np.ndarray], place: Place):
        """int32 (..., n), 0 to `intervals` inclusive; see `ConditionImage.make`."""
        del image, features
        return place.coordinates(self.factor, self.intervals)

    def check(self, resolution: int, label_maps: bool) -> None:
        """Raises `DataError` where it cannot be made for images of a resolution."""
        del label_maps
        if self.intervals < 1 or self.factor < 1 or resolution % self.factor:
            raise DataError(
                f"Coordinates in {self.intervals} intervals, one a {self.factor} pixels, are not "
                f"for images of {resolution} pixels: the intervals must be at least 1, and the "
                "pixels divide the resolution."
            )


def check_conditions(
    conditions: Iterable[ConditionImage | Coordinates], resolution: int, label_maps: bool
) -> None:
    """Raises `DataError` where conditions cannot be read beside images.

    Args:
      conditions: what is to be read.
      resolution: of the crops.
      label_maps: whether the images are label maps.
    """
    names = [condition.name for condition in conditions]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"The condition {name} is there twice.")
        # Names are keys of batches, and parts of file names.
        if name in _TAKEN or not re.fullmatch(r"[A-Za-z0-9_]+", name):
            raise DataError(
                f"A condition cannot be called {name!r}: a name has letters, digits and _, and is "
                f"none of {', '.join(_TAKEN)}."
            )
    for condition in conditions:
        condition.check(resolution, label_maps)


def features_of(conditions: Iterable[ConditionImage | Coordinates]) -> dict[str, bool]:
    """The features that conditions are read from, and which of them are label maps.

    Raises:
      DataError: two conditions read one feature in both ways.
    """
    features: dict[str, bool] = {}
    for condition in conditions:
        if not condition.feature:
            continue
        label_map = condition.num_labels > 0
        if features.setdefault(condition.feature, label_map) != label_map:
            raise DataError(
                f"The feature {condition.feature!r} cannot be a label map for one condition and a "
                "picture for another."
            )
    return features
