"""What training carries from step to step, and how it begins."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class GeneratorState:
    """The tokenizer in training."""

    params: Any
    codebook: Any  # the collection of an EMA quantiser; empty for the others
    opt_state: optax.OptState
    ema_params: Any  # None where the config keeps no moving average

    @property
    def inference_variables(self) -> dict:
        """What evaluation and inference use: the moving average where there is one."""
        params = self.params if self.ema_params is None else self.ema_params
        return {"params": params, "codebook": self.codebook}


@flax.struct.dataclass
class DiscriminatorState:
    """The other player."""

    params: Any
    batch_stats: Any  # running statistics of BatchNorm; empty for other norms
    opt_state: optax.OptState
    logit_averages: jax.Array  # (2,): moving averages of the mean real and fake logit, for LeCam


@flax.struct.dataclass
class TokenizerState:
    """Both players and the number of generator steps taken."""

    step: jax.Array
    generator: GeneratorState
    discriminator: DiscriminatorState | None


@flax.struct.dataclass
class TransformerState:
    """The transformer in training."""

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    ema_params: Any  # None where the config keeps no moving average

    @property
    def inference_params(self):
        """What evaluation and sampling use: the moving average where there is one."""
        return self.params if self.ema_params is None else self.ema_params


def step_key(seed: int, step: jax.Array, stream: str) -> jax.Array:
    """The random key of one purpose at one step: a pure function of (seed, step, stream)."""
    key = jax.random.fold_in(jax.random.key(seed), STREAMS.index(stream))
    return jax.random.fold_in(key, jnp.asarray(step, jnp.uint32))


def micro_batch_keys(seed: int, step: jax.Array, index: int | jax.Array) -> dict[str, jax.Array]:
    """The random keys of micro-batch `index` of a step, one of each stream."""
    return {stream: jax.random.fold_in(step_key(seed, step, stream), index) for stream in STREAMS}


STREAMS = (  # the place of a name is part of its key: new ones go to the end
    "params",
    "dropout",
    "gumbel",
    "codebook",
    "perceptual",
    "corruption",
    "condition",
)
