"""Batches on the devices: images by index, decoded in threads or processes, prefetched.

Batch `step` is a pure function of (seed, step), with the same rows in the same order on any number
of hosts and devices. A run that goes on at a step needs nothing but the step.
"""

import logging
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from vqgan_jax.data.augmentations import AllViews
from vqgan_jax.data.condition_sources import ConditionSource, check_conditions, features_of
from vqgan_jax.data.elements import (
    EvaluationOrder,
    ReadTransformed,
    RowsOfBatches,
    describe_damage,
    is_too_much,
    spaced_indices,
    too_many_damaged,
    training_order,
)
from vqgan_jax.data.sources import ImageSource, open_configured
from vqgan_jax.data.transforms import Transform, evaluation_transform, training_transform
from vqgan_jax.errors import DataError

logger = logging.getLogger(__name__)

Batch = dict[str, jax.Array]
Conditions = Sequence[ConditionSource]


def training_batches(
    config: ConfigDict,
    sharding: jax.sharding.NamedSharding,
    start_step: int = 0,
    conditions: Conditions = (),
) -> Iterator[Batch]:
    """Endless batches for the steps `start_step`, `start_step + 1`, ...

    Args:
      config: uses `data`, `seed`, `model.resolution` and `training.batch_size`.
      sharding: of the batch; splits the leading axis only.
      start_step: number of the first batch.
      conditions: what is read beside the images.

    Returns:
      An iterator over global arrays of all hosts: `image`, uint8 (B, H, W, 3), or (B, H, W) for
      label maps; `label`, int32 (B,), -1 where there is none; and under its name each condition,
      uint8 like `image`, or int32 (B, n) for coordinates and layouts. Its `close()` ends the
      threads and processes.

    Raises:
      DataError: for data that cannot be used; while iterating, when more than 1 % of the images
        are damaged. Fewer are each replaced by the next readable image, with a warning.
    """
    transform = training_transform(config, config.model.resolution)
    read = open_reader(config.data, config.data.train_split, transform, conditions)
    order = training_order(read, config.seed)
    batch_size = config.training.batch_size
    batches = _global_batches(config.data, read.source, order, sharding, batch_size, start_step)
    return Prefetched(batches, config.data.prefetch)


def evaluation_batches(
    config: ConfigDict,
    sharding: jax.sharding.NamedSharding,
    batch_size: int,
    limit: int = 0,
    conditions: Conditions = (),
) -> Iterator[tuple[Batch, jax.Array]]:
    """The validation split in order, each image once over all hosts.

    Args:
      config: uses `data` and `model.resolution`.
      sharding: of the batch; splits the leading axis only.
      batch_size: images a batch, on all devices together.
      limit: at most so many images, evenly spaced over the split; 0 = all.
      conditions: what is read beside the images.

    Returns:
      An iterator over (batch, mask): the batch as in `training_batches`; `mask` float32 (B,), 0
      for the padding of the last batch and for damaged images. Its `close()` ends the threads
      and processes.

    Raises:
      DataError: as `training_batches`.
    """
    transform = evaluation_transform(config, config.model.resolution)
    read = open_reader(config.data, config.data.validation_split, transform, conditions)
    order = EvaluationOrder(read, batch_size, limit)
    batches = _global_batches(config.data, read.source, order, sharding, batch_size)
    batches = batches.map(lambda batch: (batch, batch.pop("mask")))
    return Prefetched(batches, config.data.prefetch)


def evaluation_images(config: ConfigDict, count: int) -> np.ndarray:
    """At most `count` images, evenly spaced over the validation split, for a picture grid.

    Returns:
      uint8 (N, H, W, 3), or (N, H, W) for label maps.

    Raises:
      DataError: as `training_batches`.
    """
    return evaluation_examples(config, count)["image"]


def evaluation_examples(
    config: ConfigDict, count: int, conditions: Conditions = ()
) -> dict[str, np.ndarray]:
    """As `evaluation_images`, with labels and conditions: a batch as of `training_batches`."""
    transform = evaluation_transform(config, config.model.resolution)
    read = open_reader(config.data, config.data.validation_split, transform, conditions)
    indices = spaced_indices(len(read.source), count)
    examples = [read.or_next(int(index)) for index in indices]
    names = examples[0].keys() - {"index", "skipped"}
    return {name: np.stack([example[name] for example in examples]) for name in names}


def open_reader(
    data: ConfigDict, split: str, transform: Transform | AllViews, conditions: Conditions = ()
) -> ReadTransformed:
    """Reads the images of a split and what belongs to them.

    Args:
      data: uses `name`, `data_dir`, `image_key` and `num_labels`.
      split: of the data set.
      transform: brings an image to the resolution.
      conditions: what is read beside the images.

    Raises:
      DataError: there is no such data set, split or feature, the split is empty, or a condition
        cannot be read beside such images.
    """
    resolution, is_label_map = transform.resolution, data.num_labels > 0
    check_conditions(conditions, resolution, is_label_map)
    source = open_configured(data, split, resolution, features_of(conditions))
    if len(source) == 0:
        raise DataError(f"The split {split!r} of {data.name} is empty.")
    return ReadTransformed(source, transform, data.num_labels, tuple(conditions))


def rows_of_devices(parts: Iterable[tuple[slice, ...]], batch_size: int) -> np.ndarray:
    """The rows of a batch that some devices hold, sorted, each once.

    Args:
      parts: of each device, its part of the global array, as the values of a sharding's
        `addressable_devices_indices_map` give it.
      batch_size: rows of the global array.
    """
    return np.unique(np.concatenate([np.arange(batch_size)[part[0]] for part in parts]))


def global_array(
    values: np.ndarray, rows: np.ndarray, sharding: jax.sharding.NamedSharding, batch_size: int
) -> jax.Array:
    """The array of all hosts, from this host's rows of it.

    Args:
      values: (len(rows), ...).
      rows: which rows of the batch these are, sorted; all that this host's devices hold.
      sharding: of the result; splits the leading axis only.
      batch_size: rows of the result.
    """

    def part(index: tuple[slice, ...]) -> np.ndarray:
        wanted = np.arange(batch_size)[index[0]]
        first = np.searchsorted(rows, wanted[0])
        return values[first : first + len(wanted)]

    return jax.make_array_from_callback((batch_size, *values.shape[1:]), sharding, part)


def read_batches(
    elements: grain.MapDataset, batch_size: int, data: ConfigDict
) -> grain.IterDataset:
    """Elements in order and stacked to batches, read by threads or processes.

    Args:
      elements: what to read; picklable where it is read by processes.
      batch_size: elements a batch.
      data: uses `threads` and `processes`.
    """
    if data.processes:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain reads its own flags, in a notebook too
        # Worker processes take turns, so what they hand over must be whole batches.
        batches = elements.batch(batch_size).to_iter_dataset(grain.ReadOptions(1, 1))
        # Through pipes, not shared memory: that is unmapped once grain drops its array, while JAX
        # on a CPU may still use it without a copy.
        piped = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        batches = grain.experimental.WithOptionsIterDataset(batches, piped)
        return batches.mp_prefetch(
            grain.MultiprocessingOptions(data.processes, per_worker_buffer_size=1)
        )
    ahead = max(2 * batch_size, data.threads)
    read_options = grain.ReadOptions(data.threads, prefetch_buffer_size=ahead)
    return elements.to_iter_dataset(read_options).batch(batch_size)


class DamageCount:
    """Damaged images that turned up so far; warns of each and stops at too many."""

    def __init__(self, source: ImageSource) -> None:
        """Starts at none."""
        self._source = source
        self._damaged: dict[int, None] = {}  # an ordered set

    def note(self, indices: Sequence[int], skipped: Sequence[int]) -> None:
        """Takes in a batch's `index` and `skipped`.

        Raises:
          DataError: when more than 1 % of the images of all splits together are damaged.
        """
        length = len(self._source)
        for index, count in zip(indices, skipped, strict=True):
            for damaged in ((int(index) + i) % length for i in range(int(count))):
                if damaged not in self._damaged:
                    self._damaged[damaged] = None
                    logger.warning("Passed over: %s", describe_damage(self._source, damaged))
        if is_too_much(self._source, len(self._damaged)):
            raise DataError(too_many_damaged(self._source, list(self._damaged)))


class Prefetched(Iterator):
    """Iterates over a data set with some elements ahead, until it is closed.

    It closes itself when nobody holds it any more and when the program ends, before threads could
    run into an interpreter that is being torn down.
    """

    def __init__(self, dataset: grain.IterDataset, count: int) -> None:
        """Keeps `count` elements ready, in a thread of its own."""
        ahead = grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=count)
        self._open = [iter(ahead)]
        self.close = weakref.finalize(self, _close_all, self._open)

    def __next__(self) -> Any:
        """The next element."""
        if not self._open:
            raise ValueError("These batches are closed.")
        return next(self._open[0])


def _close_all(iterators: list[grain.DatasetIterator]) -> None:
    while iterators:
        iterators.pop().close()


def _global_batches(
    data: ConfigDict,
    source: ImageSource,
    order: Sequence[dict[str, Any]],
    sharding: jax.sharding.NamedSharding,
    batch_size: int,
    start_step: int = 0,
) -> grain.IterDataset:
    """The batches of an order as global arrays, each host having read its rows."""
    parts = sharding.addressable_devices_indices_map((batch_size,)).values()
    rows = rows_of_devices(parts, batch_size)
    damage = DamageCount(source)

    def put(batch: dict[str, np.ndarray]) -> Batch:
        damage.note(batch.pop("index"), batch.pop("skipped"))
        return jax.tree.map(lambda values: global_array(values, rows, sharding, batch_size), batch)

    elements = grain.MapDataset.source(RowsOfBatches(order, rows, batch_size, start_step))
    return read_batches(elements, len(rows), data).map(put)
