"""The two players' losses on the discriminator's logits, and what balances them.

Logits are high for real. The generator's loss is -mean D(x') for hinge and vanilla alike, as the
reference has it; "non_saturating" is mean softplus(-D(x')) (Goodfellow et al. 2014, section 3), the
loss of StyleGAN2 and so of ViT-VQGAN.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def generator_loss(kind: str, fake_logits: jax.Array) -> jax.Array:
    """What the generator minimises, from the logits of its reconstructions."""
    if kind in ("hinge", "vanilla"):
        return -jnp.mean(fake_logits)
    if kind == "non_saturating":
        return jnp.mean(jax.nn.softplus(-fake_logits))
    raise ValueError(f"unknown adversarial loss {kind!r}")


def discriminator_loss(kind: str, real_logits: jax.Array, fake_logits: jax.Array) -> jax.Array:
    """What the discriminator minimises; 1 for hinge at logits of zero.

    hinge: (mean relu(1 - real) + mean relu(1 + fake)) / 2 (Lim and Ye 2017);
    vanilla: (mean softplus(-real) + mean softplus(fake)) / 2;
    non_saturating: mean softplus(-real) + mean softplus(fake), without the reference's half, as
    StyleGAN2 has it: the half would double the share of a published R1 weight.
    """
    if kind == "hinge":
        real, fake = jax.nn.relu(1.0 - real_logits), jax.nn.relu(1.0 + fake_logits)
    elif kind in ("vanilla", "non_saturating"):
        real, fake = jax.nn.softplus(-real_logits), jax.nn.softplus(fake_logits)
    else:
        raise ValueError(f"unknown adversarial loss {kind!r}")
    scale = 1.0 if kind == "non_saturating" else 0.5
    return scale * (jnp.mean(real) + jnp.mean(fake))


def r1(discriminator: Callable[[jax.Array], jax.Array], images: jax.Array) -> jax.Array:
    """E |grad_x D(x)|^2 over real images: R1 without its factor gamma / 2.

    Mescheder et al. 2018, "Which Training Methods for GANs do actually Converge?", eq. 9. D(x) is
    the mean of an image's logits, as the losses take it, and the squares are summed over an image's
    values and averaged over images, so that a weight means the same at any batch size.

    Args:
        discriminator: `(B, H, W, C)` -> logits `(B, h, w, 1)`.
        images: real ones, `(B, H, W, C)`.
    """

    def judge(images):
        return jnp.sum(jnp.mean(discriminator(images), axis=(1, 2, 3)))

    gradients = jax.grad(judge)(images)
    return jnp.mean(jnp.sum(jnp.square(gradients), axis=(1, 2, 3)))


def lecam(
    real_logits: jax.Array, fake_logits: jax.Array, real_average: jax.Array, fake_average: jax.Array
) -> jax.Array:
    """mean relu(real - fake_average)^2 + mean relu(real_average - fake)^2.

    Tseng et al. 2021, "Regularizing GANs under Limited Data", eq. 3; the averages are moving
    averages of the mean logits.
    """
    real = jnp.square(jax.nn.relu(real_logits - fake_average))
    fake = jnp.square(jax.nn.relu(real_average - fake_logits))
    return jnp.mean(real) + jnp.mean(fake)


def adaptive_weight(
    reconstruction_gradient: jax.Array,
    adversarial_gradient: jax.Array,
    delta: float,
    maximum: float,
) -> jax.Array:
    """lambda = |grad_L rec| / (|grad_L adv| + delta), clipped to [0, maximum].

    "Taming Transformers", eq. 7, with gradients at the last layer's kernel L.
    """
    ratio = jnp.linalg.norm(reconstruction_gradient.ravel()) / (
        jnp.linalg.norm(adversarial_gradient.ravel()) + delta
    )
    return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, maximum))


def ramp(step: jax.Array, start: int, warmup_steps: int) -> jax.Array:
    """The adversarial term's share at generator step `step`: 0 before `start`, then up to 1.

    With no warm-up it is 1 from step `start` on; else it rises linearly over `warmup_steps`.
    """
    if warmup_steps == 0:
        return jnp.where(step >= start, 1.0, 0.0)
    return jnp.clip((step - start + 1) / warmup_steps, 0.0, 1.0)
