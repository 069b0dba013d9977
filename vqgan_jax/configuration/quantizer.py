"""The keys of a tokenizer's quantizer, `config.model.quantizer`, and their checks."""

import math
from typing import Any

from ml_collections import ConfigDict

from vqgan_jax.configuration.common import MOST_CHANNELS, one_of, require
from vqgan_jax.configuration.ranges import number, numbers, share

KINDS = ("nearest", "ema", "gumbel", "simvq", "fsq", "lfq", "residual", "product")
# Which kinds know what; keys that a kind does not know must be as they are by default.
WITH_UNIT_LENGTH = ("nearest", "ema", "simvq", "product")
WITH_KMEANS = ("nearest", "ema", "residual", "product")
WITH_ROTATION = ("nearest", "ema", "simvq", "residual", "product")
WITH_DEPTH = ("residual", "product")
WITH_ENTROPY = ("nearest", "simvq", "lfq")
MOST_CODES = 2**24  # a codebook's counts are held in memory


def quantizer_section() -> dict[str, Any]:
    """The quantizer of "Taming Transformers" (Esser et al. 2021), with ranges."""
    return dict(
        kind="nearest",  # or "ema", "gumbel", "simvq", "fsq", "lfq", "residual", "product"
        # Of each codebook, where a position has several codes
        codebook_size=number(1024, 1, MOST_CODES),
        # Below the networks' channels: a low-dimensional projection
        code_dim=number(256, 1, MOST_CHANNELS),
        l2_normalize=False,  # cosine distance (ViT-VQGAN); not for "residual"
        kmeans_init=False,  # start the codebook at the k-means centres of the first batch
        ema_decay=share(0.99, below=True),  # "ema" only
        # "ema" only: a code used less per batch (EMA) starts again; 0 = off
        restart_below=number(0.0, 0, 1e9),
        # Or "rotation" (the rotation trick), for codes looked up
        gradient="straight_through",
        # "fsq" only: of each dimension, as in (8, 5, 5, 5) for 1000 codes
        levels=numbers((), 2, 2**16, length=(0, 32)),
        # Codes a position: steps of "residual", groups of channels of "product"
        depth=number(1, 1, 256),
        shared_codebook=False,  # "residual" and "product": one codebook for all of them
    )


def validate_quantizer(config: ConfigDict) -> None:
    """Raises `ConfigError` for keys of the quantizer and its losses that do not go together."""
    quantizer, loss = config.model.quantizer, config.loss
    kind, size, dim = quantizer.kind, quantizer.codebook_size, quantizer.code_dim
    one_of(config, "model.quantizer.kind", *KINDS)
    one_of(config, "model.quantizer.gradient", "straight_through", "rotation")
    for used, path, kinds in (
        (quantizer.restart_below > 0, "restart_below", ("ema",)),
        (quantizer.l2_normalize and kind != "gumbel", "l2_normalize", WITH_UNIT_LENGTH),
        (quantizer.kmeans_init and kind != "gumbel", "kmeans_init", WITH_KMEANS),
        (quantizer.gradient == "rotation", 'gradient="rotation"', WITH_ROTATION),
        (quantizer.levels, "levels", ("fsq",)),
        (quantizer.depth > 1, f"depth={quantizer.depth}", WITH_DEPTH),
        (quantizer.shared_codebook, "shared_codebook", WITH_DEPTH),
    ):
        require(
            not used or kind in kinds,
            f"config.model.quantizer.{path} is for {', '.join(kinds)}; "
            f"config.model.quantizer.kind is {kind}.",
        )
    require(
        loss.entropy == 0 or kind in WITH_ENTROPY,
        f"config.loss.entropy is for {', '.join(WITH_ENTROPY)}; "
        f"config.model.quantizer.kind is {kind}; set it to 0.",
    )
    if kind == "fsq":
        _validate_levels(quantizer)
    if kind == "lfq":
        require(
            size == 2**dim,
            f"LFQ needs codebook_size = 2^code_dim: config.model.quantizer.codebook_size is "
            f"{size}, and 2^{dim} is {2**dim}.",
        )
        require(
            loss.entropy > 0,
            "LFQ keeps its codes in use by the entropy loss alone: set config.loss.entropy, as to "
            "0.1.",
        )
    if kind in WITH_DEPTH:
        require(
            quantizer.depth > 1,
            f"config.model.quantizer.kind={kind} needs config.model.quantizer.depth above 1; with "
            "one code a position it is nearest.",
        )
    if kind == "product":
        require(
            dim % quantizer.depth == 0,
            f"config.model.quantizer.code_dim {dim} is not divisible into "
            f"config.model.quantizer.depth {quantizer.depth} groups of channels.",
        )


def _validate_levels(quantizer: ConfigDict) -> None:
    levels = quantizer.levels
    require(
        bool(levels),
        f"config.model.quantizer.levels is {levels}; FSQ needs whole numbers above 1, as in "
        "(8, 5, 5, 5).",
    )
    require(
        math.prod(levels) == quantizer.codebook_size,
        f"FSQ levels do not multiply to codebook_size: config.model.quantizer.levels {levels} make "
        f"{math.prod(levels)} codes, and config.model.quantizer.codebook_size is "
        f"{quantizer.codebook_size}.",
    )
    require(
        len(levels) == quantizer.code_dim,
        f"FSQ needs a level for each dimension: config.model.quantizer.levels has {len(levels)}, "
        f"and config.model.quantizer.code_dim is {quantizer.code_dim}.",
    )
