"""The step of stage 2: next-code cross-entropy ("Taming Transformers", equation 10)."""

import math

import jax
import jax.numpy as jnp
import optax

from vqgan_jax.training.accumulation import accumulate
from vqgan_jax.training.learner import Learner
from vqgan_jax.training.optimizers import update_moving_average
from vqgan_jax.training.states import TransformerState, micro_batch_keys


def transformer_step(learner: Learner, state: TransformerState, batch):
    """One update of the transformer.

    Args:
        learner: what does not change from step to step.
        state: before the update.
        batch: `codes`, `(B, N)` int32, in the order of rows, and what its conditions read.

    Returns:
        The state after it, and metrics.
    """
    config = learner.config

    def micro_batch(carry, batch, index):
        (loss, metrics), gradients = jax.value_and_grad(objective, argnums=1, has_aux=True)(
            learner, state.params, batch, keys=micro_batch_keys(config.seed, state.step, index)
        )
        return carry, gradients, metrics | {"loss/cross_entropy": loss}, None

    _, gradients, metrics, _ = accumulate(
        micro_batch, None, state.params, batch, config.optimizer.accumulate
    )
    updates, opt_state = learner.optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = state.ema_params
    if ema_params is not None:
        ema_params = update_moving_average(
            ema_params, params, state.step, config.optimizer.ema_decay
        )
    metrics |= {
        "gradient_norm": optax.tree.norm(gradients),
        "learning_rate": learner.schedule(state.step),
        "bits_per_code": metrics["loss/cross_entropy"] / math.log(2.0),
        "perplexity": jnp.exp(metrics["loss/cross_entropy"]),
    }
    return TransformerState(state.step + 1, params, opt_state, ema_params), metrics


def objective(learner: Learner, params, batch, keys):
    """Mean cross-entropy of all codes in nats, and metrics, with what training adds.

    A share of the codes that the model sees is replaced by random ones, so that it learns to go on
    from its own mistakes (`training.pkeep`); the codes to predict stay as they are. A share of the
    conditions is left out, for guidance (`condition.dropout`).
    """
    config, codes = learner.config, batch["codes"]
    dropped = False
    if config.condition.dropout > 0.0:
        shape = codes.shape[:1]
        dropped = jax.random.bernoulli(keys["condition"], config.condition.dropout, shape)
    seen = codes
    if config.training.pkeep < 1.0:
        keep_key, code_key = jax.random.split(keys["corruption"])
        keep = jax.random.bernoulli(keep_key, config.training.pkeep, codes.shape)
        size = config.model.codebook_size
        seen = jnp.where(keep, codes, jax.random.randint(code_key, codes.shape, 0, size))
    logits = learner.transformer.apply(
        {"params": params},
        learner.conditions.tokens(batch, dropped),
        seen,
        train=True,
        rngs={"dropout": keys["dropout"]},
    )
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, codes).mean()
    return loss, {"accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == codes)}


def transformer_evaluation_step(learner: Learner, params, batch, mask):
    """Sums over a batch: cross-entropy and right predictions a code, and how many images count.

    Args:
        learner: what does not change from step to step.
        params: for inference.
        batch: as of `transformer_step`.
        mask: `(B,)`, 0 for rows that do not count.
    """
    codes, conditions = batch["codes"], learner.conditions.tokens(batch)
    logits = learner.transformer.apply({"params": params}, conditions, codes)
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, codes).mean(axis=-1)
    right = jnp.mean(jnp.argmax(logits, axis=-1) == codes, axis=-1)
    return {
        "cross_entropy": jnp.sum(jnp.where(mask > 0, loss, 0.0)),
        "accuracy": jnp.sum(jnp.where(mask > 0, right, 0.0)),
        "images": jnp.sum(mask),
    }
