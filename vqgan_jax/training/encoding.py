"""Codes of raw images, as the pipeline gives them."""

import functools
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vqgan_jax.data.errors import DataError
from vqgan_jax.inference import Tokenizer
from vqgan_jax.training.compilation import compile_options
from vqgan_jax.training.images import prepare_images


def encode_raw(tokenizer: Tokenizer, variables, raw: jax.Array) -> jax.Array:
    """Raw images or label maps `(B, ...)` -> codes `(B, h * w)` int32, in the order of rows."""
    images = prepare_images(tokenizer.config.data, raw)
    codes = tokenizer.module.apply(variables, images, method="encode")
    return codes.reshape(len(codes), -1)


class HostEncoder:
    """The tokenizer's encoder on all devices of this host, each with `device_batch_size` images.

    Every device runs a program of one shape that knows nothing of the others, so that neither their
    number nor that of the hosts changes a code.

    Attributes:
        data: the tokenizer's `config.data`.
        batch_size: images of a batch on all devices of the host.
    """

    def __init__(self, tokenizer: Tokenizer, device_batch_size: int) -> None:
        self.data = tokenizer.config.data
        devices = jax.local_devices()
        self.batch_size = device_batch_size * len(devices)
        mesh = Mesh(np.array(devices), ("data",))
        whole, rows = PartitionSpec(), PartitionSpec("data")
        self._rows = NamedSharding(mesh, rows)
        self._variables = jax.device_put(tokenizer.variables, NamedSharding(mesh, whole))

        on_each_device = jax.shard_map(
            functools.partial(encode_raw, tokenizer),
            mesh=mesh,
            in_specs=(whole, rows),
            out_specs=rows,
            check_vma=False,
        )
        self._encode = jax.jit(on_each_device, compiler_options=compile_options())

    def put(self, images: np.ndarray) -> list[jax.Array]:
        """Raw images `(B, views, ...)` to the devices, a view at a time."""
        return [jax.device_put(images[:, view], self._rows) for view in range(images.shape[1])]

    def codes(self, batches: Iterable[dict]) -> Iterator[tuple[np.ndarray, dict]]:
        """Codes `(B, views, h * w)` of each batch, and the batch.

        They are fetched one batch late, so that the devices have the next one to go on with.
        """
        previous = None
        for batch in batches:
            current = [self._encode(self._variables, view) for view in batch.pop("views")], batch
            if previous:
                yield self._fetch(*previous)
            previous = current
        if previous:
            yield self._fetch(*previous)

    def _fetch(self, codes: list[jax.Array], batch: dict) -> tuple[np.ndarray, dict]:
        try:
            return np.stack(jax.device_get(codes), axis=1), batch
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise DataError(
                "The images that go through a device together are too much for its memory; set a "
                "smaller --batch_size."
            ) from error
