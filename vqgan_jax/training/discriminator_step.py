"""The discriminator's step of stage 1 ("Taming Transformers", equation 5)."""

import flax.struct
import jax
import jax.numpy as jnp
import optax

from vqgan_jax.data.images import prepare_images
from vqgan_jax.losses import adversarial
from vqgan_jax.training.accumulation import accumulate
from vqgan_jax.training.game import Game
from vqgan_jax.training.generator_step import adversarial_share
from vqgan_jax.training.states import TokenizerState, micro_batch_keys


def discriminator_step(
    game: Game,
    state: TokenizerState,
    images,
    reconstructions,
    *,
    playing: bool,
    regularizing: bool = False,
):
    """One update of the discriminator, after the generator's step on the same images.

    Args:
        game: what does not change from step to step.
        state: both players, as `generator_step` returned them.
        images: as `generator_step` takes them.
        reconstructions: what `generator_step` returned; with the config's
            `discriminator.refresh_reconstruction` the updated generator makes them anew.
        playing: whether the adversarial game has started (static). Before it does, gradients are
            zero; only the optimiser counts its steps, as the reference's does.
        regularizing: whether this update has the R1 term (`game.regularizes(step)`). It is static
            too: the program without it computes nothing of it.

    Returns:
        The state after it, and metrics.
    """
    discriminator = state.discriminator
    step = state.step - 1  # the generator's step that this one belongs to

    def micro_batch(running, batch, index):
        images, reconstructions = batch
        images = prepare_images(game.config, images)
        if game.config.discriminator.refresh_reconstruction:
            reconstructions = _refreshed(game, state, images, index)
        return discriminator_gradients(
            game, state, step, running, images, reconstructions, regularizing
        )

    running = Running(discriminator.batch_stats, discriminator.logit_averages)
    gradients, metrics = jax.tree.map(jnp.zeros_like, discriminator.params), {}
    if playing:
        running, gradients, metrics, _ = accumulate(
            micro_batch,
            running,
            discriminator.params,
            (images, reconstructions),
            game.config.optimizer.accumulate,
        )
    updates, opt_state = game.discriminator_optimizer.update(
        gradients, discriminator.opt_state, discriminator.params
    )
    metrics["gradient_norm/discriminator"] = optax.tree.norm(gradients)
    metrics["learning_rate/discriminator"] = game.discriminator_schedule(step)
    discriminator = discriminator.replace(
        params=optax.apply_updates(discriminator.params, updates),
        batch_stats=running.batch_stats,
        opt_state=opt_state,
        logit_averages=running.logit_averages,
    )
    return state.replace(discriminator=discriminator), metrics


@flax.struct.dataclass
class Running:
    """Statistics that each micro-batch moves on."""

    batch_stats: dict
    logit_averages: jax.Array


def discriminator_gradients(
    game: Game,
    state: TokenizerState,
    step,
    running: Running,
    images,
    reconstructions,
    regularizing: bool = False,
):
    """Gradients of the discriminator's loss on one micro-batch.

    Real and fake go through the discriminator one after the other, as in the reference, so that
    BatchNorm sees each by itself.

    R1 is lazy (Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN", B): it
    comes every `r1_interval` updates and counts so many times as much. StyleGAN2 makes it an update
    of its own, and lowers learning rate and betas for the updates that are more by it. Here it goes
    into the same update as the loss, so their number is what it was and both stay as they are. The
    networks in it are those that play, BatchNorm with the batch's statistics, and it moves no
    running ones.

    Returns:
        Moved statistics, gradients, metrics, and None for outputs.
    """
    config = game.config.discriminator
    real_average, fake_average = running.logit_averages

    def logits_of(params, images, batch_stats):
        logits, updates = game.discriminator.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        return logits, updates.get("batch_stats", {})

    def loss(params):
        real, moved = logits_of(params, images, running.batch_stats)
        fake, moved = logits_of(params, reconstructions, moved)
        raw = adversarial.discriminator_loss(config.loss, real, fake)
        total = adversarial_share(game, step) * raw
        metrics = {
            "raw/discriminator": raw,
            "logits/real": jnp.mean(real),
            "logits/fake": jnp.mean(fake),
        }
        if config.lecam > 0:
            metrics["raw/lecam"] = adversarial.lecam(real, fake, real_average, fake_average)
            metrics["weighted/lecam"] = config.lecam * metrics["raw/lecam"]
            total += metrics["weighted/lecam"]
        if regularizing:
            metrics["raw/r1"] = adversarial.r1(
                lambda images: logits_of(params, images, running.batch_stats)[0], images
            )
            metrics["weighted/r1"] = config.r1_interval * config.r1 / 2 * metrics["raw/r1"]
            total += metrics["weighted/r1"]
        metrics["loss/discriminator"] = total
        return total, (metrics, moved)

    gradients, (metrics, moved) = jax.grad(loss, has_aux=True)(state.discriminator.params)
    means = jnp.stack([metrics["logits/real"], metrics["logits/fake"]])
    decay = config.lecam_decay
    averages = decay * running.logit_averages + (1.0 - decay) * means
    return Running(moved, averages), gradients, metrics, None


def _refreshed(game: Game, state: TokenizerState, images, index):
    """Reconstructions by the generator as it is now, in training mode."""
    (reconstructions, _), _ = game.tokenizer.apply(
        {"params": state.generator.params, "codebook": state.generator.codebook},
        images,
        train=True,
        temperature=game.temperature(state.step - 1),
        rngs=micro_batch_keys(game.config.seed, state.step - 1, index),
        mutable=["codebook"],
    )
    return reconstructions
