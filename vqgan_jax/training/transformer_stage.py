"""Stage 2 as the loop sees it: the transformer over codes, from disk or straight from images."""

import contextlib
import functools
import math
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vqgan_jax.configuration import ConfigError
from vqgan_jax.data.code_batches import evaluation_code_batches, training_code_batches
from vqgan_jax.data.codes import check_codes, open_codes
from vqgan_jax.data.pipeline import evaluation_batches, training_batches
from vqgan_jax.data.sources import open_source
from vqgan_jax.generation import Generator
from vqgan_jax.inference import Tokenizer, load_tokenizer
from vqgan_jax.metrics.baselines import code_frequency_bits, left_neighbour_bits
from vqgan_jax.training.checkpoints import TOKENIZER, read_variables, write_export
from vqgan_jax.training.compilation import compile_options
from vqgan_jax.training.hardware import forward_flops, peak_flops
from vqgan_jax.training.images import prepare_images
from vqgan_jax.training.learner import Learner
from vqgan_jax.training.pictures import tiled
from vqgan_jax.training.sharding import batch_sharding, replicated, state_shardings
from vqgan_jax.training.states import TransformerState
from vqgan_jax.training.transformer_step import transformer_evaluation_step, transformer_step

BASELINE_IMAGES = 100_000  # of the training split, for the simple models


class TransformerStage:
    """The training of a transformer; see `loop.Stage`."""

    shown = ("bits_per_code", "perplexity", "accuracy")
    shown_evaluation = ("bits_per_code", "left_neighbour_bits", "code_frequency_bits", "accuracy")
    checked = "bits_per_code"
    pictures_name = "samples"

    def __init__(self, config: ConfigDict, mesh: Mesh, workdir: pathlib.Path):
        """Opens tokenizer and data and lays everything out; compiles nothing yet.

        Raises:
            ConfigError, DataError, CheckpointError: what cannot work ends here.
        """
        self._tokenizer = own_tokenizer(config.tokenizer.path, workdir)
        self._splits = (config.data.train_split, config.data.validation_split)
        self._codes = None
        if config.data.codes:
            root = pathlib.Path(config.data.codes)
            self._codes = [open_codes(root / split) for split in self._splits]
        self.config = config = resolved(config, self._tokenizer, self._codes)
        for codes in self._codes or ():
            check_codes(
                codes,
                self._tokenizer.fingerprint,
                config.model.grid,
                config.model.codebook_size,
                config.condition.num_classes if config.condition.kind == "class" else 0,
            )
        self._images_config = images_config(config, self._tokenizer)

        self._micro_batch_size = config.training.batch_size // config.optimizer.accumulate
        self._rows = batch_sharding(mesh, self._micro_batch_size, "the micro-batch size")
        self._whole = replicated(mesh)
        self._learner = Learner.from_config(config)
        self.abstract_state = jax.eval_shape(self._learner.init)
        self.layout = state_shardings(self.abstract_state, config.sharding_rules, mesh)
        compiled = functools.partial(jax.jit, compiler_options=compile_options())
        self._update = compiled(
            functools.partial(transformer_step, self._learner),
            donate_argnums=0,
            out_shardings=(self.layout, self._whole),
        )
        self._judge = compiled(
            functools.partial(transformer_evaluation_step, self._learner),
            out_shardings=self._whole,
        )
        self._encode = compiled(self._encode_images, out_shardings=self._rows)
        self._tokenizer_variables = jax.device_put(self._tokenizer.variables, self._whole)

        peak = peak_flops(mesh.devices.flat[0])
        num_codes = math.prod(config.model.grid)
        flops = 3.0 * forward_flops(self._learner.transformer, num_codes)
        self._num_codes = num_codes
        self._peak_share = flops / (peak * mesh.devices.size) if peak else None

    def batches(self, start_step: int) -> Iterator:
        """Batches for the steps from `start_step` on; its `close()` ends their threads."""
        if self._codes is None:
            return training_batches(self._images_config, self._rows, start_step=start_step)
        return training_code_batches(self._codes[0], self.config, self._rows, start_step)

    def init(self, batch) -> TransformerState:
        """The state before the first step, born on the devices."""
        del batch
        path = self.config.training.initialize_from
        if not path:
            return jax.jit(self._learner.init, out_shardings=self.layout)()
        _, variables, _ = read_variables(path)
        return jax.jit(self._learner.init_from, out_shardings=self.layout)(variables["params"])

    def update(self, state: TransformerState, batch, step: int) -> tuple[TransformerState, dict]:
        """One update."""
        del step
        return self._update(state, self._codes_of(batch), batch["label"])

    def _codes_of(self, batch):
        """`(B, N)`: those of a batch, or those that the frozen tokenizer gives its images."""
        if "codes" in batch:
            return batch["codes"]
        return self._encode(self._tokenizer_variables, batch["image"])

    def _encode_images(self, variables, images):
        images = prepare_images(self._tokenizer.config.data, images)
        codes = self._tokenizer.module.apply(variables, images, method="encode")
        return codes.reshape(len(codes), -1)

    def rates(self, images_per_second: float) -> dict[str, float]:
        """Codes a second, and the share of the devices' peak where it is known."""
        rates = {"codes_per_second": images_per_second * self._num_codes}
        if self._peak_share is not None:
            rates["share_of_peak"] = images_per_second * self._peak_share
        return rates

    def evaluate(self, state: TransformerState) -> dict[str, float]:
        """Figures over the validation split, beside those of simple models."""
        limit, size = self.config.training.evaluation_images, self._micro_batch_size
        if self._codes is None:
            batches = evaluation_batches(self._images_config, self._rows, size, limit)
        else:
            batches = evaluation_code_batches(self._codes[1], self.config, self._rows, size, limit)
        with contextlib.closing(batches):
            sums = [
                self._judge(state.inference_params, self._codes_of(batch), batch["label"], mask)
                for batch, mask in batches
            ]
        sums = jax.tree.map(lambda *values: float(np.sum(values)), *jax.device_get(sums))
        images = sums.pop("images")
        figures = {name: value / images for name, value in sums.items()}
        figures["bits_per_code"] = figures["cross_entropy"] / math.log(2.0)
        figures["perplexity"] = math.exp(figures["cross_entropy"])
        return figures | self._baselines | {"images": images}

    @functools.cached_property
    def _baselines(self) -> dict[str, float]:
        """Bits per code of simple models; nothing where no codes are stored."""
        if self._codes is None:
            return {}
        train, validation = (
            codes.gather(np.arange(min(len(codes), BASELINE_IMAGES))) for codes in self._codes
        )
        size, (_, columns) = self.config.model.codebook_size, self.config.model.grid
        return {
            "code_frequency_bits": code_frequency_bits(train, validation, size),
            "left_neighbour_bits": left_neighbour_bits(train, validation, size, columns),
        }

    def pictures(self, state: TransformerState) -> np.ndarray:
        """Samples, of classes spread over all where there are any, `(H, W, 3)` uint8."""
        count = self.config.training.grid_images
        params = jax.device_put(state.inference_params, self._whole)
        generator = Generator(self.config, params, self._tokenizer)
        condition = None
        if self.config.condition.kind == "class":
            condition = np.arange(count) * self.config.condition.num_classes // count
        images = generator.sample(
            seed=self.config.seed, num_samples=count, condition=condition, batch_size=count
        )
        return tiled(images, columns=8, enlarge=max(1, 128 // images.shape[1]))


def own_tokenizer(path: str, workdir: pathlib.Path) -> Tokenizer:
    """The tokenizer of a run: the copy in its directory, made from `path` when the run begins.

    A run thus keeps its tokenizer, whatever becomes of the one at `path`.

    Raises:
        CheckpointError: there is none, or the copy cannot be written.
    """
    copy = workdir / TOKENIZER
    if copy.exists():
        return load_tokenizer(copy)
    tokenizer = load_tokenizer(path)
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        write_export(copy, tokenizer.config, tokenizer.variables)
    return tokenizer


def resolved(config: ConfigDict, tokenizer: Tokenizer, codes) -> ConfigDict:
    """The config with what its tokenizer and data determine: codebook size, grid, classes.

    Raises:
        ConfigError: what it says itself is something else, or it needs classes and has none.
    """
    config = config.copy_and_resolve_references()
    if codes:
        grid, num_classes = tuple(codes[0].grid), codes[0].num_classes
        class_names = codes[0].class_names
    else:
        data = config.data
        resolution = config.tokenizer.resolution or tokenizer.config.model.resolution
        grid = (resolution // tokenizer.factor,) * 2
        class_names = open_source(
            data.name, data.train_split, data.data_dir, data.image_key, resolution
        ).class_names
        num_classes = len(class_names or ())
    found = {("model", "codebook_size"): tokenizer.codebook_size, ("model", "grid"): grid}
    if config.condition.kind == "class":
        found["condition", "num_classes"] = num_classes
        found["condition", "class_names"] = tuple(class_names or ())
    for (section, key), value in found.items():
        own = config[section][key]
        if own and own != value:
            raise ConfigError(
                f"config.{section}.{key} is {own}, but the tokenizer and the data have {value}."
            )
        config[section][key] = value
    if config.condition.kind == "class" and config.condition.num_classes == 0:
        raise ConfigError("config.condition.kind is class, but the data has no classes.")
    rows, columns = config.model.grid
    if 0 < config.model.max_length < rows * columns:
        raise ConfigError(
            f"config.model.max_length is {config.model.max_length}; a grid of {rows}x{columns} "
            f"codes needs {rows * columns}."
        )
    return config


def images_config(config: ConfigDict, tokenizer: Tokenizer) -> ConfigDict:
    """The tokenizer's config with this run's data, for the pipeline of images."""
    images = tokenizer.config.copy_and_resolve_references()
    with images.unlocked():
        images.seed, images.data = config.seed, config.data
        images.training.batch_size = config.training.batch_size
        if config.tokenizer.resolution:
            images.model.resolution = config.tokenizer.resolution
    return images
