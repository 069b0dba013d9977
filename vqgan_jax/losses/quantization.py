"""The losses that pull codes and latents together, and Gumbel's divergence from uniform use."""

import jax
import jax.numpy as jnp


def codebook(latents: jax.Array, vectors: jax.Array) -> jax.Array:
    """mean (sg[z] - e)^2: moves the codes to the latents (van den Oord et al. 2017, eq. 3)."""
    return jnp.mean(jnp.square(jax.lax.stop_gradient(latents) - vectors))


def commitment(latents: jax.Array, vectors: jax.Array) -> jax.Array:
    """mean (z - sg[e])^2: keeps the latents at their codes (van den Oord et al. 2017, eq. 3)."""
    return jnp.mean(jnp.square(latents - jax.lax.stop_gradient(vectors)))


def vector_quantization(
    latents: jax.Array, vectors: jax.Array, beta: float, legacy: bool, codebook_learns: bool = True
) -> jax.Array:
    """codebook + beta x commitment ("Taming Transformers", eq. 4).

    With `legacy`, beta is on the codebook term, as in every model that the reference published;
    the value is the same, the gradients are not. Where the codebook does not learn by gradient
    (`codebook_learns` False: a moving average), beta x commitment alone.
    """
    if not codebook_learns:
        return beta * commitment(latents, vectors)
    if legacy:
        return commitment(latents, vectors) + beta * codebook(latents, vectors)
    return codebook(latents, vectors) + beta * commitment(latents, vectors)


def divergence_from_uniform(logits: jax.Array) -> jax.Array:
    """KL(q || uniform) = sum_k q_k log(K q_k), mean over positions; q is softmax(logits).

    The prior term of a Gumbel-softmax tokenizer (Ramesh et al. 2021, section 2.1).
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    uniform = probabilities * logits.shape[-1]
    return jnp.mean(jnp.sum(probabilities * jnp.log(uniform + 1e-10), axis=-1))
