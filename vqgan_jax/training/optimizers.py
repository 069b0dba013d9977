"""Adam as the reference has it, with schedules, clipping and weight decay as options."""

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


def peak_learning_rate(optimizer: ConfigDict, batch_size: int) -> float:
    """The config's learning rate, or the reference's rule: base rate x images an update."""
    return optimizer.learning_rate or optimizer.base_learning_rate * batch_size


def learning_rate_schedule(optimizer: ConfigDict, peak: float, num_steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then constant or cosine down to `end_factor` x peak."""
    warmup_steps = optimizer.warmup_steps
    if optimizer.schedule == "cosine":
        rest = optax.cosine_decay_schedule(
            peak, max(1, num_steps - warmup_steps), optimizer.end_factor
        )
    else:
        rest = optax.constant_schedule(peak)
    if warmup_steps == 0:
        return rest
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, warmup_steps), rest], [warmup_steps]
    )


def make_optimizer(optimizer: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clipping, Adam, decoupled weight decay (kernels only), learning rate; in that order."""
    parts = []
    if optimizer.clip_norm > 0:
        parts.append(optax.clip_by_global_norm(optimizer.clip_norm))
    parts.append(optax.scale_by_adam(optimizer.b1, optimizer.b2, optimizer.eps))
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
