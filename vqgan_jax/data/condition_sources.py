"""What is read beside an image as a condition: other pictures of the same, its place, its objects.

Every condition gets the resizing, the crop and the mirroring of its image, so that what lies at a
pixel of the one belongs to the same pixel of the other.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from vqgan_jax.conditions.derived import DERIVED, FROM_IMAGE, canny_edges, low_resolution
from vqgan_jax.conditions.layouts import Layout, LayoutEncoding, SceneObject, overlap
from vqgan_jax.conditions.skeletons import draw_people, mirror_people
from vqgan_jax.data.sources import Feature
from vqgan_jax.data.transforms import Crop
from vqgan_jax.errors import DataError

_TAKEN = ("image", "label", "codes", "labels", "mask", "index", "skipped")  # keys of batches


class Place(Protocol):
    """Which part, or which parts, of an image are taken: `transforms.Crop`, `augmentations.Crops`.

    The parts of several stand on an axis of their own in front.
    """

    def cut(self, image: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3) or (H, W) to (..., side, side, 3) or (..., side, side)."""

    def each(self, function: Callable[[Crop], np.ndarray]) -> np.ndarray:
        """(..., *) of what a function gives for each part."""


@dataclasses.dataclass(frozen=True)
class ConditionImage:
    """An image of another kind: another feature of the example, or derived from the image.

    Attributes:
      name: its key in batches.
      image_key: the feature that is read; not used where the condition is made from the image.
      num_labels: of a label map; 0 for pictures.
      derive: "edges" or "low_resolution", made from the image as it was cropped; "skeleton", drawn
        of the keypoints of people that the feature has; empty for a feature that is an image.
      scale: how many times smaller the low resolution is.
    """

    name: str
    image_key: str = "image"
    num_labels: int = 0
    derive: str = ""
    scale: int = 4

    @property
    def feature(self) -> str:
        """The feature that has to be read; empty where the condition is made from the image."""
        return "" if self.derive in FROM_IMAGE else self.image_key

    @property
    def kind(self) -> Feature:
        """What the feature is."""
        if self.derive == "skeleton":
            return Feature.KEYPOINTS
        return Feature.LABEL_MAP if self.num_labels else Feature.PICTURE

    def blank(self, shape: tuple[int, ...]) -> np.ndarray:
        """Zeros like those of `make` for label maps of a shape (..., H, W)."""
        return np.zeros(shape if self.num_labels else (*shape, 3), np.uint8)

    def check_example(self, found: Any, shape: tuple[int, ...], where: str) -> None:
        """Raises `DataError` where a feature does not fit an image of a shape (H, W, ...).

        `where` the feature is begins the message.
        """
        if self.derive:
            return
        if found.shape[:2] != shape[:2]:
            raise DataError(
                f"{where} has {found.shape[1]} x {found.shape[0]} pixels, and its image has "
                f"{shape[1]} x {shape[0]}; a condition must have its image's size."
            )
        if self.num_labels and found.max() >= self.num_labels:
            raise DataError(
                f"{where} has the label {found.max()}, but the tokenizer of the condition "
                f"{self.name} knows 0 to {self.num_labels - 1}."
            )

    def make(
        self,
        image: np.ndarray,
        features: Mapping[str, Any],
        place: Place,
        rng: np.random.Generator | None = None,
    ) -> np.ndarray:
        """The condition of an example.

        Args:
          image: uint8 (..., H, W, 3), as it was cropped.
          features: of the whole example by key, as of `ImageSource.read`.
          place: what was taken of the example.
          rng: of the example in training, for what is random.

        Returns:
          uint8 (..., H, W, 3), or (..., H, W) for label maps.
        """
        del rng
        if not self.derive:
            return place.cut(features[self.feature])
        if self.derive == "skeleton":
            return place.each(functools.partial(_draw_skeletons, features[self.feature]))
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
        if self.num_labels or (label_maps and not self.feature):
            what = "tokenizer is one of" if self.num_labels else "images are"
            raise DataError(
                f"The condition {self.name} is derived from pictures, as a picture; here the "
                f"{what} label maps."
            )
        if self.derive == "low_resolution" and not 1 <= self.scale <= resolution:
            raise DataError(
                f"The condition {self.name} is {self.scale} times smaller; it must be 1 to "
                f"{resolution} times, the resolution."
            )


def _draw_skeletons(people: np.ndarray, crop: Crop) -> np.ndarray:
    """Keypoints (P, N, 3) in pixels of the image before it was scaled -> uint8 (side, side, 3)."""
    moved = np.concatenate([crop.points(people[..., :2]), people[..., 2:]], axis=-1)
    if crop.flipped:
        moved = mirror_people(moved, crop.side)
    return draw_people(moved, crop.side, crop.side)


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

    def make(
        self,
        image: np.ndarray,
        features: Mapping[str, Any],
        place: Place,
        rng: np.random.Generator | None = None,
    ) -> np.ndarray:
        """int32 (..., n), 0 to `intervals` inclusive; see `ConditionImage.make`."""
        del image, features, rng
        return place.each(lambda crop: crop.coordinates(self.factor, self.intervals))

    def check(self, resolution: int, label_maps: bool) -> None:
        """Raises `DataError` where it cannot be made for images of a resolution."""
        del label_maps
        if self.intervals < 1 or self.factor < 1 or resolution % self.factor:
            raise DataError(
                f"Coordinates in {self.intervals} intervals, one a {self.factor} pixels, are not "
                f"for images of {resolution} pixels: the intervals must be at least 1, and the "
                "pixels divide the resolution."
            )


@dataclasses.dataclass(frozen=True)
class Layouts:
    """Tokens of the objects in the crop, in boxes as they lie in the image, mirrored with it.

    No example is left out: one with few objects in its crop, or none, has a layout of few objects,
    filled up with padding; of one with more than the encoding takes, the largest are kept. (The
    reference drops images with fewer than 2 or more than 30 objects from its data sets.)

    Attributes:
      encoding: from layouts to tokens.
      min_area: objects whose box is not larger than this share of the whole image are left out.
      class_names: of objects, in the order of their numbers; empty where they have numbers only.
    """

    encoding: LayoutEncoding
    min_area: float = 0.0
    class_names: tuple[str, ...] = ()

    name = "layout"
    feature = "layout"
    kind = Feature.OBJECTS

    def blank(self, shape: tuple[int, ...]) -> np.ndarray:
        """Zeros like those of `make` for label maps of a shape (..., H, W)."""
        return np.zeros((*shape[:-2], self.encoding.length), np.int32)

    def check_example(
        self, found: tuple[SceneObject, ...], shape: tuple[int, ...], where: str
    ) -> None:
        """Raises `DataError` where an object has a label that is no class of the encoding."""
        del shape
        last = self.encoding.num_classes - 1
        for index, item in enumerate(found):
            if item.label > last:
                raise DataError(
                    f"{where}: objects[{index}] has the label {item.label}, but "
                    f"config.condition.layout.num_classes={last + 1} allows 0 to {last}."
                )

    def make(
        self,
        image: np.ndarray,
        features: Mapping[str, Any],
        place: Place,
        rng: np.random.Generator | None = None,
    ) -> np.ndarray:
        """int32 (..., n), of `LayoutEncoding.encode`; see `ConditionImage.make`.

        In training, with `rng`, the objects are in a random order, else in that of the data.
        """
        del image
        large = [item for item in features[self.feature] if _area(item) > self.min_area]

        def tokens(crop: Crop) -> np.ndarray:
            box, kept = crop.box, [item for item in large if overlap(item.box, crop.box) > 0]
            if len(kept) > self.encoding.max_objects:
                by_size = sorted(range(len(kept)), key=lambda i: -_area(kept[i]))
                kept = [kept[i] for i in sorted(by_size[: self.encoding.max_objects])]
            return self.encoding.encode(Layout(tuple(kept), box), rng, crop.flipped)

        return place.each(tokens)

    def check(self, resolution: int, label_maps: bool) -> None:
        """Raises `DataError` where the smallest area is no share of an image."""
        del resolution, label_maps
        if not 0 <= self.min_area < 1:
            raise DataError(
                f"The smallest area of an object is {self.min_area}; it is a share of the image, "
                "at least 0 and below 1."
            )


def _area(item: SceneObject) -> float:
    return item.box[2] * item.box[3]


ConditionSource = ConditionImage | Coordinates | Layouts


def check_conditions(
    conditions: Iterable[ConditionSource], resolution: int, label_maps: bool
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


def features_of(conditions: Iterable[ConditionSource]) -> dict[str, Feature]:
    """The features that conditions are read from, and what each is.

    Raises:
      DataError: two conditions read one feature in two ways.
    """
    features: dict[str, Feature] = {}
    for condition in conditions:
        if not condition.feature:
            continue
        kind = features.setdefault(condition.feature, condition.kind)
        if kind != condition.kind:
            raise DataError(
                f"The feature {condition.feature!r} cannot be a {kind.value} for one condition and "
                f"a {condition.kind.value} for another."
            )
    return features
