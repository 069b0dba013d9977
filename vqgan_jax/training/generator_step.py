"""The generator's step of stage 1 ("Taming Transformers", 3.1, equations 4 to 7).

There is one backward pass. The gradients of the reconstruction loss and of the adversarial loss are
taken at the last layer's output and pushed through that layer, where their norms give the adaptive
weight; their weighted sum then goes once through everything else.
"""

import flax.struct
import jax
import jax.numpy as jnp
import optax

from vqgan_jax.data.images import prepare_images
from vqgan_jax.losses import adversarial
from vqgan_jax.metrics.codebook import code_counts, perplexity, usage
from vqgan_jax.training.accumulation import accumulate
from vqgan_jax.training.freezing import frozen_parts, without_gradient
from vqgan_jax.training.game import Game
from vqgan_jax.training.objectives import quantization_objective, reconstruction_objective
from vqgan_jax.training.optimizers import update_moving_average
from vqgan_jax.training.states import TokenizerState, micro_batch_keys


def generator_step(game: Game, state: TokenizerState, images, perceptual_params, *, playing: bool):
    """One update of the tokenizer.

    Args:
        game: what does not change from step to step.
        state: both players before the update.
        images: `(B, H, W, 3)` uint8 or float in [-1, 1]; label maps `(B, H, W)` of integers.
        perceptual_params: LPIPS parameters; None where its weight is 0.
        playing: whether the adversarial game has started (`game.plays(step)`). It is static: the
            program without the game computes nothing of it.

    Returns:
        The state after it, metrics, and the reconstructions `(B, H, W, C)` float32 that the update
        was computed from.
    """
    generator, discriminator = state.generator, state.discriminator

    def micro_batch(running, images, index):
        images = prepare_images(game.config, images)
        return generator_gradients(game, state, running, images, index, perceptual_params, playing)

    running = Running(generator.codebook, discriminator.batch_stats if discriminator else {})
    running, gradients, metrics, reconstructions = accumulate(
        micro_batch, running, generator.params, images, game.config.optimizer.accumulate
    )
    updates, opt_state = game.generator_optimizer.update(
        gradients, generator.opt_state, generator.params
    )
    frozen = frozen_parts(game.config, generator.params)
    params = optax.apply_updates(generator.params, updates) | frozen
    ema_params = generator.ema_params
    if ema_params is not None:
        decay = game.config.optimizer.ema_decay
        ema_params = update_moving_average(ema_params, params, state.step, decay) | frozen
    metrics["gradient_norm/generator"] = optax.tree.norm(gradients)
    metrics["learning_rate/generator"] = game.generator_schedule(state.step)

    generator = generator.replace(
        params=params, codebook=running.codebook, opt_state=opt_state, ema_params=ema_params
    )
    if discriminator is not None:
        discriminator = discriminator.replace(batch_stats=running.batch_stats)
    return TokenizerState(state.step + 1, generator, discriminator), metrics, reconstructions


@flax.struct.dataclass
class Running:
    """Statistics that each micro-batch moves on."""

    codebook: dict
    batch_stats: dict


@flax.struct.dataclass
class Adversarial:
    """The adversarial term of the generator's loss, and its gradients."""

    loss: jax.Array
    weight: jax.Array  # before the share of warm-up
    cotangent: jax.Array  # at the reconstruction, (B, H, W, C)
    layer_gradient: dict  # at the last layer
    batch_stats: dict


def generator_gradients(
    game: Game,
    state: TokenizerState,
    running: Running,
    images,
    index,
    perceptual_params,
    playing: bool,
):
    """Gradients of the generator's whole loss on micro-batch `index` of prepared images.

    Returns:
        Moved statistics, gradients, metrics, reconstructions.
    """
    tokenizer, config = game.tokenizer, game.config

    def features_and_quantization(params):
        (features, quantized), updates = tokenizer.apply(
            {"params": without_gradient(config, params), "codebook": running.codebook},
            images,
            train=True,
            temperature=game.temperature(state.step),
            method="features",
            rngs=micro_batch_keys(game.config.seed, state.step, index),
            mutable=["codebook"],
        )
        loss, terms = quantization_objective(config.loss, config.model.quantizer.kind, quantized)
        return (features, loss), (updates.get("codebook", {}), quantized.codes, terms)

    (features, quantization_loss), pull_to_params, (codebook, codes, quantization_terms) = jax.vjp(
        features_and_quantization, state.generator.params, has_aux=True
    )
    output, pull_to_layer = jax.vjp(
        lambda layer, features: tokenizer.apply(
            {"params": tokenizer.only_last_layer(layer)}, features, method="output"
        ),
        tokenizer.last_layer(state.generator.params),
        features,
    )
    reconstructions, pull_to_output = jax.vjp(tokenizer.to_images, output)

    def objective(output):
        key = micro_batch_keys(game.config.seed, state.step, index)["perceptual"]
        return reconstruction_objective(
            config.loss,
            game.perceptual,
            perceptual_params,
            images,
            tokenizer.to_images(output),
            output,
            key,
        )

    (reconstruction_loss, reconstruction_terms), cotangent = jax.value_and_grad(
        objective, has_aux=True
    )(output)
    layer_gradient = pull_to_layer(cotangent)[0]

    total = reconstruction_loss + quantization_loss
    metrics = quantization_terms | reconstruction_terms
    if playing:
        term = adversarial_term(
            game,
            state,
            running.batch_stats,
            reconstructions,
            layer_gradient,
            lambda cotangent: pull_to_layer(*pull_to_output(cotangent)),
        )
        share = adversarial_share(game, state.step)
        scale = share * term.weight
        total += scale * term.loss
        cotangent += scale * pull_to_output(term.cotangent)[0]
        layer_gradient = jax.tree.map(
            lambda a, b: a + scale * b, layer_gradient, term.layer_gradient
        )
        running = running.replace(batch_stats=term.batch_stats)
        metrics |= {
            "raw/adversarial": term.loss,
            "weighted/adversarial": scale * term.loss,
            "adversarial_weight": term.weight,
            "adversarial_share": share,
        }

    features_cotangent = pull_to_layer(cotangent)[1]
    (gradients,) = pull_to_params((features_cotangent, jnp.ones_like(quantization_loss)))
    gradients = tokenizer.with_last_layer(gradients, layer_gradient)
    quantizer = config.model.quantizer
    counts = code_counts(codes, quantizer.codebook_size, depth=quantizer.depth)
    metrics |= {
        "loss/total": total,
        "loss/reconstruction": reconstruction_loss,
        "loss/quantization": quantization_loss,
        "batch_codebook/usage": usage(counts),
        "batch_codebook/perplexity": perplexity(counts),
    }
    return running.replace(codebook=codebook), gradients, metrics, reconstructions


def adversarial_term(
    game: Game, state: TokenizerState, batch_stats, reconstructions, layer_gradient, pull_to_layer
) -> Adversarial:
    """The generator's adversarial loss with the adaptive weight (equations 6 and 7)."""
    config = game.config.discriminator

    def loss(reconstructions):
        logits, updates = game.discriminator.apply(
            {"params": state.discriminator.params, "batch_stats": batch_stats},
            reconstructions,
            train=True,
            mutable=["batch_stats"],
        )
        return adversarial.generator_loss(config.loss, logits), updates.get("batch_stats", {})

    (value, moved), cotangent = jax.value_and_grad(loss, has_aux=True)(reconstructions)
    gradient = pull_to_layer(cotangent)[0]
    weight = jnp.asarray(config.weight)
    if config.adaptive_weight:
        weight *= adversarial.adaptive_weight(
            layer_gradient["kernel"],
            gradient["kernel"],
            config.adaptive_delta,
            config.adaptive_max,
        )
    return Adversarial(value, weight, cotangent, gradient, moved)


def adversarial_share(game: Game, step) -> jax.Array:
    """How much of the adversarial terms counts at generator step `step`, for both players."""
    config = game.config.discriminator
    return config.factor * adversarial.ramp(step, config.start, config.warmup_steps)
