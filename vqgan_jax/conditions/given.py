"""Conditions as a user gives them, checked against what the model was trained with."""

import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from vqgan_jax.conditions.coordinates import coordinate_tokens
from vqgan_jax.conditions.layouts import Layout, LayoutEncoding
from vqgan_jax.conditions.scene_layouts import layout_encoding
from vqgan_jax.conditions.skeletons import draw_people

Condition = int | str | Sequence | np.ndarray | Layout | Mapping[str, Any] | None


class GivenConditions:
    """From what a user gives to the rows of a batch that `kinds.Conditions` reads.

    Attributes:
        asked: the kinds that a user gives; coordinates follow from the image's size.
    """

    def __init__(self, config: ConfigDict, factor: int, tokenizers: Mapping[str, Any]):
        """Those of a transformer's resolved config.

        Args:
            config: the transformer's.
            factor: pixels a code of its images.
            tokenizers: of the condition images, by name.
        """
        self._condition, self._factor, self._tokenizers = config.condition, factor, tokenizers
        self._window = tuple(config.model.grid)
        self._known_codes: dict[tuple, np.ndarray] = {}
        self.asked = tuple(kind for kind in config.condition.kinds if kind != "coordinates")

    def batch(
        self, condition: Condition, num_samples: int, grid: tuple[int, int]
    ) -> dict[str, np.ndarray]:
        """The rows of `num_samples` images of `grid` codes.

        Args:
            condition: of one kind, its value; of several, a mapping from kinds to values; None for
                no condition. A class is a number or name, or one for each sample. An image is
                uint8 `(H, W, 3)`, a label map integers `(H, W)`, or one for each sample in front;
                of low resolution, it is that image or what it was scaled up to; of a skeleton, it
                may be keypoints of people, float `(P, N, 3)` of `skeletons.draw_people`. A layout
                is a `Layout` or one for each sample.
            num_samples: how many.
            grid: rows and columns of codes.

        Raises:
            ValueError: it is none of that, or not of the image's size.
        """
        given, shape = self._by_kind(condition), (num_samples, *grid)
        rows = {}
        if "class" in self.asked:
            rows["label"] = self.labels(given["class"], num_samples)
        for kind in self.asked:
            if kind == "layout":
                rows[kind] = self._layouts(given[kind], num_samples, grid)
            elif kind != "class":
                rows[kind] = self._image_codes(kind, given[kind], num_samples, grid)
        if "coordinates" in self._condition.kinds:
            rows["coordinates"] = np.broadcast_to(self._coordinates(given, grid), shape)
        return rows

    def _by_kind(self, condition: Condition) -> dict[str, Any]:
        if condition is None:
            condition = {}
        elif not isinstance(condition, Mapping):
            _check(bool(self.asked), "this model has no classes; condition must be None.")
            _check(
                len(self.asked) == 1,
                f"this model has several conditions; condition must be a mapping of some of "
                f"{', '.join(self.asked)}.",
            )
            condition = {self.asked[0]: condition}
        unknown = [kind for kind in condition if kind not in self.asked]
        _check(
            not unknown,
            f"this model has no condition {', '.join(unknown)}; it has "
            f"{', '.join(self.asked) or 'none'}.",
        )
        missing = [kind for kind in self.asked if condition.get(kind) is None]
        if missing and (self._condition.dropout == 0.0 or len(missing) < len(self.asked)):
            if missing == ["class"] == list(self.asked):
                count = self._condition.num_classes
                raise ValueError(
                    "this model draws images of a class: condition must be one of its "
                    f"{count} classes."
                )
            flag = "class=NAME" if missing[0] == "class" else f"condition={missing[0]}=PATH"
            raise ValueError(
                f"this model needs the condition {', '.join(missing)}, which is not given "
                f"(vqgan_jax.sample --{flag})."
            )
        return {kind: condition.get(kind) for kind in self.asked}

    def labels(self, given: int | str | Sequence | None, num_samples: int) -> np.ndarray:
        """Classes by number or name, `(num_samples,)` int32, -1 for none.

        Raises:
            ValueError: there is no such class, or not one for each sample.
        """
        if given is None:
            return np.full(num_samples, -1, np.int32)
        one_for_all = isinstance(given, str) or np.ndim(given) == 0
        wanted = [given] * num_samples if one_for_all else list(given)
        _check(
            len(wanted) == num_samples,
            f"condition has {len(wanted)} classes for {num_samples} samples.",
        )
        return np.array([self._class_number(name) for name in wanted], np.int32)

    def _class_number(self, name: int | str) -> int:
        count, class_names = self._condition.num_classes, self._condition.class_names
        if isinstance(name, str):
            if name in class_names:
                return class_names.index(name)
            place = name.removeprefix("#")
            names = ", ".join(class_names) or f"0 to {count - 1}"
            _check(_is_number(place), f"there is no class {name!r}; there are {names}.")
            _check(
                name.startswith("#") or not any(map(_is_number, class_names)),
                f"there is no class {name!r}; there are {names}. '#{place}' is the class at place "
                f"{place}, from 0 on.",
            )
            name = int(place)
        _check(0 <= name < count, f"there is no class {name}; there are 0 to {count - 1}.")
        return int(name)

    def _coordinates(self, given: Mapping[str, Any], grid: tuple[int, int]) -> np.ndarray:
        """`grid`; where no condition at all is given, none of them either, as in training."""
        if self.asked and all(value is None for value in given.values()):
            return np.full(grid, -1, np.int32)
        height, width = (size * self._factor for size in grid)
        intervals = self._condition.coordinates.intervals
        return coordinate_tokens(height, width, self._factor, intervals)

    def _layouts(
        self, given: Layout | Sequence[Layout] | None, num_samples: int, grid: tuple[int, int]
    ) -> np.ndarray:
        """`(num_samples, n)`, or of a larger image `(num_samples, tops, lefts, n)`."""
        encoding = layout_encoding(self._condition.layout)
        if given is None:
            return np.full((num_samples, encoding.length), -1, np.int32)
        layouts = [given] if isinstance(given, Layout) else list(given)
        _check(
            len(layouts) in (1, num_samples),
            f"condition has {len(layouts)} layouts for {num_samples} samples.",
        )
        rows = np.stack([_layout_tokens(encoding, one, grid, self._window) for one in layouts])
        return np.broadcast_to(rows, (num_samples, *rows.shape[1:]))

    def _image_codes(self, kind, given, num_samples, grid) -> np.ndarray:
        tokenizer = self._tokenizers[kind]
        height, width = (size * self._factor for size in grid)
        own_grid = height // tokenizer.factor, width // tokenizer.factor
        if given is None:
            return np.full((num_samples, *own_grid), -1, np.int32)
        if isinstance(given, Sequence):
            # Each by itself: people may be of other numbers, and small images of other sizes.
            images = np.concatenate(
                [self.check_image(kind, np.asarray(g), (height, width)) for g in given]
            )
        else:
            images = self.check_image(kind, np.asarray(given), (height, width))
        _check(
            len(images) in (1, num_samples),
            f"condition {kind} has {len(images)} images for {num_samples} samples.",
        )
        codes = np.concatenate([self._codes_of(kind, image) for image in images])
        return np.broadcast_to(codes, (num_samples, *codes.shape[1:]))

    def _codes_of(self, kind: str, image: np.ndarray) -> np.ndarray:
        """`(1, h, w)`: one picture at a time, each once, for batches that have it again."""
        key = kind, image.shape, hashlib.sha256(np.ascontiguousarray(image)).digest()
        if key not in self._known_codes:
            self._known_codes[key] = np.asarray(self._tokenizers[kind].encode_raw(image[None]))
        return self._known_codes[key]

    def check_image(self, kind: str, images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Condition images with a batch axis in front, of the size of the image to draw.

        Args:
            kind: the condition.
            images: `(H, W, 3)` uint8, `(H, W)` integers for a label map, or several of them; for a
                skeleton also keypoints, float `(P, N, 3)` or `(N, 3)`, which are drawn.
            size: height and width of the image to draw.

        Raises:
            ValueError: it is of another type, size or range.
        """
        image, num_labels = self._condition.images[kind], self._condition.images[kind].num_labels
        if image.derive == "skeleton" and np.issubdtype(images.dtype, np.floating):
            images = draw_people(images.reshape(-1, *images.shape[-2:]), *size)
        axes = 2 if num_labels else 3
        shape = images.shape
        is_picture = images.ndim >= 3 and images.shape[-1] == 3 and images.shape[-2] > 3
        images = images if images.ndim > axes else images[None]
        if num_labels:
            _check(
                images.ndim == 3 and np.issubdtype(images.dtype, np.integer) and not is_picture,
                f"the condition {kind} is a label map, integers (H, W); what is given has shape "
                f"{shape} and type {images.dtype}.",
            )
            lowest, highest = images.min(), images.max()
            _check(
                lowest >= 0 and highest < num_labels,
                f"the condition {kind} has the label {lowest if lowest < 0 else highest}; this "
                f"model knows 0 to {num_labels - 1}.",
            )
        else:
            _check(
                images.ndim == 4 and images.shape[-1] == 3 and images.dtype == np.uint8,
                f"the condition {kind} is a picture, uint8 (H, W, 3); what is given has shape "
                f"{shape} and type {images.dtype}.",
            )
        small = size[0] // image.scale, size[1] // image.scale
        if image.derive == "low_resolution" and images.shape[1:3] == small:
            bicubic = Image.Resampling.BICUBIC
            images = np.stack(
                [np.asarray(Image.fromarray(i).resize(size[::-1], bicubic)) for i in images]
            )
        _check(
            images.shape[1:3] == size,
            f"the condition {kind} has {images.shape[2]} x {images.shape[1]} pixels (width x "
            f"height), and the image to draw {size[1]} x {size[0]}: height and width say its size.",
        )
        return images


@functools.lru_cache(maxsize=256)  # batches have the same ones again
def _layout_tokens(
    encoding: LayoutEncoding, layout: Layout, grid: tuple[int, int], window: tuple[int, int]
) -> np.ndarray:
    encoding.check(layout)
    if grid == window:
        return encoding.encode(layout)
    return encoding.encode_windows(layout, grid, window)


def _is_number(name: str) -> bool:
    return re.fullmatch("[0-9]{1,9}", name) is not None


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
