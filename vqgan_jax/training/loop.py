"""The training loop, from a config to the last checkpoint; what is trained is a stage's matter."""

import contextlib
import itertools
import json
import math
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vqgan_jax import configuration, distributed
from vqgan_jax.checkpoints.directory_lock import locked
from vqgan_jax.checkpoints.writing import write_text
from vqgan_jax.configuration.memory import require_memory
from vqgan_jax.training.checkpoints import CONFIG_FILE, Checkpoints, latest_step
from vqgan_jax.training.goodput import Goodput
from vqgan_jax.training.logging import DeferredMetrics, MetricWriter, NonFiniteError, check_finite
from vqgan_jax.training.opening import device_line, steps_line
from vqgan_jax.training.phases import (
    CHECKPOINTS,
    COMPILE,
    DATA,
    EVALUATION,
    START,
    STEPS,
    PhaseClock,
)
from vqgan_jax.training.progress import Progress
from vqgan_jax.training.run_files import (
    EVALUATION_FILE,
    changed_keys,
    set_aside_others,
    stored_config,
    stored_figures,
    warn_of_lost_lines,
    with_stored_rules,
)
from vqgan_jax.training.sharding import make_mesh, sharding_table, with_shardings
from vqgan_jax.training.stopping import Preempted, StopSignal
from vqgan_jax.training.tokenizer_stage import TokenizerStage
from vqgan_jax.training.transformer_stage import TransformerStage

FEW_IMAGES = 100  # of an evaluation


class Stage(Protocol):
    """What the loop needs to know of a model, its data and its steps.

    Attributes:
        config: the experiment.
        shown: metrics for the terminal; `metrics.jsonl` has all.
        shown_evaluation: the same of an evaluation.
        checked: the figure of an evaluation that must be finite.
        pictures_name: what the pictures show.
        abstract_state: shapes and types of the state.
        layout: a sharding for each array of the state.
        num_evaluated: images of an evaluation.
    """

    config: ConfigDict
    shown: Sequence[str]
    shown_evaluation: Sequence[str]
    checked: str
    pictures_name: str
    abstract_state: Any
    layout: Any
    num_evaluated: int

    def opening_lines(self) -> Sequence[str]:
        """The model and the data, for people."""

    def compiles(self, step: int) -> str:
        """What step `step` compiles beside what the steps of this run before it did; or nothing."""

    def batches(self, start_step: int) -> Iterator:
        """Batches for the steps from `start_step` on; its `close()` ends their threads."""

    def init(self, batch) -> Any:
        """The state before the first step, whose batch is given."""

    def update(self, state, batch, step: int) -> tuple[Any, dict]:
        """The state after step `step`, and metrics on the device."""

    def rates(self, images_per_second: float) -> dict[str, float]:
        """Other figures that follow from the speed."""

    def check_data(self) -> None:
        """Raises `DataError` where data that was trained on turns out to be damaged."""

    def evaluate(self, state) -> dict[str, float]:
        """Figures over the validation split."""

    def pictures(self, state) -> np.ndarray:
        """What the model makes, `(H, W, 3)` uint8."""


def make_stage(config: ConfigDict, mesh: Mesh, workdir: pathlib.Path) -> Stage:
    """The stage that a config names, with its data open and checked."""
    config = config.copy_and_resolve_references()
    config.data.name = configuration.dataset_name(config.data.name)
    if config.stage == "transformer":
        return TransformerStage(config, mesh, workdir)
    return TokenizerStage(config, mesh)


def explain_sharding(config: ConfigDict, workdir: str | pathlib.Path) -> str:
    """Where each array of the state that `train` would have lies; errors as of `train`."""
    configuration.validate(config)
    stage = make_stage(config, make_mesh(config.mesh), pathlib.Path(workdir))
    return sharding_table(with_shardings(stage.abstract_state, stage.layout))


def how_to_go_on(workdir: pathlib.Path) -> str:
    """Where the same command goes on with a run that ends now."""
    step = latest_step(workdir)
    where = "the start" if step is None else f"the last checkpoint (step {step})"
    return f"the same command goes on from {where}"


def _check_memory(stage: Stage) -> None:
    """Raises `ConfigError` where the state alone does not fit on the devices that share it."""
    devices = jax.local_devices()
    sizes = [
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(
            jax.tree.leaves(stage.abstract_state), jax.tree.leaves(stage.layout), strict=True
        )
    ]
    copies = len(devices) if devices[0].platform == "cpu" else 1
    training, model = stage.config.training, stage.config.model
    rows = training.batch_size // stage.config.optimizer.accumulate
    images = 0
    if stage.config.stage == "tokenizer":
        pixels = rows * model.resolution**2
        width = model.channels if model.architecture == "conv" else model.in_channels
        images = pixels * (2 * model.in_channels + width) * 2 // jax.device_count()
    require_memory(
        (sum(sizes) + images) * copies,
        f"The state of {sum(sizes) / 2**20:,.0f} MiB with a batch of {training.batch_size}",
        "take a smaller config.training.batch_size, config.model.resolution or model, "
        "config.optimizer.accumulate, or more devices with config.mesh.fsdp",
    )


def train(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    devices: Sequence[jax.Device] | None = None,
    started: float | None = None,
) -> dict[str, float]:
    """Trains to `config.training.num_steps`, from the newest checkpoint in `workdir` if any.

    Args:
        config: the experiment, as a file of `configs/` makes it.
        workdir: where checkpoints, metrics and pictures go; made if missing.
        devices: what to train on; None for all that there are.
        started: when the program began, in seconds since 1970; None for now. What it did since
            then counts as this run's start.

    Returns:
        The figures of the last evaluation.

    Raises:
        ConfigError, DataError, CheckpointError, NonFiniteError: one line for the terminal each.
        Preempted: asked to stop by SIGTERM or SIGINT; the state is saved.
    """
    clock = PhaseClock(START, 0.0 if started is None else time.time() - started)
    configuration.validate(config)
    workdir = pathlib.Path(workdir)
    say = print if jax.process_index() == 0 else lambda *_, **__: None

    with contextlib.ExitStack() as stack:
        stack.enter_context(clock.watching_compiler())
        # What cannot work ends here, before anything is written or compiled.
        if jax.process_index() == 0:
            stack.enter_context(locked(workdir))
        set_aside_others(workdir)
        stored = stored_config(workdir)
        config = with_stored_rules(config, stored)
        mesh = make_mesh(config.mesh, devices)
        say(device_line(list(mesh.devices.flat)), flush=True)
        stage = make_stage(config, mesh, workdir)
        config, training = stage.config, stage.config.training
        if jax.process_index() == 0:
            print(*stage.opening_lines(), sep="\n", flush=True)
        if stage.num_evaluated < FEW_IMAGES:
            say(
                f"note: figures of {stage.num_evaluated} images for validation vary by chance; "
                f"{FEW_IMAGES} or more tell models apart",
                flush=True,
            )
        _check_memory(stage)

        # ---- The state: of the newest checkpoint, or born on the devices from the first batch.
        distributed.advise(lambda: how_to_go_on(workdir))
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir, config)))
        restored = checkpoints.restore(with_shardings(stage.abstract_state, stage.layout))
        start = restored[0] if restored else 0
        evaluation_file = workdir / EVALUATION_FILE
        if start >= training.num_steps and evaluation_file.exists():
            figures = stored_figures(evaluation_file)
            if figures is not None:
                say(f"The run in {workdir} is finished: it has all its {start} steps.")
                return figures
        batches = stack.enter_context(contextlib.closing(stage.batches(start)))
        if restored:
            state = restored[1]
            say(f"Going on from step {start} in {workdir}.")
            changed = changed_keys(config, stored) if stored else []
            more = [f"and {len(changed) - 8} more"] if changed[8:] else []
            if changed:
                say(f"changed since then: {', '.join(changed[:8] + more)}")
        else:
            say("initialising the parameters", flush=True)
            first = next(batches)
            state = stage.init(first)
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
            write_text(workdir / CONFIG_FILE, configuration.to_json(config))
            warn_of_lost_lines(workdir, writer.last_step, start, training.log_every)
        goodput = Goodput(workdir, clock, start)
        goodput.write()
        progress = Progress(training.num_steps, training.batch_size, start, clock=clock)
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
                shown = {name: metrics[name] for name in stage.shown if name in metrics}
                speed = progress.report(step, shown)
                speed |= stage.rates(speed["images_per_second"])
                writer.write(step, metrics | speed)
                goodput.write()

        def evaluate_now(step: int) -> dict[str, float]:
            say(f"evaluating {stage.num_evaluated:,} images", flush=True)
            figures = stage.evaluate(state)
            check_finite(step, {f"validation/{stage.checked}": figures[stage.checked]})
            pictures = stage.pictures(state)
            validation = {f"validation/{name}": value for name, value in figures.items()}
            writer.write(step, validation | goodput.shares())
            writer.write_images(step, stage.pictures_name, pictures)
            shown = [
                f"{name} {figures[name]:.4g}" for name in stage.shown_evaluation if name in figures
            ]
            say(f"evaluation at step {step} on {figures['images']:.0f} images:", *shown, flush=True)
            if jax.process_index() == 0:
                write_text(evaluation_file, json.dumps(figures, indent=2) + "\n")
            return figures

        def evaluate_or_save(step: int) -> dict[str, float]:
            """What fails in an evaluation costs no steps: the state is saved before the end."""
            try:
                return evaluate_now(step)
            except NonFiniteError:
                raise
            except BaseException:
                if alone:  # several processes would have to fail together
                    save(step, None)
                    checkpoints.wait()
                    evaluation_file.unlink(missing_ok=True)  # else a finished run would show it
                raise

        def asked_to_stop(step: int) -> bool:
            return stop_signal.received if alone else checkpoints.reached_preemption(step)

        def save(step: int, figures: dict[str, float] | None) -> None:
            with clock.phase(CHECKPOINTS):
                stage.check_data()
                checkpoints.save(step, state, figures)
            goodput.mark(step)

        def end() -> None:
            """Waits until all is written, and says what the time went to."""
            with clock.phase(CHECKPOINTS):
                checkpoints.wait()
            goodput.mark(step)
            say(goodput.line(), flush=True)

        def show_pictures(step: int) -> None:
            with clock.phase(EVALUATION):
                path = writer.write_images(step, stage.pictures_name, stage.pictures(state))
            say(f"picture at step {step}: {path}", flush=True)

        def first_step(arrived: tuple[int, dict[str, float]]) -> None:
            """Compilation is over when the first step is computed; rates count from then on."""
            log(arrived)
            step, metrics = arrived
            say(f"compiled in {clock.seconds()[COMPILE]:.0f} s", flush=True)
            if step % training.log_every and step != training.num_steps:
                shown = [f"{name} {metrics[name]:.4g}" for name in stage.shown if name in metrics]
                say(f"step {step}/{training.num_steps}", *shown, sep="  ", flush=True)
                progress.begin(step)

        # ---- The loop.
        figures, step = None, start
        say(steps_line(config, start), flush=True)
        if start < training.num_steps:
            say("compiling the step, which takes longer than the steps to come", flush=True)
        clock.enter(STEPS)
        while step < training.num_steps:
            with clock.phase(DATA):
                batch = next(stream)
            if line := stage.compiles(step):
                say(line, flush=True)
            state, metrics = stage.update(state, batch, step)
            step += 1
            log(deferred.push(step, metrics))
            if step == start + 1:
                first_step(deferred.flush())

            last = step == training.num_steps
            stopping = asked_to_stop(step)
            figures = None
            every = training.pictures_every
            if every and step % every == 0 and step % training.evaluate_every and not last:
                show_pictures(step)
            if last or stopping or step % training.evaluate_every == 0:
                log(deferred.flush())
            if last or step % training.evaluate_every == 0:
                with clock.phase(EVALUATION):
                    figures = evaluate_or_save(step)
            if last or stopping or figures or step % training.checkpoint_every == 0:
                log(deferred.flush())  # a state that is not finite is never written
                save(step, figures)
            if stopping and not last:
                end()
                raise Preempted(f"Stopped at step {step}; the same command goes on from there.")

        if figures is None:  # all steps were there, but for the last evaluation
            with clock.phase(EVALUATION):
                figures = evaluate_now(step)
        end()
        return figures
