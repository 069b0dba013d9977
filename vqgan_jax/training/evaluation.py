"""How good a tokenizer is, over the whole validation split."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vqgan_jax.data.images import prepare_images
from vqgan_jax.losses.reconstruction import logit_laplace
from vqgan_jax.metrics.codebook import code_counts, perplexity, usage
from vqgan_jax.metrics.reconstruction import as_8_bit, psnr, ssim
from vqgan_jax.training.game import Game
from vqgan_jax.training.objectives import uses_perceptual


def reconstruction_figures(
    game: Game, perceptual_params, images: jax.Array, reconstructions: jax.Array
) -> dict[str, jax.Array]:
    """Figures `(B,)` of each image: PSNR, SSIM, L1, L2 and LPIPS, on images rounded to 8 bits.

    For label maps: binary cross-entropy and the share of pixels whose label is right.
    `reconstruction_loss` is the weighted sum that training minimises; the logit-Laplace term, which
    needs more than a reconstruction, is added by `evaluation_step`.

    Args:
        game: the networks and the config.
        perceptual_params: of LPIPS; None where the config has no perceptual term.
        images: `(B, H, W, C)` in [-1, 1], or one-hot label maps.
        reconstructions: the same shape; logits for label maps.
    """
    loss = game.config.loss
    if loss.binary_cross_entropy > 0:
        entropy = optax.losses.sigmoid_binary_cross_entropy(reconstructions, images)
        agree = jnp.argmax(images, axis=-1) == jnp.argmax(reconstructions, axis=-1)
        terms = {"binary_cross_entropy": entropy.mean(axis=(1, 2, 3))}
        figures = {"pixel_accuracy": agree.mean(axis=(1, 2))}
    else:
        images, reconstructions = as_8_bit(images), as_8_bit(reconstructions)
        difference = images - reconstructions
        terms = {
            "l1": jnp.abs(difference).mean(axis=(1, 2, 3)),
            "l2": jnp.square(difference).mean(axis=(1, 2, 3)),
        }
        figures = {"psnr": psnr(images, reconstructions), "ssim": ssim(images, reconstructions)}
        if uses_perceptual(loss):
            terms["perceptual"] = game.perceptual.apply(
                {"params": perceptual_params}, images, reconstructions
            )
            figures["lpips"] = terms["perceptual"]
    figures["reconstruction_loss"] = sum(loss[name] * value for name, value in terms.items())
    return figures | {name: value for name, value in terms.items() if name != "perceptual"}


def evaluation_step(game: Game, variables, perceptual_params, images, mask):
    """Sums of the figures over a batch, and how often each code was used.

    Args:
        game: the networks and the config.
        variables: the tokenizer's, for inference.
        perceptual_params: of LPIPS; None where the config has no perceptual term.
        images: raw images or label maps `(B, ...)`.
        mask: `(B,)`, 0 for rows that do not count.

    Returns:
        Sums by name, the number of images that count under "images"; and the `code_counts`.
    """
    images = prepare_images(game.config, images)
    output, quantized = game.tokenizer.apply(variables, images, method="predict")
    reconstructions = game.tokenizer.to_images(output)
    figures = reconstruction_figures(game, perceptual_params, images, reconstructions)
    weight = game.config.loss.logit_laplace
    if weight > 0:
        figures["logit_laplace"] = logit_laplace(images, output).mean(axis=(1, 2, 3))
        figures["reconstruction_loss"] += weight * figures["logit_laplace"]
    sums = {name: jnp.sum(jnp.where(mask > 0, value, 0.0)) for name, value in figures.items()}
    quantizer = game.config.model.quantizer
    counts = code_counts(quantized.codes, quantizer.codebook_size, mask > 0, quantizer.depth)
    return sums | {"images": jnp.sum(mask)}, counts


def evaluate(evaluation_step, batches: Iterable, variables, perceptual_params) -> dict[str, float]:
    """Means over all images of `batches`, with codebook usage and perplexity over all of them.

    Args:
        evaluation_step: the jitted step, `(variables, perceptual_params, images, mask)`.
        batches: of `(batch, mask)`, as `data.evaluation_batches` gives them.
        variables: the tokenizer's.
        perceptual_params: of LPIPS.
    """
    results = [
        evaluation_step(variables, perceptual_params, batch["image"], mask)
        for batch, mask in batches
    ]
    results = jax.device_get(results)
    sums = jax.tree.map(lambda *values: float(np.sum(values)), *(sums for sums, _ in results))
    counts = np.sum([counts for _, counts in results], axis=0, dtype=np.int64)
    images = sums.pop("images")
    figures = {name: value / images for name, value in sums.items()}
    return figures | {
        "codebook_usage": float(usage(counts)),
        "codebook_perplexity": float(perplexity(counts)),
        "images": images,
    }
