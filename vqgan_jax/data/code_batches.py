"""Batches of codes on the devices, prefetched; the same rows on any number of hosts."""

import sys
from collections.abc import Iterator, Sequence

import grain
import jax
import numpy as np
from ml_collections import ConfigDict

from vqgan_jax.data.codes import Codes
from vqgan_jax.data.elements import spaced_indices
from vqgan_jax.data.pipeline import Prefetched, global_array, rows_of_devices


class TrainingBatches(Sequence):
    """One host's part of every training batch, from `start_step` on."""

    def __init__(
        self, codes: Codes, seed: int, batch_size: int, rows: np.ndarray, start_step: int = 0
    ) -> None:
        """`rows` are this host's of the batch."""
        self._codes, self._seed, self._start_step = codes, seed, start_step
        self._batch_size, self._rows = batch_size, rows

    def __len__(self) -> int:
        """Endless."""
        return sys.maxsize

    def __getitem__(self, position: int) -> dict[str, np.ndarray]:
        """The batch of step `start_step + position`, as of `Codes.batch`."""
        step = self._start_step + position
        return self._codes.batch(self._seed, step, self._batch_size, self._rows)


class EvaluationBatches(Sequence):
    """One host's part of the batches that have every image once, in order and as it is."""

    def __init__(self, codes: Codes, batch_size: int, rows: np.ndarray, limit: int = 0) -> None:
        """Takes all images, or with a `limit` so many of them, evenly spaced."""
        self._codes, self._batch_size, self._rows = codes, batch_size, rows
        self._indices = spaced_indices(len(codes), limit)

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self._indices) // self._batch_size)

    def __getitem__(self, position: int) -> dict[str, np.ndarray]:
        """What `Codes.rows` has of augmentation 0, and `mask`, float32 (rows,), 0 for padding."""
        places = position * self._batch_size + self._rows
        mask = places < len(self._indices)
        images = self._indices[np.where(mask, places, 0)]
        return self._codes.rows(images) | {"mask": mask.astype(np.float32)}


def training_code_batches(
    codes: Codes,
    config: ConfigDict,
    sharding: jax.sharding.NamedSharding,
    start_step: int = 0,
) -> Iterator[dict[str, jax.Array]]:
    """Endless batches for the steps `start_step`, `start_step + 1`, ...

    Args:
      codes: of the training split.
      config: uses `seed`, `training.batch_size` and `data.prefetch`.
      sharding: of the batch; splits the leading axis only.
      start_step: number of the first batch.

    Returns:
      An iterator over global arrays of all hosts: `codes`, int32 (B, h * w); `label`, int32 (B,),
      -1 where there is none; and under its name each condition, int32 (B, n). Its `close()` ends
      its threads.
    """
    batch_size = config.training.batch_size
    rows = _rows_of_host(sharding, batch_size)
    source = TrainingBatches(codes, config.seed, batch_size, rows, start_step)
    batches = _on_devices(source, sharding, batch_size, rows)
    return Prefetched(batches, config.data.prefetch)


def evaluation_code_batches(
    codes: Codes,
    config: ConfigDict,
    sharding: jax.sharding.NamedSharding,
    batch_size: int,
    limit: int = 0,
) -> Iterator[tuple[dict[str, jax.Array], jax.Array]]:
    """The images of a split in order, without augmentation, each once over all hosts.

    Args:
      codes: of the validation split.
      config: uses `data.prefetch`.
      sharding: of the batch; splits the leading axis only.
      batch_size: sequences a batch, on all devices together.
      limit: at most so many images, evenly spaced over the split; 0 = all.

    Returns:
      An iterator over (batch, mask): the batch as in `training_code_batches`; `mask` float32 (B,),
      0 for the padding of the last batch. Its `close()` ends its threads.
    """
    rows = _rows_of_host(sharding, batch_size)
    source = EvaluationBatches(codes, batch_size, rows, limit)
    batches = _on_devices(source, sharding, batch_size, rows)
    batches = batches.map(lambda batch: (batch, batch.pop("mask")))
    return Prefetched(batches, config.data.prefetch)


def _rows_of_host(sharding: jax.sharding.NamedSharding, batch_size: int) -> np.ndarray:
    parts = sharding.addressable_devices_indices_map((batch_size,)).values()
    return rows_of_devices(parts, batch_size)


def _on_devices(
    source: Sequence, sharding: jax.sharding.NamedSharding, batch_size: int, rows: np.ndarray
) -> grain.IterDataset:
    """The batches of a source as global arrays, each host having gathered its rows."""

    def put(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return jax.tree.map(lambda values: global_array(values, rows, sharding, batch_size), batch)

    # One thread, so that no two make the permutation of a new pass at once.
    read_options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    return grain.MapDataset.source(source).to_iter_dataset(read_options).map(put)
