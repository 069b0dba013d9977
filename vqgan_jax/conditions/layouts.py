"""Layouts of scenes as condition tokens: which objects are in an image, and where.

The encoding of the reference's scene models for COCO and Open Images: an object is a token of its
class followed by one token for its centre or two for the corners of its box, and two last tokens
say which part of the scene the image shows.
"""

import dataclasses
import math

import numpy as np

Box = tuple[float, float, float, float]  # x, y of the upper left corner, width, height

WHOLE_SCENE: Box = (0.0, 0.0, 1.0, 1.0)
_ROUNDING = 1e-6  # x + width may exceed 1 by so much: 0.1 + 0.9 need not be 1 in floats
ATTRIBUTES = ("group", "occluded", "depiction", "inside")  # in the order of their bits


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """One object of a layout.

    Attributes:
        label: number of its class, from 0.
        box: where it is, in shares of the scene's width and height.
        attributes: which of `ATTRIBUTES` hold of it.
    """

    label: int
    box: Box
    attributes: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Layout:
    """The objects of a scene, and the part of it that is the image.

    Attributes:
        objects: in any order.
        crop: of the scene, in shares of its width and height, as boxes are. A sliding window over
            a large image is a crop that moves.
    """

    objects: tuple[SceneObject, ...]
    crop: Box = WHOLE_SCENE


@dataclasses.dataclass(frozen=True)
class LayoutEncoding:
    """How layouts become tokens; all fields are fixed by what a model was trained with.

    A place is a point of a grid of `sections` x `sections` over the scene, and its token the
    point's row-major number. A class and its attributes are one token, label + num_classes * bits,
    with bit 0 for "group", 1 for "occluded", 2 for "depiction" and 3 for "inside".

    Attributes:
        num_classes: of objects.
        places: "boxes", three tokens an object: class, upper left and lower right corner; or
            "centers", two tokens an object: class and centre of the box.
        num_tokens: size of the vocabulary; the last token, `num_tokens - 1`, is padding.
        max_objects: places for so many objects, padded.
        attributes: those of `ATTRIBUTES` that are encoded; others are left out.
        with_crop: whether two tokens for the corners of the crop come last. Boxes are then in
            shares of the whole scene, else in shares of the crop.

    Raises:
        ValueError: a field is out of range, or classes with attributes do not fit into the tokens.
    """

    num_classes: int
    places: str = "boxes"
    num_tokens: int = 8192
    max_objects: int = 30
    attributes: tuple[str, ...] = ()
    with_crop: bool = True

    def __post_init__(self) -> None:
        if self.places not in ("boxes", "centers"):
            raise ValueError(f'places of a layout are "boxes" or "centers", not {self.places!r}.')
        unknown = sorted(set(self.attributes) - set(ATTRIBUTES))
        if unknown:
            raise ValueError(
                f"Objects of a layout have no attribute {unknown[0]!r}; there are "
                f"{', '.join(ATTRIBUTES)}."
            )
        if min(self.num_classes, self.max_objects) < 1 or self.num_tokens < 4:
            raise ValueError(
                f"A layout needs at least 1 class, 1 object and 4 tokens, not {self.num_classes}, "
                f"{self.max_objects} and {self.num_tokens}."
            )
        highest = self.num_classes * (1 + self._bits(frozenset(ATTRIBUTES))) - 1
        if highest >= self.pad_token:
            raise ValueError(
                f"{self.num_classes} classes with the attributes ({', '.join(self.attributes)}) "
                f"need the tokens 0 to {highest}, but of {self.num_tokens} tokens the last, "
                f"{self.pad_token}, is padding."
            )

    @property
    def pad_token(self) -> int:
        """The token of places for objects that the layout does not have."""
        return self.num_tokens - 1

    @property
    def sections(self) -> int:
        """Points of the grid of places along an axis."""
        return math.isqrt(self.num_tokens)

    @property
    def length(self) -> int:
        """Number of tokens of every layout."""
        return self.max_objects * self._tokens_per_object + (2 if self.with_crop else 0)

    def encode(
        self, layout: Layout, rng: np.random.Generator | None = None, flip: bool = False
    ) -> np.ndarray:
        """The tokens of a layout.

        Objects that do not overlap the crop are left out, those without area among them. Boxes are
        clamped to the frame; as in the reference, one that begins left of it or above keeps its
        full width or height.

        Args:
            layout: at most `max_objects` objects.
            rng: shuffles the objects, for training; without it their order stays.
            flip: whether the image is mirrored, left and right.

        Returns:
            int32 (length,), in [0, num_tokens).

        Raises:
            ValueError: there are too many objects, or one has a label that is no class.
        """
        if len(layout.objects) > self.max_objects:
            raise ValueError(
                f"The layout has {len(layout.objects)} objects; this encoding has places for "
                f"{self.max_objects}."
            )
        order = range(len(layout.objects))
        if rng is not None:
            order = rng.permutation(len(layout.objects))
        frame = WHOLE_SCENE if self.with_crop else layout.crop
        tokens: list[int] = []
        for item in (layout.objects[index] for index in order):
            if not 0 <= item.label < self.num_classes:
                raise ValueError(
                    f"An object has the label {item.label}; labels are 0 to {self.num_classes - 1}."
                )
            if overlap(item.box, layout.crop) > 0:
                tokens.append(item.label + self.num_classes * self._bits(item.attributes))
                tokens.extend(self._place_tokens(_in_frame(item.box, frame, flip)))
        count = self.max_objects * self._tokens_per_object
        tokens.extend([self.pad_token] * (count - len(tokens)))
        if self.with_crop:
            tokens.extend(self._corner_tokens(_mirrored(layout.crop) if flip else layout.crop))
        return np.array(tokens, np.int32)

    def check(self, layout: Layout) -> None:
        """Raises `ValueError` where a layout cannot be what its maker meant.

        That is where a box is not in the frame or an object has an attribute that is not encoded;
        `encode` leaves out or clamps what data sets have of that kind.
        """
        for number, item in enumerate(layout.objects):
            if not is_within_scene(item.box) or min(item.box[2:]) == 0:
                raise ValueError(
                    f"The box {list(item.box)} of object {number} is not within the scene or has "
                    "no area: x, y, width and height are shares of the scene, from 0 to 1."
                )
            unknown = sorted(item.attributes - set(self.attributes))
            if unknown:
                raise ValueError(
                    f"Object {number} has the attribute {unknown[0]}, which the model does not "
                    f"know; it knows {', '.join(self.attributes) or 'none'}."
                )

    def encode_windows(
        self, layout: Layout, grid: tuple[int, int], window: tuple[int, int]
    ) -> np.ndarray:
        """The tokens of a layout for each place of a window that slides over the image.

        Each window is a crop of the scene of its own: its tokens leave out the objects that it does
        not see, and where crops are encoded they say which part of the scene it is.

        Args:
            layout: of the whole image, which is the layout's crop.
            grid: rows and columns of the image, in codes.
            window: rows and columns of the window, at most those of the grid.

        Returns:
            int32 (rows - window rows + 1, columns - window columns + 1, length).

        Raises:
            ValueError: as `encode`.
        """
        x, y, width, height = layout.crop
        (rows, columns), (window_rows, window_columns) = grid, window
        tops, lefts = range(rows - window_rows + 1), range(columns - window_columns + 1)

        def tokens(top: int, left: int) -> np.ndarray:
            crop = (
                x + width * (left / columns),
                y + height * (top / rows),
                width * (window_columns / columns),
                height * (window_rows / rows),
            )
            return self.encode(Layout(layout.objects, crop))

        return np.stack([[tokens(top, left) for left in lefts] for top in tops])

    def shuffled(self, tokens: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Layouts with their objects in the order of random keys, as `encode` would shuffle them.

        Args:
            tokens: integers (B, length), of `encode`.
            keys: (B, max_objects) numbers, all different in a row.
        """
        size = self._tokens_per_object
        count = self.max_objects * size
        objects = tokens[:, :count].reshape(len(tokens), self.max_objects, size)
        padding = objects[..., 0] == self.pad_token  # which stays behind the objects
        order = np.lexsort((keys, padding))
        shuffled = np.take_along_axis(objects, order[..., None], axis=1)
        return np.concatenate([shuffled.reshape(-1, count), tokens[:, count:]], axis=1)

    def decode(self, tokens: np.ndarray) -> Layout:
        """The layout of tokens, up to the grid of places: half a section along each axis.

        Args:
            tokens: integers (length,).

        Returns:
            Objects in the order of the tokens. Those of "centers" have boxes without area, whose
            corner is the centre. Without crop tokens the layout is that of the crop alone.

        Raises:
            ValueError: these are not tokens that `encode` gives.
        """
        values = np.asarray(tokens).tolist()
        if np.shape(tokens) != (self.length,):
            raise ValueError(
                f"A layout has tokens of the shape ({self.length},), not {np.shape(tokens)}."
            )
        crop = WHOLE_SCENE
        if self.with_crop:
            crop = self._box_between(*values[-2:])
            values = values[:-2]
        objects = []
        step = self._tokens_per_object
        for start in range(0, len(values), step):
            name, *places = values[start : start + step]
            if name != self.pad_token:
                label, attributes = self._class_of(name)
                box = self._box_between(places[0], places[-1])
                objects.append(SceneObject(label, box, attributes))
        return Layout(tuple(objects), crop)

    @property
    def _tokens_per_object(self) -> int:
        return 3 if self.places == "boxes" else 2

    def _bits(self, attributes: frozenset[str]) -> int:
        return sum(
            1 << bit
            for bit, name in enumerate(ATTRIBUTES)
            if name in self.attributes and name in attributes
        )

    def _class_of(self, token: int) -> tuple[int, frozenset[str]]:
        bits, label = divmod(token, self.num_classes)
        names = frozenset(name for bit, name in enumerate(ATTRIBUTES) if bits >> bit & 1)
        if token < 0 or self._bits(names) != bits:
            raise ValueError(f"The token {token} is no class of an object in this encoding.")
        return label, names

    def _place_tokens(self, box: Box) -> tuple[int, ...]:
        if self.places == "boxes":
            return self._corner_tokens(box)
        x, y, width, height = box
        return (self._point_token(x + width / 2, y + height / 2),)

    def _corner_tokens(self, box: Box) -> tuple[int, int]:
        x, y, width, height = box
        return self._point_token(x, y), self._point_token(x + width, y + height)

    def _point_token(self, x: float, y: float) -> int:
        last = self.sections - 1
        return round(y * last) * self.sections + round(x * last)

    def _box_between(self, upper_left: int, lower_right: int) -> Box:
        for token in (upper_left, lower_right):
            if not 0 <= token < self.sections**2:
                raise ValueError(f"The token {token} is no place of a layout in this encoding.")
        (top, left), (bottom, right) = (
            divmod(token, self.sections) for token in (upper_left, lower_right)
        )
        if bottom < top or right < left:
            raise ValueError(
                f"The tokens {upper_left} and {lower_right} are not the upper left and the lower "
                "right corner of a box."
            )
        last = self.sections - 1
        return left / last, top / last, (right - left) / last, (bottom - top) / last


def is_within_scene(box: Box) -> bool:
    """Whether all of a box lies in the scene; one with numbers that are none does not."""
    x, y, width, height = box
    return all(0 <= number <= 1 for number in box) and max(x + width, y + height) <= 1 + _ROUNDING


def overlap(one: Box, other: Box) -> float:
    """The area that two boxes share."""
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


def _in_frame(box: Box, frame: Box, flip: bool) -> Box:
    """The box in shares of the frame, clamped, and mirrored with it."""
    x = min(max((box[0] - frame[0]) / frame[2], 0.0), 1.0)
    y = min(max((box[1] - frame[1]) / frame[3], 0.0), 1.0)
    width, height = min(box[2] / frame[2], 1 - x), min(box[3] / frame[3], 1 - y)
    clamped = (x, y, width, height)
    return _mirrored(clamped) if flip else clamped


def _mirrored(box: Box) -> Box:
    x, y, width, height = box
    return 1 - (x + width), y, width, height
