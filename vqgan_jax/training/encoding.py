"""Codes of raw images, as the pipeline gives them."""

import functools
from collections.abc import Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vqgan_jax.data.code_manifest import ConditionInfo
from vqgan_jax.data.condition_sources import ConditionSource, Layouts
from vqgan_jax.errors import DataError
from vqgan_jax.inference import Tokenizer
from vqgan_jax.training.compilation import compile_options


def encode_raw(tokenizer: Tokenizer, variables, raw: jax.Array) -> jax.Array:
    """Raw images or label maps `(B, ...)` -> codes `(B, h * w)` int32, in the order of rows.

    `(B, h * w * depth)` where a position has several, which stay together.
    """
    codes = tokenizer.codes_of(variables, raw)
    return codes.reshape(len(codes), -1)


def check_channels(what: str, tokenizer: Tokenizer) -> None:
    """Raises `DataError` where a tokenizer takes other images than data sets have."""
    channels = tokenizer.config.model.in_channels
    if tokenizer.config.data.num_labels == 0 and channels not in (1, 3):
        raise DataError(
            f"The {what} takes {channels} channels; pictures have 3, or are read as grey for 1."
        )


def check_one_code(what: str, tokenizer: Tokenizer) -> None:
    """Raises `DataError` where a tokenizer gives several codes a position."""
    if tokenizer.depth > 1:
        raise DataError(
            f"The {what} gives {tokenizer.depth} codes a position (config.model.quantizer.kind is "
            f"{tokenizer.config.model.quantizer.kind}), and a transformer takes one; use a "
            "tokenizer of another kind."
        )


def describe_condition(
    condition: ConditionSource, resolution: int, tokenizer: Tokenizer | None = None
) -> ConditionInfo:
    """All that determines a condition's tokens, as it stands beside codes on disk.

    Args:
        condition: where it comes from.
        resolution: of the images, in pixels.
        tokenizer: of an image.

    Raises:
        DataError: the tokenizer's factor does not divide the resolution.
    """
    if isinstance(condition, Layouts):
        return ConditionInfo.of_layout(
            condition.encoding, condition.min_area, condition.class_names
        )
    factor = condition.factor if tokenizer is None else tokenizer.factor
    if resolution % factor:
        raise DataError(
            f"The factor {factor} of the tokenizer of the condition {condition.name} does not "
            f"divide the resolution {resolution}."
        )
    side = resolution // factor
    shape = dict(name=condition.name, num_tokens=side * side, grid=(side, side))
    if tokenizer is None:
        return ConditionInfo(**shape, vocabulary=condition.intervals + 1)
    return ConditionInfo(
        **shape,
        vocabulary=tokenizer.codebook_size,
        fingerprint=tokenizer.fingerprint,
        dtype=jnp.dtype(tokenizer.module.dtype).name,
        image_key=condition.feature,
        derive=condition.derive,
        scale=condition.scale if condition.derive == "low_resolution" else 0,
    )


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

    def encode(self, views: list[jax.Array]) -> list[jax.Array]:
        """Codes `(B, h * w)` of each view that `put` sent; the devices go on by themselves."""
        return [self._encode(self._variables, view) for view in views]


def encode_batches(
    encoders: Mapping[str, HostEncoder], batches: Iterable[dict]
) -> Iterator[dict[str, np.ndarray]]:
    """Batches whose images have become codes.

    They are fetched one batch late, so that the devices have the next one to go on with.

    Args:
        encoders: by the key of the images that each encodes.
        batches: have under each key what `HostEncoder.put` gave.

    Yields:
        The batches with codes `(B, views, h * w)` in the place of images.
    """
    previous = None
    for batch in batches:
        current = batch | {key: encoder.encode(batch[key]) for key, encoder in encoders.items()}
        if previous:
            yield previous | _fetch(previous, encoders)
        previous = current
    if previous:
        yield previous | _fetch(previous, encoders)


def _fetch(batch: dict, keys: Iterable[str]) -> dict[str, np.ndarray]:
    try:
        return {key: np.stack(jax.device_get(batch[key]), axis=1) for key in keys}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DataError(
            "The images that go through a device together are too much for its memory; set a "
            "smaller --batch_size."
        ) from error
