"""What a quantizer gives, and how gradients pass it by although it is a step function."""

import flax.struct
import jax
import jax.numpy as jnp

from vqgan_jax.models.nearest import l2_normalize


@flax.struct.dataclass
class Quantized:
    """What a quantizer makes of latents `(B, h, w, D)`.

    Codes, and only they, have an axis more where a position has several: `(B, h, w, depth)`.
    """

    quantized: jax.Array  # (B, h, w, D) for the decoder; gradients pass on to the latents
    codes: jax.Array  # (B, h, w) or (B, h, w, depth) int32
    latents: jax.Array  # (B, h, w, D) float32, as they were compared with the codes
    vectors: jax.Array  # (B, h, w, D) float32, the codebook's rows; like latents, (B, h, w, depth,
    #                     D) of residual codes: what each step was given and what it found
    logits: jax.Array | None = None  # (B, h, w, K), Gumbel only
    codebook: jax.Array | None = None  # (K, D), all rows, where one codebook is looked up


def straight_through(latents: jax.Array, vectors: jax.Array) -> jax.Array:
    """The value of `vectors` with the gradient of `latents` (van den Oord et al. 2017, 3.2)."""
    return latents + jax.lax.stop_gradient(vectors - latents)


def rotation(latents: jax.Array, vectors: jax.Array) -> jax.Array:
    """The value of `vectors` with the gradient of a rotation and scaling of `latents`.

    q = sg[(|q| / |z|) R] z, where R turns z into q in their plane:
    R = I - 2 r r^T + 2 q^ z^^T with z^ = z / |z|, q^ = q / |q| and r = (z^ + q^) / |z^ + q^|
    (Fifty et al. 2024, "Restructuring Vector Quantization with the Rotation Trick"). A
    gradient so keeps its angle to the vector that it arrives at. The scale is 1 for a latent
    shorter than 1e-6, which has no direction.
    """
    z, q = jax.lax.stop_gradient((latents, vectors))
    z_unit, q_unit = l2_normalize(z), l2_normalize(q)
    between = l2_normalize(z_unit + q_unit)

    def along(direction):
        return jnp.sum(direction * latents, axis=-1, keepdims=True)

    def length(vectors):
        return jnp.sqrt(jnp.sum(jnp.square(vectors), axis=-1, keepdims=True))

    rotated = latents - 2.0 * between * along(between) + 2.0 * q_unit * along(z_unit)
    scale = jnp.where(length(z) < 1e-6, 1.0, length(q) / jnp.maximum(length(z), 1e-6))
    scaled = scale * rotated
    return scaled + jax.lax.stop_gradient(vectors - scaled)


def with_gradient(gradient: str, latents: jax.Array, vectors: jax.Array) -> jax.Array:
    """The value of `vectors`, with a gradient to `latents` by `straight_through` or `rotation`."""
    estimators = {"straight_through": straight_through, "rotation": rotation}
    return estimators[gradient](latents, vectors)
