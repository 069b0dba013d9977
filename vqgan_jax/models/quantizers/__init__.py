"""Vector quantizers: latents in, codes and code vectors out, with a gradient that passes them by.

All share one interface: `__call__(latents, train, temperature) -> Quantized` and
`lookup(codes) -> vectors`. The losses that train them are in `losses/quantization.py` and
`losses/entropy.py`.
"""

import flax.linen as nn

from vqgan_jax.models.quantizers.ema import EMAQuantizer
from vqgan_jax.models.quantizers.fsq import FSQQuantizer
from vqgan_jax.models.quantizers.gumbel import GumbelQuantizer
from vqgan_jax.models.quantizers.lfq import LFQQuantizer
from vqgan_jax.models.quantizers.nearest import NearestQuantizer
from vqgan_jax.models.quantizers.product import ProductQuantizer
from vqgan_jax.models.quantizers.quantized import Quantized
from vqgan_jax.models.quantizers.residual import ResidualQuantizer
from vqgan_jax.models.quantizers.simvq import SimVQQuantizer

__all__ = [
    "EMAQuantizer",
    "FSQQuantizer",
    "GumbelQuantizer",
    "LFQQuantizer",
    "NearestQuantizer",
    "ProductQuantizer",
    "Quantized",
    "ResidualQuantizer",
    "SimVQQuantizer",
    "make_quantizer",
]


def make_quantizer(
    kind: str,
    codebook_size: int,
    code_dim: int,
    l2_normalize: bool,
    kmeans_init: bool,
    ema_decay: float,
    restart_below: float,
    gradient: str = "straight_through",
    levels: tuple[int, ...] = (),
    depth: int = 1,
    shared_codebook: bool = False,
) -> nn.Module:
    """The quantizer that a config's `model.quantizer` describes."""
    if kind == "gumbel":
        return GumbelQuantizer(codebook_size, code_dim)
    if kind == "fsq":
        return FSQQuantizer(tuple(levels))
    if kind == "lfq":
        return LFQQuantizer(code_dim)
    looked_up = dict(codebook_size=codebook_size, code_dim=code_dim, gradient=gradient)
    if kind == "simvq":
        return SimVQQuantizer(l2_normalize=l2_normalize, **looked_up)
    looked_up["kmeans_init"] = kmeans_init
    several = dict(depth=depth, shared_codebook=shared_codebook)
    if kind == "residual":
        return ResidualQuantizer(**several, **looked_up)
    looked_up["l2_normalize"] = l2_normalize
    if kind == "product":
        return ProductQuantizer(**several, **looked_up)
    if kind == "ema":
        return EMAQuantizer(decay=ema_decay, restart_below=restart_below, **looked_up)
    if kind == "nearest":
        return NearestQuantizer(**looked_up)
    raise ValueError(
        f"unknown quantizer kind {kind!r}; it must be nearest, ema, gumbel, simvq, fsq, lfq, "
        "residual or product"
    )
