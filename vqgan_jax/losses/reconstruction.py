"""How far a reconstruction is from its image, pixel by pixel. All are means over every value."""

import jax
import jax.numpy as jnp
import optax


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
