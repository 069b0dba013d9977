"""Features of images within trained models: averages over positions, by name.

"Vector-quantized Image Modeling with Improved VQGAN" (Yu et al. 2022): the outputs of a
transformer's blocks, averaged over the tokens. Of a tokenizer there are the encoder's output and
the latents in front of the quantiser, averaged likewise; and for comparison an image's pixels.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from vqgan_jax.conditions.kinds import Conditions
from vqgan_jax.data.images import prepare_images
from vqgan_jax.data.pipeline import evaluation_batches, evaluation_examples
from vqgan_jax.errors import DataError
from vqgan_jax.generation import Generator
from vqgan_jax.inference import Tokenizer
from vqgan_jax.models.transformer import Block, Transformer
from vqgan_jax.training.encoding import encode_raw
from vqgan_jax.training.learner import make_transformer

PIXELS, ENCODER, LATENTS = "pixels", "encoder", "latents"
PIXELS_SIDE = 16  # of the small picture whose pixels are features
Features = dict[str, jax.Array]


class FeatureModel:
    """A trained model as a function from raw images to features.

    Attributes:
        names: of all its features; of blocks `block 0`, what the first one sees, and so on.
        config: of its tokenizer, as the pipeline of images takes it.
        variables: what `features` takes: the tokenizer's, and of a transformer its parameters.
        num_blocks: of the transformer; 0 of a tokenizer.
        tokenizer: of the images.
    """

    def __init__(self, model: Tokenizer | Generator) -> None:
        """Of a tokenizer, or of a transformer with its tokenizer.

        Raises:
            DataError: the transformer has no token that stands for no condition.
        """
        self.names: tuple[str, ...] = (PIXELS, ENCODER, LATENTS)
        self.num_blocks, self._transformer = 0, None
        if isinstance(model, Tokenizer):
            self.tokenizer, resolution = model, model.config.model.resolution
        else:
            self.tokenizer = model.tokenizer
            resolution = model.config.model.grid[0] * model.tokenizer.factor
            self._transformer = make_transformer(model.config)
            self._null = no_condition(model.config)
            self.num_blocks = self._transformer.num_layers
            self.names += tuple(block_name(i) for i in range(self.num_blocks + 1))
        self.config = self.tokenizer.config.copy_and_resolve_references()
        with self.config.unlocked():
            self.config.model.resolution = resolution
        self.variables: dict[str, Any] = {"tokenizer": self.tokenizer.variables}
        if self._transformer is not None:
            self.variables["transformer"] = model.params

    def features(self, names: Sequence[str], variables, raw: jax.Array) -> Features:
        """Some features of raw images `(B, ...)`, each `(B, D)` float32."""
        images = prepare_images(self.config, raw)
        tokenizer = self.tokenizer.module

        def apply(method):
            return tokenizer.apply(variables["tokenizer"], images, method=method)

        found = {}
        if PIXELS in names:
            side = min(PIXELS_SIDE, *images.shape[1:3])
            shape = (len(images), side, side, images.shape[-1])
            found[PIXELS] = jax.image.resize(images, shape, "linear").reshape(len(images), -1)
        if ENCODER in names:
            found[ENCODER] = averaged(apply(lambda module, images: module.encoder(images)))
        if LATENTS in names:
            found[LATENTS] = averaged(apply(lambda module, images: module.latents(images)))
        if blocks := [i for i in range(self.num_blocks + 1) if block_name(i) in names]:
            codes = encode_raw(self.tokenizer, variables["tokenizer"], raw)
            averages = block_averages(
                self._transformer,
                variables["transformer"],
                self.no_condition(codes),
                codes,
                max(blocks),
            )
            found |= {block_name(i): averages[i] for i in blocks}
        return found

    def no_condition(self, codes: jax.Array) -> jax.Array:
        """What stands in front of codes `(B, N)` where nothing is known of the image."""
        return jnp.broadcast_to(self._null, (len(codes), *self._null.shape))

    def up_to(self, block: int) -> tuple[Transformer, Any]:
        """The transformer that ends behind a block, and its parameters, without norm and head."""
        kept = {
            k: v for k, v in self.variables["transformer"].items() if k[:4] not in ("norm", "head")
        }
        blocks = jax.tree.map(lambda leaf: leaf[:block], kept["blocks"])
        return self._transformer.clone(num_layers=block), kept | {"blocks": blocks}


def no_condition(config: ConfigDict) -> jax.Array:
    """The condition tokens of a transformer for an image of which nothing is known.

    Raises:
        DataError: it has none for that.
    """
    conditions, size = Conditions.from_config(config), config.model.codebook_size
    for kind in conditions.kinds:
        if not conditions.own_table and kind.vocabulary >= size:
            raise DataError(
                f"The transformer has no token for an image without its condition {kind.name}, and "
                "with it the features would say what they are to tell."
            )
    blank = {
        kind.name: jnp.zeros((1, int(np.prod(kind.shape))), jnp.int32) for kind in conditions.kinds
    }
    return conditions.tokens(blank | {"label": jnp.zeros(1, jnp.int32)}, dropped=True)[0]


def block_name(number: int) -> str:
    """What the features behind a block are called; 0 is in front of the first."""
    return f"block {number}"


def averaged(x: jax.Array) -> jax.Array:
    """`(B, ..., D)` over all positions: `(B, D)` float32."""
    return jnp.mean(x.reshape(len(x), -1, x.shape[-1]), axis=1, dtype=jnp.float32)


def block_averages(
    transformer: Transformer, params, conditions: jax.Array, codes: jax.Array, last: int
) -> jax.Array:
    """What blocks give, averaged over the codes that the transformer sees: all but the last one.

    Args:
        transformer: the module.
        params: its parameters.
        conditions: `(B, num_conditions)` int.
        codes: `(B, N)` int, row by row.
        last: the last block that is looked at, from 1.

    Returns:
        `(last + 1, B, width)` float32; the first is of what the first block sees.
    """
    x = transformer.apply({"params": params}, conditions, codes, method="embed_sequence")
    angles = transformer.angles()
    angles = None if angles is None else jnp.asarray(angles[: x.shape[1]])
    block = Block(**transformer.block_fields())

    def through(x, layer):
        x, _ = block.apply({"params": layer}, x, angles)
        return x, averaged(x[:, transformer.num_conditions :])

    layers = jax.tree.map(lambda leaf: leaf[:last], params["blocks"])
    first = averaged(x[:, transformer.num_conditions :])
    _, averages = jax.lax.scan(through, x, layers)
    return jnp.concatenate([first[None], averages])


def rows_of_devices() -> tuple[NamedSharding, NamedSharding]:
    """Shardings over the devices of this process: of rows, and of what all have."""
    devices = jax.local_devices()
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    return NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())


def widths(model: FeatureModel, names: Sequence[str]) -> dict[str, int]:
    """The number of values that each of some features has."""
    raw = evaluation_examples(model.config, 1)["image"]
    shapes = jax.eval_shape(functools.partial(model.features, tuple(names)), model.variables, raw)
    return {name: shapes[name].shape[1] for name in names}


def labelled_batches(config: ConfigDict, split: str, batch_size: int, limit: int):
    """Raw images of a split in order with their labels, `(B,)`, -1 for those that do not count."""
    rows, _ = rows_of_devices()
    config = config.copy_and_resolve_references()
    config.data.validation_split = split
    batches = evaluation_batches(config, rows, whole_batches(batch_size), limit)
    with contextlib.closing(batches):
        for batch, mask in batches:
            yield batch["image"], np.where(np.asarray(mask) > 0, np.asarray(batch["label"]), -1)


def whole_batches(batch_size: int) -> int:
    """The next batch size that the devices of this process divide."""
    devices = jax.local_device_count()
    return -(-batch_size // devices) * devices


def extract(
    function: Callable[[Any, jax.Array], Features],
    variables,
    config: ConfigDict,
    split: str,
    batch_size: int,
    limit: int,
) -> tuple[Mapping[str, np.ndarray], np.ndarray]:
    """Features of the images of a split that have a class, `(n, D)` float32, and labels `(n,)`.

    Args:
        function: gives features of raw images, by name.
        variables: its first argument.
        config: of the pipeline of images.
        split: of the data set.
        batch_size: images at once.
        limit: at most so many images, evenly spaced over the split; 0 for all.

    Raises:
        DataError: the data cannot be used.
    """
    _, whole = rows_of_devices()
    compiled, variables = jax.jit(function), jax.device_put(variables, whole)
    parts, labels = [], []
    for raw, own in labelled_batches(config, split, batch_size, limit):
        found = jax.device_get(compiled(variables, raw))
        parts.append({name: values[own >= 0] for name, values in found.items()})
        labels.append(own[own >= 0])
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return joined, np.concatenate(labels)
