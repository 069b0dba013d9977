"""What stage 2 trains: the transformer, its optimiser, and how labels become conditions."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from vqgan_jax.models.transformer import Transformer
from vqgan_jax.training import optimizers
from vqgan_jax.training.game import compute_dtype
from vqgan_jax.training.states import TransformerState, step_key


def make_transformer(config: ConfigDict) -> Transformer:
    """The transformer that a resolved config describes: with codebook size, grid and classes."""
    model, condition = config.model, config.condition
    fields = model.to_dict()
    fields["dtype"] = compute_dtype(fields["dtype"])
    fields["num_kv_heads"] = model.num_kv_heads or model.num_heads
    fields["hidden"] = model.hidden or default_hidden(model.width, model.feed_forward)
    rows, columns = model.grid
    fields["max_length"] = model.max_length or rows * columns
    return Transformer(
        **fields,
        num_conditions=1,
        condition_size=condition.num_classes + 1 if condition.own_table else 0,
    )


def default_hidden(width: int, feed_forward: str) -> int:
    """4 x width; for SwiGLU, which has three matrices, 8/3 x width up to a multiple of 256."""
    return -(-8 * width // (3 * 256)) * 256 if feed_forward == "swiglu" else 4 * width


def make_conditions(condition: ConfigDict, labels: jax.Array) -> jax.Array:
    """Classes `(B,)` -> condition tokens `(B, 1)`; a class of -1 is no condition.

    With a table of their own, token `num_classes` is no condition; in the codes' table, where class
    k and code k share a row, it is that number too, and for unconditional models the start token.
    """
    if condition.kind == "none":
        null = 0 if condition.own_table else condition.start_token
        return jnp.full((labels.shape[0], 1), null, jnp.int32)
    return jnp.where(labels < 0, condition.num_classes, labels)[:, None].astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Learner:
    """Everything about a run of stage 2 that does not change from step to step."""

    config: ConfigDict
    transformer: Transformer
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Learner":
        """The learner that a transformer's resolved config describes."""
        peak = optimizers.peak_learning_rate(config.optimizer, config.training.batch_size)
        schedule = optimizers.learning_rate_schedule(
            config.optimizer, peak, config.training.num_steps
        )
        return cls(
            config=config,
            transformer=make_transformer(config),
            schedule=schedule,
            optimizer=optimizers.make_optimizer(config.optimizer, schedule),
        )

    def init(self) -> TransformerState:
        """The state before the first step, from the seed alone."""
        rows, columns = self.config.model.grid
        conditions, codes = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, rows * columns), jnp.int32)
        key = step_key(self.config.seed, 0, "params")
        return self.init_from(self.transformer.init(key, conditions, codes)["params"])

    def init_from(self, params) -> TransformerState:
        """The state around given parameters, the optimiser fresh."""
        keep_average = self.config.optimizer.ema_decay > 0
        return TransformerState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self.optimizer.init(params),
            ema_params=jax.tree.map(jnp.copy, params) if keep_average else None,
        )
