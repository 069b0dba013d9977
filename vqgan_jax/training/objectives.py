"""The weighted sums of losses that a config describes, each term reported raw and weighted."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vqgan_jax.losses import entropy, quantization, reconstruction
from vqgan_jax.models.lpips import LPIPS
from vqgan_jax.models.quantizers import Quantized

Terms = dict[str, jax.Array]


def weighted_sum(raw: Mapping[str, jax.Array], weights: Mapping[str, float]) -> tuple:
    """The sum of weight x term, and the terms as metrics `raw/NAME` and `weighted/NAME`."""
    weighted = {name: weights[name] * value for name, value in raw.items()}
    metrics = {f"raw/{name}": value for name, value in raw.items()}
    metrics |= {f"weighted/{name}": value for name, value in weighted.items()}
    return sum(weighted.values(), jnp.zeros(())), metrics


def uses_perceptual(loss: ConfigDict) -> bool:
    """Whether a config's `loss` has a perceptual term."""
    return loss.perceptual > 0 and loss.binary_cross_entropy == 0


def reconstruction_objective(
    loss: ConfigDict, perceptual: LPIPS, perceptual_params, images, reconstructions, output, key
) -> tuple[jax.Array, Terms]:
    """Pixel and perceptual terms between images and reconstructions `(B, H, W, C)`.

    With a binary cross-entropy term (label maps), `reconstructions` are logits and it stands alone.
    `output` is what the decoder made the reconstructions of; the logit-Laplace term is about it.
    """
    raw = {}
    if loss.binary_cross_entropy > 0:
        raw["binary_cross_entropy"] = reconstruction.binary_cross_entropy(images, reconstructions)
        return weighted_sum(raw, loss)
    if loss.l1 > 0:
        raw["l1"] = reconstruction.l1(images, reconstructions)
    if loss.l2 > 0:
        raw["l2"] = reconstruction.l2(images, reconstructions)
    if loss.logit_laplace > 0:
        raw["logit_laplace"] = jnp.mean(reconstruction.logit_laplace(images, output))
    if uses_perceptual(loss):
        distances = perceptual.apply(
            {"params": perceptual_params},
            images,
            reconstructions,
            train=loss.perceptual_network.dropout,
            rngs={"dropout": key},
        )
        raw["perceptual"] = jnp.mean(distances)
    return weighted_sum(raw, loss)


def quantization_objective(
    loss: ConfigDict, kind: str, quantized: Quantized
) -> tuple[jax.Array, Terms]:
    """What trains codes and latents, by the quantiser's `kind`; nothing for "fsq".

    `loss.codebook` weighs all but the entropy term, whose weight is `loss.entropy`.
    """
    raw = {}
    if kind == "gumbel":
        raw["quantization"] = loss.kl * quantization.divergence_from_uniform(quantized.logits)
    elif kind != "fsq":
        raw["quantization"] = quantization.vector_quantization(
            quantized.latents,
            quantized.vectors,
            beta=loss.commitment,
            legacy=loss.legacy_codebook,
            codebook_learns=kind not in ("ema", "lfq"),
        )
    if loss.entropy > 0:
        raw["entropy"] = entropy_term(loss, kind, quantized)
    return weighted_sum(raw, {"quantization": loss.codebook, "entropy": loss.entropy})


def entropy_term(loss: ConfigDict, kind: str, quantized: Quantized) -> jax.Array:
    """The entropy loss of a quantiser that looks up one codebook, or of "lfq"."""
    if kind == "lfq":
        return entropy.sign_entropy(quantized.latents, loss.entropy_temperature, loss.entropy_bits)
    return entropy.codebook_entropy(quantized.latents, quantized.codebook, loss.entropy_temperature)
