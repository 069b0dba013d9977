"""Adam as the reference has it, with schedules, clipping and weight decay as options."""

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


def peak_learning_rate(optimizer: ConfigDict, batch_size: int) -> float:
    """The config's learning rate, or the reference's rule: base rate x images an update."""
    return optimizer.learning_rate or optimizer.base_learning_rate * batch_size


def learning_rate_schedule(optimizer: ConfigDict, peak: float, num_steps: int) -> optax.Schedule:
    """Linear warm-up from 0, the peak until `decay_start`, then down to `end_factor` x peak.

    Down by half a cosine or exponentially, over the steps that are left; or "constant" to the end.
    """
    warmup_steps = optimizer.warmup_steps
    start = max(optimizer.decay_start, warmup_steps)
    decay_steps, end_factor = max(1, num_steps - start), optimizer.end_factor
    pieces = [optax.constant_schedule(peak)]
    boundaries = []
    if warmup_steps > 0:
        pieces.insert(0, optax.linear_schedule(0.0, peak, warmup_steps))
        boundaries.append(warmup_steps)
    if optimizer.schedule == "cosine":
        pieces.append(optax.cosine_decay_schedule(peak, decay_steps, end_factor))
        boundaries.append(start)
    elif optimizer.schedule == "exponential":
        pieces.append(
            optax.exponential_decay(peak, decay_steps, end_factor, end_value=end_factor * peak)
        )
        boundaries.append(start)
    return optax.join_schedules(pieces, boundaries)


def make_optimizer(optimizer: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clipping, Adam, decoupled weight decay (kernels only), learning rate; in that order.

    The first moment may be kept in bfloat16. ViT-VQGAN's second stage keeps it in 8 bits, and the
    second moment as the product of a row and a column ("Adafactor", Shazeer and Stern 2018): less
    memory still than here, where the second moment is whole and the update nearer to Adam's.
    """
    parts = []
    if optimizer.clip_norm > 0:
        parts.append(optax.clip_by_global_norm(optimizer.clip_norm))
    narrow = jnp.bfloat16 if optimizer.first_moment == "bfloat16" else None
    parts.append(optax.scale_by_adam(optimizer.b1, optimizer.b2, optimizer.eps, mu_dtype=narrow))
    if optimizer.weight_decay > 0:
        parts.append(optax.add_decayed_weights(optimizer.weight_decay, mask=_kernels))
    parts.append(optax.scale_by_learning_rate(schedule))
    return optax.chain(*parts)


def _kernels(params):
    """True for matrices and convolution kernels; not for biases, norms and the codebook."""
    return jax.tree.map_with_path(
        lambda path, _: getattr(path[-1], "key", None) == "kernel", params
    )


def temperature_schedule(temperature: ConfigDict) -> optax.Schedule:
    """The Gumbel-softmax temperature: linear from `start` to `peak`, then cosine to `end`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=temperature.start,
        peak_value=temperature.peak,
        warmup_steps=temperature.warmup_steps,
        decay_steps=temperature.decay_steps,
        end_value=temperature.end,
    )


def update_moving_average(average, params, step: jax.Array, decay: float):
    """The exponential moving average of parameters after update `step` (from 0).

    The decay starts lower, min(decay, (1 + step) / (10 + step)), so that a short run's average
    is not its random start.
    """
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda a, p: decay * a + (1.0 - decay) * p, average, params)
