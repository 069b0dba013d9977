"""What stage 2 trains: the transformer with its conditions, and its optimiser."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from vqgan_jax.conditions.kinds import Conditions
from vqgan_jax.models.transformer import Transformer
from vqgan_jax.training import optimizers
from vqgan_jax.training.game import compute_dtype
from vqgan_jax.training.states import TransformerState, step_key


def make_transformer(config: ConfigDict) -> Transformer:
    """The transformer that a resolved config describes: with codebook size, grid and conditions."""
    model, conditions = config.model, Conditions.from_config(config)
    fields = model.to_dict()
    fields["dtype"] = compute_dtype(fields["dtype"])
    fields["num_kv_heads"] = model.num_kv_heads or model.num_heads
    fields["hidden"] = model.hidden or default_hidden(model.width, model.feed_forward)
    fields["max_length"] = model.max_length or sequence_length(config)
    return Transformer(
        **fields,
        num_conditions=conditions.num_tokens,
        condition_size=conditions.table_size,
        condition_shapes=conditions.shapes,
    )


def sequence_length(config: ConfigDict) -> int:
    """Tokens that the transformer sees: conditions and all codes but the last."""
    return Conditions.from_config(config).num_tokens + math.prod(config.model.grid) - 1


def default_hidden(width: int, feed_forward: str) -> int:
    """4 x width; for SwiGLU, which has three matrices, 8/3 x width up to a multiple of 256."""
    return -(-8 * width // (3 * 256)) * 256 if feed_forward == "swiglu" else 4 * width


@dataclasses.dataclass(frozen=True)
class Learner:
    """Everything about a run of stage 2 that does not change from step to step."""

    config: ConfigDict
    transformer: Transformer
    conditions: Conditions
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
            conditions=Conditions.from_config(config),
            schedule=schedule,
            optimizer=optimizers.make_optimizer(config.optimizer, schedule),
        )

    def init(self) -> TransformerState:
        """The state before the first step, from the seed alone."""
        conditions = jnp.zeros((1, self.conditions.num_tokens), jnp.int32)
        codes = jnp.zeros((1, math.prod(self.config.model.grid)), jnp.int32)
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
