"""How far a reconstruction is from its image, pixel by pixel; means over every value but one."""

import jax
import jax.numpy as jnp
import optax
from jax.scipy.special import logit

from vqgan_jax.models import logit_laplace as distribution


def l1(images: jax.Array, reconstructions: jax.Array) -> jax.Array:
    """mean |x - x'| over images `(B, H, W, C)`."""
    return jnp.mean(jnp.abs(images - reconstructions))


def l2(images: jax.Array, reconstructions: jax.Array) -> jax.Array:
    """mean (x - x')^2 over images `(B, H, W, C)`."""
    return jnp.mean(jnp.square(images - reconstructions))


def binary_cross_entropy(labels: jax.Array, logits: jax.Array) -> jax.Array:
    """Mean binary cross-entropy of one-hot label maps `(B, H, W, num_labels)` against logits.

    The loss of the reference's label-map tokenizer ("Taming Transformers", appendix A).
    """
    return jnp.mean(optax.losses.sigmoid_binary_cross_entropy(logits, labels))


def logit_laplace(images: jax.Array, output: jax.Array) -> jax.Array:
    """-log p of every value of images `(B, H, W, C)` in [-1, 1], in nats.

    Ramesh et al. 2021, appendix A.3, with x in (0.1, 0.9), location mu and scale b:

        |logit(x) - mu| / b + log b + log(2 x (1 - x))

    ViT-VQGAN predicts "the mean" by a sigmoid and does not write where b comes from; its authors'
    other image tokenizers in JAX have the decoder predict both, a log b for every value, and keep
    the last term, which no parameter moves. So does this.

    Args:
        images: what the distribution is of.
        output: the decoder's, `(B, H, W, 2 C)`: mu, then log b.

    Returns:
        `(B, H, W, C)`. It may be negative: p is a density.
    """
    location, log_scale = distribution.split(output)
    x = distribution.to_interval(images)
    distance = jnp.abs(logit(x) - location) * jnp.exp(-log_scale)
    return distance + log_scale + jnp.log(2.0 * x * (1.0 - x))
