"""Examples by their place in an order that is the same on every host.

Place `g` of the training order is row `g % batch_size` of batch `g // batch_size`. What it holds
depends on the seed and `g` alone: every pass over the data has its own permutation, and every
place its own random generator. Hosts and devices only decide who reads which rows.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from vqgan_jax.data.augmentations import AllViews
from vqgan_jax.data.condition_sources import ConditionSource
from vqgan_jax.data.sources import ImageSource
from vqgan_jax.data.transforms import Transform
from vqgan_jax.errors import DataError, UnreadableImage

DAMAGED_SHARE = 0.01  # of a data set's images, of all splits together; more stops the run


@dataclasses.dataclass(frozen=True)
class ReadTransformed:
    """Reads and transforms the example of an index; picklable, for worker processes.

    Attributes:
      source: where the images are, and the features that conditions are read from.
      transform: brings an image to the resolution, or to all its views.
      num_labels: of a label map; 0 for pictures.
      conditions: what is read beside an image.
    """

    source: ImageSource
    transform: Transform | AllViews
    num_labels: int = 0
    conditions: tuple[ConditionSource, ...] = ()

    def blank(self) -> dict[str, Any]:
        """Stands for an example in padding: zeros, and no class."""
        shape = self.transform.shape
        image = np.zeros(shape if self.num_labels else (*shape, 3), np.uint8)
        made = {condition.name: condition.blank(shape) for condition in self.conditions}
        return {"image": image, "label": np.int32(-1)} | made

    def exactly(self, index: int, rng: np.random.Generator | None = None) -> dict[str, Any]:
        """The example of `index`.

        Returns:
          `image`, uint8 (H, W, 3), or (H, W) of a label map, with all views (views, H, W, ...);
          `label`, int32; and each condition under its name.

        Raises:
          UnreadableImage: when the image or that of a condition is damaged.
          DataError: when one of them does not fit the config, or not the other, or has wrong
            objects or keypoints.
        """
        example = self.source.read(index)
        image, features = example["image"], example["features"]
        if self.num_labels and image.max() >= self.num_labels:
            raise DataError(
                f"{self.source.describe(index)} has the label {image.max()}, but "
                f"config.data.num_labels={self.num_labels} allows 0 to {self.num_labels - 1}."
            )
        for condition in self.conditions:
            if condition.feature:
                where = self.source.describe(index, condition.feature)
                condition.check_example(features[condition.feature], image.shape, where)
        try:
            place = self.transform.place(*image.shape[:2], rng)
        except DataError as error:
            raise DataError(f"{self.source.describe(index)}: {error}") from error
        image = place.cut(image)
        made = {c.name: c.make(image, features, place, rng) for c in self.conditions}
        return {"image": image, "label": np.int32(example["label"])} | made

    def or_next(self, index: int, rng: np.random.Generator | None = None) -> dict[str, Any]:
        """The example of `index`, or the next one that is not damaged.

        Returns:
          What `exactly` returns; `index`, what was asked for; `skipped`, how many
          damaged images from there on were passed over.

        Raises:
          DataError: as in `exactly`, and when more images in a row are damaged than a whole data
            set may have.
        """
        length = len(self.source)
        tried = []
        while len(tried) < length and not is_too_much(self.source, len(tried)):
            candidate = (index + len(tried)) % length
            try:
                example = self.exactly(candidate, rng)
            except UnreadableImage:
                tried.append(candidate)
            else:
                return example | {"index": np.int64(index), "skipped": np.int64(len(tried))}
        raise DataError(too_many_damaged(self.source, tried))


def is_too_much(source: ImageSource, count: int) -> bool:
    """Whether so many damaged images are more than a data set may have."""
    return count > source.dataset_length * DAMAGED_SHARE


def too_many_damaged(source: ImageSource, indices: Sequence[int]) -> str:
    """The message when more than `DAMAGED_SHARE` of the images are damaged; it names up to five."""
    named = " ".join(describe_damage(source, index) for index in indices[:5])
    return (
        f"{len(indices)} images or more of {source.dataset_length} are damaged, above the "
        f"{DAMAGED_SHARE:.0%} that are passed over; repair or remove them. {named}"
    )


def describe_damage(source: ImageSource, index: int) -> str:
    """What is wrong with a damaged image, from reading it once more."""
    try:
        source.read(index)
    except UnreadableImage as error:
        return str(error)
    return f"{source.describe(index)} could not be read at first."


def training_order(read: ReadTransformed, seed: int) -> grain.MapDataset:
    """The endless order of training examples; element `g` is a pure function of (seed, g)."""
    return (
        grain.MapDataset.range(len(read.source))
        .seed(seed % 2**32)
        .shuffle()
        .repeat()
        .random_map(read.or_next)
    )


class EvaluationOrder:
    """The images of a split in order, each once, then padding to whole batches."""

    def __init__(self, read: ReadTransformed, batch_size: int, limit: int = 0) -> None:
        """Takes all images, or with a `limit` so many of them, evenly spaced."""
        self._read = read
        self._indices = spaced_indices(len(read.source), limit)
        self._length = -(-len(self._indices) // batch_size) * batch_size

    def __len__(self) -> int:
        """Number of rows in all batches."""
        return self._length

    def __getitem__(self, place: int) -> dict[str, Any]:
        """What `or_next` returns, and `mask`, 1 or 0.

        A damaged image is masked. In its stead another one would count twice.
        """
        index, damaged = 0, 0
        if place < len(self._indices):
            index = int(self._indices[place])
            try:
                example = self._read.exactly(index)
            except UnreadableImage:
                damaged = 1
            else:
                return example | _place(index, 0, mask=1)
        return self._read.blank() | _place(index, damaged, mask=0)


def _place(index: int, skipped: int, mask: int) -> dict[str, Any]:
    return {"index": np.int64(index), "skipped": np.int64(skipped), "mask": np.float32(mask)}


def spaced_indices(length: int, limit: int = 0) -> np.ndarray:
    """All indices below `length`, or at most `limit` of them, evenly spaced from the first."""
    count = min(limit, length) if limit else length
    return np.arange(count) * length // max(count, 1)


class RowsOfBatches:
    """The rows that one host reads of the batches from `start_step` on, as one long sequence."""

    def __init__(
        self,
        order: Sequence[dict[str, Any]],
        rows: np.ndarray,
        batch_size: int,
        start_step: int = 0,
    ) -> None:
        """Takes the global order and the host's rows, each in [0, batch_size)."""
        self._order, self._rows = order, rows
        self._batch_size, self._start_step = batch_size, start_step

    def __len__(self) -> int:
        """Number of rows in all batches."""
        batches = len(self._order) // self._batch_size - self._start_step
        return max(batches, 0) * len(self._rows)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The element at a position of the host's sequence."""
        step, row = divmod(position, len(self._rows))
        return self._order[(self._start_step + step) * self._batch_size + int(self._rows[row])]
