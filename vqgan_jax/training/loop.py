"""The training of a tokenizer, from its config to its last checkpoint."""

import contextlib
import functools
import itertools
import json
import pathlib
from collections.abc import Sequence

import jax
from ml_collections import ConfigDict

from vqgan_jax import configuration
from vqgan_jax.data.pipeline import evaluation_batches, evaluation_images, training_batches
from vqgan_jax.data.sources import open_source
from vqgan_jax.interop.lpips import check_lpips, load_lpips
from vqgan_jax.training.checkpoints import CONFIG_FILE, Checkpoints
from vqgan_jax.training.compilation import compile_options, compile_players
from vqgan_jax.training.evaluation import evaluate, evaluation_step
from vqgan_jax.training.game import Game
from vqgan_jax.training.images import prepare_images
from vqgan_jax.training.logging import DeferredMetrics, MetricWriter, check_finite
from vqgan_jax.training.objectives import uses_perceptual
from vqgan_jax.training.pictures import side_by_side
from vqgan_jax.training.progress import Progress
from vqgan_jax.training.sharding import batch_sharding, make_mesh, replicated, state_shardings
from vqgan_jax.training.stopping import Preempted, StopSignal
from vqgan_jax.training.warm_start import start_from

EVALUATION_FILE = "evaluation.json"  # the newest evaluation's figures

# On the terminal; metrics.jsonl has everything.
SHOWN = ("loss/reconstruction", "loss/quantization", "loss/discriminator", "adversarial_weight")
SHOWN_EVALUATION = ("psnr", "ssim", "lpips", "pixel_accuracy", "codebook_usage")


def train_tokenizer(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    devices: Sequence[jax.Device] | None = None,
) -> dict[str, float]:
    """Trains to `config.training.num_steps`, from the newest checkpoint in `workdir` if any.

    Args:
        config: the experiment, as a file of `configs/` makes it.
        workdir: where checkpoints, metrics and pictures go; made if missing.
        devices: what to train on; None for all that there are.

    Returns:
        The figures of the last evaluation.

    Raises:
        ConfigError, DataError, CheckpointError, NonFiniteError: one line for the terminal each.
        Preempted: asked to stop by SIGTERM or SIGINT; the state is saved.
    """
    configuration.validate(config)
    workdir = pathlib.Path(workdir)
    training = config.training
    say = print if jax.process_index() == 0 else lambda *_, **__: None

    # ---- Devices and data: what cannot work ends here, before anything is written or compiled.
    mesh = make_mesh(config.mesh, devices)
    micro_batch_size = training.batch_size // config.optimizer.accumulate
    rows = batch_sharding(mesh, micro_batch_size, "the micro-batch size")
    open_source(
        config.data.name,
        config.data.train_split,
        config.data.data_dir,
        config.data.image_key,
        config.model.resolution,
        label_map=config.data.num_labels > 0,
    )
    pictured = evaluation_images(config, training.grid_images)

    # ---- The two players, and the steps that train and judge them.
    game = Game.from_config(config)
    perceptual_params = perceptual_parameters(game, mesh)
    options = compile_options()
    abstract_state = jax.eval_shape(
        lambda images: game.init(prepare_images(config.data, images)),
        jax.ShapeDtypeStruct((training.batch_size, *pictured.shape[1:]), pictured.dtype),
    )
    layout = state_shardings(abstract_state, config.sharding_rules, mesh)
    whole = replicated(mesh)
    update_generator, update_discriminator = compile_players(game, layout, rows, whole)
    judge = jax.jit(
        functools.partial(evaluation_step, game), out_shardings=whole, compiler_options=options
    )
    picture = jax.jit(
        lambda variables, images: game.tokenizer.apply(
            variables, prepare_images(config.data, images)
        )[0],
        out_shardings=whole,
        compiler_options=options,
    )

    # ---- The state: of the newest checkpoint, or born on the devices from the first batch.
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir, config)))
        restored = checkpoints.restore(
            jax.tree.map(
                lambda leaf, sharding: jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=sharding
                ),
                abstract_state,
                layout,
            )
        )
        start = restored[0] if restored else 0
        evaluation_file = workdir / EVALUATION_FILE
        if start >= training.num_steps and evaluation_file.exists():
            say(f"The run in {workdir} is finished: it has all its {start} steps.")
            return json.loads(evaluation_file.read_text())
        batches = stack.enter_context(
            contextlib.closing(training_batches(config, rows, start_step=start))
        )
        if restored:
            state = restored[1]
            say(f"Going on from step {start} in {workdir}.")
        else:
            first = next(batches)
            state = jax.jit(
                lambda images: game.init(prepare_images(config.data, images)),
                out_shardings=layout,
            )(first["image"])
            if training.initialize_from:
                state = start_from(training.initialize_from, game, state, layout)
        stream = batches if restored else itertools.chain([first], batches)

        writer = stack.enter_context(
            contextlib.closing(
                MetricWriter(
                    workdir,
                    wandb_project=training.wandb_project,
                    config_json=configuration.to_json(config),
                    resume_step=start,
                )
            )
        )
        if jax.process_index() == 0:
            (workdir / CONFIG_FILE).write_text(configuration.to_json(config))
        progress = Progress(training.num_steps, training.batch_size, start)
        deferred = DeferredMetrics()
        # Several processes must agree on the step, so there JAX itself listens for SIGTERM.
        alone = jax.process_count() == 1
        stop_signal = stack.enter_context(StopSignal()) if alone else None

        def log(arrived: tuple[int, dict[str, float]] | None) -> None:
            if arrived is None:
                return
            step, metrics = arrived
            check_finite(step, metrics)
            if step % training.log_every == 0 or step == training.num_steps:
                shown = {name: metrics[name] for name in SHOWN if name in metrics}
                speed = progress.report(step, shown)
                writer.write(step, metrics | speed)

        def evaluate_now(step: int) -> dict[str, float]:
            variables = state.generator.inference_variables
            validation = evaluation_batches(
                config, rows, micro_batch_size, training.evaluation_images
            )
            with contextlib.closing(validation):
                figures = evaluate(judge, validation, variables, perceptual_params)
            check_finite(step, {"validation/loss": figures["reconstruction_loss"]})
            writer.write(step, {f"validation/{name}": value for name, value in figures.items()})
            images = jax.device_put(pictured, whole)
            pair = jax.device_get((prepare_images(config.data, images), picture(variables, images)))
            grid = side_by_side(
                *pair,
                enlarge=max(1, 128 // config.model.resolution),
                label_maps=config.data.num_labels > 0,
            )
            writer.write_images(step, "reconstructions", grid)
            shown = [f"{name} {figures[name]:.4g}" for name in SHOWN_EVALUATION if name in figures]
            say(f"evaluation at step {step} on {figures['images']:.0f} images:", *shown, flush=True)
            if jax.process_index() == 0:
                evaluation_file.write_text(json.dumps(figures, indent=2) + "\n")
            return figures

        def asked_to_stop(step: int) -> bool:
            return stop_signal.received if alone else checkpoints.reached_preemption(step)

        # ---- The loop.
        figures, step = None, start
        while step < training.num_steps:
            with progress.waiting_for_data():
                batch = next(stream)
            playing = game.plays(step)  # two programs: before the adversarial game, and in it
            state, metrics, reconstructions = update_generator(
                state, batch["image"], perceptual_params, playing=playing
            )
            if config.discriminator.enabled:
                state, more = update_discriminator(
                    state, batch["image"], reconstructions, playing=playing
                )
                metrics |= more
            step += 1
            log(deferred.push(step, metrics))

            last = step == training.num_steps
            stopping = asked_to_stop(step)
            figures = None
            if last or stopping or step % training.evaluate_every == 0:
                log(deferred.flush())
            if last or step % training.evaluate_every == 0:
                with progress.paused():
                    figures = evaluate_now(step)
            if last or stopping or figures or step % training.checkpoint_every == 0:
                log(deferred.flush())  # a state that is not finite is never written
                with progress.paused():
                    checkpoints.save(step, state, figures)
            if stopping and not last:
                checkpoints.wait()
                raise Preempted(f"Stopped at step {step}; the same command goes on from there.")

        return figures or evaluate_now(step)


def perceptual_parameters(game: Game, mesh: jax.sharding.Mesh):
    """Checked LPIPS parameters on every device; None where the config has no perceptual term."""
    if not uses_perceptual(game.config.loss):
        return None
    params = load_lpips(game.config.loss.perceptual_network, game.config.data.data_dir)
    check_lpips(game.perceptual, params)
    return jax.device_put(params, replicated(mesh))
