"""Stage 1 as the loop sees it: two players, their steps, and how the tokenizer is judged."""

import contextlib
from collections.abc import Iterator

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vqgan_jax.data.images import prepare_images
from vqgan_jax.data.pipeline import evaluation_batches, evaluation_images, training_batches
from vqgan_jax.data.sources import open_configured
from vqgan_jax.data.splits import opening_line
from vqgan_jax.interop.lpips import check_lpips, load_lpips
from vqgan_jax.training.compilation import (
    compile_init,
    compile_judge,
    compile_options,
    compile_players,
)
from vqgan_jax.training.evaluation import evaluate
from vqgan_jax.training.game import Game
from vqgan_jax.training.objectives import uses_perceptual
from vqgan_jax.training.opening import data_line, model_line, num_parameters
from vqgan_jax.training.pictures import side_by_side
from vqgan_jax.training.sharding import batch_sharding, replicated, state_shardings
from vqgan_jax.training.states import TokenizerState
from vqgan_jax.training.warm_start import start_from


class TokenizerStage:
    """The training of a tokenizer; see `loop.Stage`."""

    shown = ("loss/reconstruction", "loss/quantization", "loss/discriminator", "adversarial_weight")
    shown_evaluation = ("psnr", "ssim", "lpips", "pixel_accuracy", "codebook_usage")
    checked = "reconstruction_loss"
    pictures_name = "reconstructions"

    def __init__(self, config: ConfigDict, mesh: Mesh):
        """Opens the data and lays everything out; compiles nothing yet.

        Raises:
            ConfigError, DataError: what cannot work ends here, before anything is written.
        """
        self.config = config
        training = config.training
        self._micro_batch_size = training.batch_size // config.optimizer.accumulate
        self._rows = batch_sharding(mesh, self._micro_batch_size, "the micro-batch size")
        self._whole = replicated(mesh)
        self._train = open_configured(config.data, config.data.train_split, config.model.resolution)
        self._validation = open_configured(
            config.data, config.data.validation_split, config.model.resolution
        )
        limit = training.evaluation_images or len(self._validation)
        self.num_evaluated = min(limit, len(self._validation))
        self._compiled: set[tuple[bool, bool]] = set()
        self._pictured = evaluation_images(config, training.grid_images)

        self._game = Game.from_config(config)
        self._perceptual_params = perceptual_parameters(self._game, mesh)
        self.abstract_state = jax.eval_shape(
            self._init,
            jax.ShapeDtypeStruct(
                (training.batch_size, *self._pictured.shape[1:]), self._pictured.dtype
            ),
        )
        self.layout = state_shardings(self.abstract_state, config.sharding_rules, mesh)
        self._update_generator, self._update_discriminator = compile_players(
            self._game, self.layout, mesh
        )
        self._judge = compile_judge(self._game, mesh)
        self._reconstruct = jax.jit(
            lambda variables, images: self._game.tokenizer.apply(
                variables, prepare_images(config, images)
            )[0],
            out_shardings=self._whole,
            compiler_options=compile_options(),
        )

    def opening_lines(self) -> list[str]:
        """The model and the data, for people."""
        generator, discriminator = self.abstract_state.generator, self.abstract_state.discriminator
        parameters = {"model": num_parameters(generator.params)}
        if discriminator is not None and self.config.discriminator.enabled:
            parameters["discriminator"] = num_parameters(discriminator.params)
        data = self.config.data
        counts = {
            data.train_split: len(self._train),
            data.validation_split: len(self._validation),
        }
        line = opening_line(data.name, data.folder_rules)
        classes = len(self._train.class_names or ())
        return [
            model_line(self.config, parameters),
            f"data: {line}" if line else data_line(data.name, counts, classes),
        ]

    def compiles(self, step: int) -> str:
        """Adversarial steps, and those that regularise the discriminator, are other programs."""
        adversarial, regularizing = kind = self._game.plays(step), self._game.regularizes(step)
        known = not self._compiled or kind in self._compiled
        self._compiled.add(kind)
        if known:
            return ""
        what = "adversarial step" if adversarial else "step"
        return f"compiling the {what}{' with R1' if regularizing else ''}"

    def _init(self, images):
        return self._game.init(prepare_images(self.config, images))

    def check_data(self) -> None:
        """Damaged images are passed over and counted as they are read."""

    def batches(self, start_step: int) -> Iterator:
        """Batches for the steps from `start_step` on; its `close()` ends their threads."""
        return training_batches(self.config, self._rows, start_step=start_step)

    def init(self, batch) -> TokenizerState:
        """The state before the first step, born on the devices; `batch` is the first one."""
        state = compile_init(self._init, self.layout)(batch["image"])
        if self.config.training.initialize_from:
            path = self.config.training.initialize_from
            state = start_from(path, self._game, state, self.layout)
        return state

    def update(self, state: TokenizerState, batch, step: int) -> tuple[TokenizerState, dict]:
        """One update of both players."""
        images = batch["image"]
        playing = self._game.plays(step)  # a program each: before the adversarial game, and in it
        state, metrics, reconstructions = self._update_generator(
            state, images, self._perceptual_params, playing=playing
        )
        if self.config.discriminator.enabled:
            state, more = self._update_discriminator(
                state,
                images,
                reconstructions,
                playing=playing,
                regularizing=self._game.regularizes(step),
            )
            metrics |= more
        return state, metrics

    def rates(self, images_per_second: float) -> dict[str, float]:
        """None beside the images."""
        del images_per_second
        return {}

    def evaluate(self, state: TokenizerState) -> dict[str, float]:
        """Figures over the validation split."""
        batches = evaluation_batches(
            self.config, self._rows, self._micro_batch_size, self.config.training.evaluation_images
        )
        variables = state.generator.inference_variables
        with contextlib.closing(batches):
            return evaluate(self._judge, batches, variables, self._perceptual_params)

    def pictures(self, state: TokenizerState):
        """Inputs beside reconstructions, `(H, W, 3)` uint8."""
        images = jax.device_put(self._pictured, self._whole)
        reconstructions = self._reconstruct(state.generator.inference_variables, images)
        return side_by_side(
            *jax.device_get((prepare_images(self.config, images), reconstructions)),
            enlarge=max(1, 128 // self.config.model.resolution),
            label_maps=self.config.data.num_labels > 0,
        )


def perceptual_parameters(game: Game, mesh: Mesh):
    """Checked LPIPS parameters on every device; None where the config has no perceptual term."""
    if not uses_perceptual(game.config.loss):
        return None
    params = load_lpips(game.config.loss.perceptual_network, game.config.data.data_dir)
    check_lpips(game.perceptual, params)
    return jax.device_put(params, replicated(mesh))
