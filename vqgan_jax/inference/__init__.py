"""Trained models for other programs: `vqgan_jax.load(path)`."""

import contextlib
import functools
import hashlib
import json
import math
import os
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vqgan_jax.conditions.kinds import Conditions
from vqgan_jax.configuration import downsampling_factor
from vqgan_jax.configuration.common import value_at
from vqgan_jax.configuration.documents import first_line
from vqgan_jax.data.images import prepare_images
from vqgan_jax.models.tiled_decoding import decode_codes
from vqgan_jax.models.tiled_encoding import encode_images
from vqgan_jax.training.checkpoints import (
    CheckpointError,
    condition_folder,
    read_variables,
    shapes,
    tokenizer_path,
)
from vqgan_jax.training.compilation import compile_options
from vqgan_jax.training.game import make_vqgan
from vqgan_jax.training.sharding import path_name

# What determines codes, and with it the fingerprint: to rename one of these keys, here or in the
# parameters, would make every tokenizer a stranger to its codes on disk.
_ENCODING_CONFIG = {
    "conv": (
        "resolution",
        "in_channels",
        "channels",
        "channel_multipliers",
        "num_res_blocks",
        "attention_resolutions",
        "latent_channels",
        "num_groups",
    ),
    "vit": (
        "architecture",
        "resolution",
        "in_channels",
        "vit.patch",
        "vit.encoder.layers",
        "vit.encoder.heads",
        "vit.encoder.width",
    ),
}
_QUANTIZER_CONFIG = ("kind", "codebook_size", "code_dim", "l2_normalize")
_OWN_QUANTIZER_CONFIG = {  # of some kinds beside these
    "fsq": ("levels",),
    "residual": ("depth", "shared_codebook"),
    "product": ("depth", "shared_codebook"),
}
_ENCODING_VARIABLES = (
    "params/encoder/",
    "params/quant_conv/",
    "params/quantize/",
    "codebook/quantize/embedding",  # a frozen one, or that of an EMA without what it moves by
)


class Tokenizer:
    """A trained tokenizer. Functions are compiled once for each shape of their input.

    Attributes:
        config: the config it was trained with.
        variables: its parameters and, for an EMA quantiser, its codebook.
        factor: pixels a code in each direction.
        codebook_size: number of codes.
        depth: codes a position.
    """

    def __init__(self, config: ConfigDict, variables):
        self.config = config
        self.variables = variables
        self.module = make_vqgan(config.model)
        self.factor = downsampling_factor(config.model)
        self.codebook_size = config.model.quantizer.codebook_size
        self.depth = config.model.quantizer.depth

    def encode(self, images) -> jax.Array:
        """Images `(B, H, W, C)` in [-1, 1] -> codes `(B, H/f, W/f)` int32.

        `(B, H/f, W/f, depth)` where a position has several. Label-map tokenizers take one-hot maps.
        Large images are encoded in tiles, with the same result up to rounding: more time, less
        memory.

        Raises:
            ValueError: the factor does not divide height and width, channels are wrong, or images
                are integers.
        """
        images = jnp.asarray(images)
        channels = self.config.model.in_channels
        if images.ndim != 4 or images.shape[-1] != channels:
            raise ValueError(
                f"images have shape {images.shape}; this tokenizer takes (B, H, W, {channels})."
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(
                f"images have type {images.dtype}; this tokenizer takes floats"
                + (", one-hot." if self.config.data.num_labels else " in [-1, 1]: x / 127.5 - 1.")
            )
        return self._encode_whole_codes(images)

    def encode_raw(self, raw) -> jax.Array:
        """Images as they are on disk, uint8 or label maps, -> codes `(B, H/f, W/f)` int32.

        As `encode` of what `data.images.prepare_images` makes of them, with less memory.

        Raises:
            ValueError: the factor does not divide height and width, or they are neither `(B, H, W,
                3)` uint8 nor, where the tokenizer is of label maps, `(B, H, W)` integers.
        """
        raw = jnp.asarray(raw)
        if self.config.data.num_labels:
            fits = raw.ndim == 3 and jnp.issubdtype(raw.dtype, jnp.integer)
            wanted = "label maps, integers (B, H, W)"
        else:
            fits = raw.ndim == 4 and raw.shape[-1] == 3 and raw.dtype == jnp.uint8
            wanted = "pictures, uint8 (B, H, W, 3)"
        if not fits:
            raise ValueError(
                f"images have shape {raw.shape} and type {raw.dtype}; this tokenizer takes "
                f"{wanted}."
            )
        return self._encode_whole_codes(raw)

    def _encode_whole_codes(self, images: jax.Array) -> jax.Array:
        height, width = images.shape[1:3]
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"images are {height}x{width}, which the factor {self.factor} does not divide; "
                "crop or resize them."
            )
        return self._encode(self.variables, images)

    def codes_of(self, variables, raw: jax.Array) -> jax.Array:
        """What `encode_raw` compiles, for programs that it is a part of."""
        prepare = functools.partial(prepare_images, self.config)
        return encode_images(self.module, variables, raw, prepare)

    def decode(self, codes) -> jax.Array:
        """Codes `(B, h, w)` -> images `(B, f h, f w, C)` in [-1, 1]; logits for label maps.

        Codes are `(B, h, w, depth)` where a position has several.
        Large images are decoded in tiles, with the same result: more time, less memory.

        Codes outside the codebook are looked for where they are on the host; on a device they give
        NaN.

        Raises:
            ValueError: codes are not integers of that shape, or outside the codebook.
        """
        if not isinstance(codes, jax.Array):
            codes = np.asarray(codes)
        several = () if self.depth == 1 else (self.depth,)
        shaped = codes.ndim == 3 + len(several) and codes.shape[3:] == several
        if not shaped or not jnp.issubdtype(codes.dtype, jnp.integer):
            expected = ", ".join(("B", "h", "w", *map(str, several)))
            raise ValueError(
                f"codes have shape {codes.shape} and type {codes.dtype}; they must be integers "
                f"({expected})."
            )
        if isinstance(codes, np.ndarray) and codes.size:
            lowest, highest = codes.min(), codes.max()
            if lowest < 0 or highest >= self.codebook_size:
                raise ValueError(
                    f"codes are from {lowest} to {highest}; this codebook has 0 to "
                    f"{self.codebook_size - 1}."
                )
        return self._decode(self.variables, codes)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the parameters and config values that determine codes.

        These are the encoder's, the projection's and the quantiser's, not the decoder's: tokenizers
        with equal fingerprints give equal codes, up to the rounding of the computation's dtype.
        """
        model = self.config.model
        names = _ENCODING_CONFIG[model.architecture]
        config = {name: value_at(model, name) for name in names}
        own = _OWN_QUANTIZER_CONFIG.get(model.quantizer.kind, ())
        config["quantizer"] = {name: model.quantizer[name] for name in _QUANTIZER_CONFIG + own}
        config["num_labels"] = self.config.data.num_labels
        if model.norm != "group":  # as tokenizers of older versions have it
            config["norm"] = model.norm
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        flat, _ = jax.tree_util.tree_flatten_with_path(self.variables)
        for name, leaf in sorted((path_name(path), leaf) for path, leaf in flat):
            if name.startswith(_ENCODING_VARIABLES):
                values = np.asarray(leaf).astype("<f4")
                digest.update(f"{name} {values.shape}".encode())
                digest.update(values.tobytes())
        return digest.hexdigest()

    @functools.cached_property
    def _encode(self):
        return jax.jit(self.codes_of, compiler_options=compile_options())

    @functools.cached_property
    def _decode(self):
        label_map = self.config.data.num_labels > 0

        def decode(variables, codes):
            images = decode_codes(self.module, variables, codes)
            return images if label_map else jnp.clip(images, -1.0, 1.0)

        return jax.jit(decode, compiler_options=compile_options())


def load(path: str | os.PathLike, tokenizer: str | os.PathLike = ""):
    """What was trained at `path`: a `Tokenizer`, or a `Generator` with its tokenizer.

    Of a run directory the newest checkpoint is taken, and the moving average of the parameters
    where the run kept one.

    Args:
        path: a run directory, a checkpoint or an export.
        tokenizer: of a transformer, one of the same codes that shall make images of them, such as
            one with a larger decoder; empty for the one that it was trained with.

    Raises:
        CheckpointError: there is none at `path`, or it is damaged; `tokenizer` has other codes.
    """
    config, variables, _ = read_variables(path)
    if config.stage == "tokenizer":
        if tokenizer:
            raise CheckpointError(f"{path} is a tokenizer itself; it takes no other one.")
        return _tokenizer(path, config, variables)
    of_conditions = {
        name: load_tokenizer(tokenizer_path(path, condition_folder(name)))
        for name in config.condition.kinds
        if name in config.condition.images
    }
    own = load_tokenizer(tokenizer_path(path))
    if tokenizer:
        other = load_tokenizer(tokenizer)
        if other.fingerprint != own.fingerprint:
            raise CheckpointError(
                f"{tokenizer} gives other codes than the tokenizer of {path}; it must be that one "
                "or one that was trained from it with its encoder and quantizer frozen."
            )
        own = other
    return _generator(path, config, variables["params"], own, of_conditions)


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer at `path`, as of `load`.

    Raises:
        CheckpointError: as `load`, and where another kind of model is there.
    """
    config, variables, _ = read_variables(path)
    if config.stage != "tokenizer":
        raise CheckpointError(f"{path} is a {config.stage}; a tokenizer is needed here.")
    return _tokenizer(path, config, variables)


def _generator(path: str | os.PathLike, config: ConfigDict, params, tokenizer, of_conditions):
    from vqgan_jax.generation import Generator

    with _building(path):
        generator = Generator(config, params, tokenizer, of_conditions)
        num_conditions = Conditions.from_config(config).num_tokens
        tokens = [(1, num_conditions), (1, math.prod(config.model.grid))]
        described = jax.eval_shape(
            generator.transformer.init,
            jax.random.key(0),
            *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in tokens),
        )
    _compare_shapes(path, shapes(params), shapes(described["params"]))
    made = {"model": (config.model.codebook_size, tokenizer)}
    for name, own in of_conditions.items():
        made[f"condition.images.{name}"] = config.condition.images[name].codebook_size, own
    for section, (size, own) in made.items():
        if size != own.codebook_size:
            raise CheckpointError(
                f"{path} does not fit its tokenizers: config.{section}.codebook_size is {size}, "
                f"and the tokenizer there has {own.codebook_size} codes."
            )
    return generator


def _tokenizer(path: str | os.PathLike, config: ConfigDict, variables) -> Tokenizer:
    with _building(path):
        tokenizer = Tokenizer(config, variables)
    _check_shapes(path, tokenizer)
    return tokenizer


def _check_shapes(path: str | os.PathLike, tokenizer: Tokenizer) -> None:
    """Raises `CheckpointError` where the variables are not those that the config describes."""
    model = tokenizer.config.model
    found = shapes(tokenizer.variables)
    blocks = model.num_res_blocks * len(model.channel_multipliers)
    if model.architecture == "conv" and blocks > len(found):  # tracing them all could take hours
        raise CheckpointError(
            f"{path} does not fit its own config: that describes {blocks} blocks or more, and "
            f"there are {len(found)} arrays."
        )
    images = jax.ShapeDtypeStruct(
        (1, tokenizer.factor, tokenizer.factor, model.in_channels), jnp.float32
    )
    with _building(path):
        described = shapes(jax.eval_shape(tokenizer.module.init, jax.random.key(0), images))
    _compare_shapes(path, found, described)


@contextlib.contextmanager
def _building(path: str | os.PathLike) -> Iterator[None]:
    """Around what builds a model by a stored config: what fails there is the config's fault."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):  # of the machine
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged: its config describes no model ({first_line(error)})."
        ) from error


def _compare_shapes(path: str | os.PathLike, found: dict, described: dict) -> None:
    different = sorted(described.items() ^ found.items())
    if different:
        name = different[0][0]
        raise CheckpointError(
            f"{path} does not fit its own config: {name} has the shape "
            f"{found.get(name, 'of nothing')}, and the config describes "
            f"{described.get(name, 'none of that name')}."
        )
