"""The players of stage 1 and what they play with: networks, optimisers, schedules."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from vqgan_jax.models.discriminator import PatchDiscriminator
from vqgan_jax.models.lpips import LPIPS
from vqgan_jax.models.stylegan_discriminator import StyleGANDiscriminator
from vqgan_jax.models.target import backend
from vqgan_jax.models.vqgan import VQGAN
from vqgan_jax.training import freezing, optimizers
from vqgan_jax.training.states import (
    DiscriminatorState,
    GeneratorState,
    TokenizerState,
    step_key,
)


def compute_dtype(name: str) -> jnp.dtype:
    """The computation's dtype; "auto" is bfloat16 on accelerators and float32 on the CPU."""
    if name == "auto":
        name = "float32" if backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def make_vqgan(model: ConfigDict) -> VQGAN:
    """The tokenizer that a config's `model` describes."""
    return VQGAN.from_config(model.to_dict(), compute_dtype(model.dtype))


def make_discriminator(
    discriminator: ConfigDict, dtype: jnp.dtype
) -> PatchDiscriminator | StyleGANDiscriminator:
    """The other player, that a config's `discriminator` describes."""
    if discriminator.kind == "stylegan":
        return StyleGANDiscriminator(
            base_channels=discriminator.base_channels,
            max_channels=discriminator.max_channels,
            group_size=discriminator.group_size,
            dtype=dtype,
        )
    return PatchDiscriminator(
        channels=discriminator.channels,
        num_layers=discriminator.num_layers,
        norm=discriminator.norm,
        dtype=dtype,
    )


@dataclasses.dataclass(frozen=True)
class Game:
    """Everything about a run that does not change from step to step."""

    config: ConfigDict
    tokenizer: VQGAN
    discriminator: PatchDiscriminator | StyleGANDiscriminator
    perceptual: LPIPS
    generator_schedule: optax.Schedule
    discriminator_schedule: optax.Schedule
    generator_optimizer: optax.GradientTransformation
    discriminator_optimizer: optax.GradientTransformation
    temperature: optax.Schedule

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Game":
        """The game that a tokenizer's config describes."""
        dtype = compute_dtype(config.model.dtype)
        optimizer, training = config.optimizer, config.training
        peak = optimizers.peak_learning_rate(optimizer, training.batch_size)
        schedules = [
            optimizers.learning_rate_schedule(optimizer, rate, training.num_steps)
            for rate in (peak, optimizer.discriminator_learning_rate or peak)
        ]
        return cls(
            config=config,
            tokenizer=make_vqgan(config.model).clone(frozen=tuple(training.freeze)),
            discriminator=make_discriminator(config.discriminator, dtype),
            perceptual=LPIPS(config.loss.perceptual_network.backbone, dtype=dtype),
            generator_schedule=schedules[0],
            discriminator_schedule=schedules[1],
            generator_optimizer=freezing.of_trained_parts(
                config, optimizers.make_optimizer(optimizer, schedules[0])
            ),
            discriminator_optimizer=optimizers.make_optimizer(optimizer, schedules[1]),
            temperature=optimizers.temperature_schedule(config.temperature),
        )

    def plays(self, step: int) -> bool:
        """Whether the adversarial game is computed at generator step `step` (from 0)."""
        config = self.config.discriminator
        return config.enabled and step >= config.start

    def regularizes(self, step: int) -> bool:
        """Whether the discriminator's update at generator step `step` (from 0) has the R1 term."""
        config = self.config.discriminator
        return self.plays(step) and config.r1 > 0 and (step + 1) % config.r1_interval == 0

    def init(self, images: jax.Array) -> TokenizerState:
        """The state before the first step; `images` are the first batch, in [-1, 1].

        ActNorm and k-means start from these images; everything else from the seed alone.
        """
        key = step_key(self.config.seed, 0, "params")
        tokenizer_key, discriminator_key = jax.random.split(key)
        generator = self.init_generator(self.tokenizer.init(tokenizer_key, images))
        discriminator = None
        if self.config.discriminator.enabled:
            variables = self.discriminator.init(discriminator_key, images, train=True)
            discriminator = self.init_discriminator(variables)
        return TokenizerState(jnp.zeros((), jnp.int32), generator, discriminator)

    def init_generator(self, variables) -> GeneratorState:
        """The generator's state around given variables, its optimiser fresh."""
        params = variables["params"]
        keep_average = self.config.optimizer.ema_decay > 0
        return GeneratorState(
            params=params,
            codebook=variables.get("codebook", {}),
            opt_state=self.generator_optimizer.init(params),
            ema_params=jax.tree.map(jnp.copy, params) if keep_average else None,
        )

    def init_discriminator(self, variables) -> DiscriminatorState:
        """The discriminator's state around given variables, its optimiser fresh."""
        params = variables["params"]
        return DiscriminatorState(
            params=params,
            batch_stats=variables.get("batch_stats", {}),
            opt_state=self.discriminator_optimizer.init(params),
            logit_averages=jnp.zeros(2),
        )
