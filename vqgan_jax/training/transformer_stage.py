"""Stage 2 as the loop sees it: the transformer over codes, from disk or straight from images."""

import contextlib
import functools
import json
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
from vqgan_jax.data.elements import spaced_indices
from vqgan_jax.data.pipeline import evaluation_batches, training_batches
from vqgan_jax.data.sources import open_source
from vqgan_jax.generation import Generator
from vqgan_jax.inference import Tokenizer, load_tokenizer
from vqgan_jax.metrics.baselines import code_frequency_bits, left_neighbour_bits
from vqgan_jax.training.checkpoints import (
    CONFIG_FILE,
    TOKENIZER,
    CheckpointError,
    read_variables,
    shapes,
    write_export,
)
from vqgan_jax.training.compilation import compile_options
from vqgan_jax.training.encoding import encode_raw
from vqgan_jax.training.hardware import forward_flops, peak_flops
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
        self._workdir = workdir
        self._tokenizer = tokenizer_of_run(config.tokenizer.path, workdir)
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
        self._update = jax.jit(
            functools.partial(transformer_step, self._learner),
            donate_argnums=0,
            out_shardings=(self.layout, self._whole),
        )
        self._judge = jax.jit(
            functools.partial(transformer_evaluation_step, self._learner),
            out_shardings=self._whole,
        )
        self._encode = jax.jit(
            functools.partial(encode_raw, self._tokenizer),
            out_shardings=self._rows,
            compiler_options=compile_options(),
        )

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
        if path:
            params = initial_params(path, self.abstract_state.params)
            state = jax.jit(self._learner.init_from, out_shardings=self.layout)(params)
        else:
            state = jax.jit(self._learner.init, out_shardings=self.layout)()
        # Not before all checks: a run that cannot begin leaves no tokenizer to the next try.
        keep_tokenizer(self._tokenizer, self._workdir)
        return state

    def update(self, state: TransformerState, batch, step: int) -> tuple[TransformerState, dict]:
        """One update."""
        del step
        return self._update(state, self._codes_of(batch), batch["label"])

    def _codes_of(self, batch):
        """`(B, N)`: those of a batch, or those that the frozen tokenizer gives its images."""
        if "codes" in batch:
            return batch["codes"]
        return self._encode(self._tokenizer_variables, batch["image"])

    @functools.cached_property
    def _tokenizer_variables(self):
        """On all devices; by way of the host, as the device that has them is of one process."""
        return jax.device_put(jax.device_get(self._tokenizer.variables), self._whole)

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
        limits = (BASELINE_IMAGES, self.config.training.evaluation_images)
        train, validation = (
            codes.gather(spaced_indices(len(codes), limit))
            for codes, limit in zip(self._codes, limits, strict=True)
        )
        size, (_, columns) = self.config.model.codebook_size, self.config.model.grid
        return {
            "code_frequency_bits": code_frequency_bits(train, validation, size),
            "left_neighbour_bits": left_neighbour_bits(train, validation, size, columns),
        }

    @functools.cached_property
    def _generator(self) -> Generator:
        """Its programs are compiled once, at the first evaluation."""
        return Generator(self.config, None, self._tokenizer)

    def pictures(self, state: TransformerState) -> np.ndarray:
        """Samples, of classes spread over all where there are any, `(H, W, 3)` uint8."""
        count = self.config.training.grid_images
        params = jax.device_put(state.inference_params, self._whole)
        # Every process draws all of them by itself, from what its own first device has.
        params = jax.tree.map(lambda leaf: leaf.addressable_data(0), params)
        condition = None
        if self.config.condition.kind == "class":
            condition = np.arange(count) * self.config.condition.num_classes // count
        generator = self._generator.with_params(params)
        images = generator.sample(seed=self.config.seed, num_samples=count, condition=condition)
        return tiled(images, columns=8, enlarge=max(1, 128 // images.shape[1]))


def tokenizer_of_run(path: str, workdir: pathlib.Path) -> Tokenizer:
    """The tokenizer of a run: the copy in its directory, or before there is one that at `path`.

    A run thus keeps its tokenizer, whatever becomes of the one at `path`.

    Raises:
        CheckpointError: there is none.
        ConfigError: the run was begun with another one, from another path.
    """
    copy = workdir / TOKENIZER
    if not copy.exists():
        return load_tokenizer(path)
    kept = load_tokenizer(copy)
    begun = workdir / CONFIG_FILE
    begun_with = json.loads(begun.read_text())["tokenizer"]["path"] if begun.exists() else ""
    if path != begun_with:
        try:
            other = load_tokenizer(path).fingerprint != kept.fingerprint
        except CheckpointError:
            other = False  # gone, or not here any more: the copy is there for that
        if other:
            raise ConfigError(
                f"config.tokenizer.path {path} is another tokenizer than that of the run in "
                f"{workdir}, {copy}. Choose another --workdir, or the tokenizer that the run was "
                "started with."
            )
    return kept


def keep_tokenizer(tokenizer: Tokenizer, workdir: pathlib.Path) -> None:
    """Writes the copy that `tokenizer_of_run` finds, where there is none.

    Raises:
        CheckpointError: it cannot be written.
    """
    copy = workdir / TOKENIZER
    if jax.process_index() == 0 and not copy.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        write_export(copy, tokenizer.config, tokenizer.variables)


def initial_params(path: str, abstract_params):
    """The parameters of another transformer on the host, to begin from.

    Raises:
        CheckpointError: there is none at `path`, or it has other shapes than `abstract_params`.
    """
    config, variables, _ = read_variables(path)
    if config.stage != "transformer":
        raise CheckpointError(
            f"config.training.initialize_from {path} is a {config.stage}; a transformer is needed "
            "here."
        )
    ours, theirs = shapes(abstract_params), shapes(variables["params"])
    different = sorted(ours.items() ^ theirs.items())
    if different:
        name = different[0][0]
        raise CheckpointError(
            f"config.training.initialize_from {path} holds another model: the shape of {name} is "
            f"{theirs.get(name, 'not')} there and {ours.get(name, 'not')} here."
        )
    return jax.device_get(variables["params"])


def resolved(config: ConfigDict, tokenizer: Tokenizer, codes) -> ConfigDict:
    """The config with what its tokenizer and data determine: codebook size, grid, classes.

    Raises:
        ConfigError: what it says itself is something else, or it needs classes and has none.
    """
    config = config.copy_and_resolve_references()
    found = {("model", "codebook_size"): tokenizer.codebook_size}
    if codes:
        grid, class_names = tuple(codes[0].grid), codes[0].class_names
    else:
        data = config.data
        resolution = config.tokenizer.resolution or tokenizer.config.model.resolution
        if resolution % tokenizer.factor:
            raise ConfigError(
                f"config.tokenizer.resolution is {resolution}, which the tokenizer's factor "
                f"{tokenizer.factor} does not divide."
            )
        grid = (resolution // tokenizer.factor,) * 2
        found["data", "num_labels"] = num_labels = tokenizer.config.data.num_labels
        class_names = open_source(
            data.name, data.train_split, data.data_dir, data.image_key, resolution, num_labels > 0
        ).class_names
    found["model", "grid"] = grid
    if config.condition.kind == "class":
        found["condition", "num_classes"] = len(class_names or ())
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
    check_shared_table(config)
    rows, columns = config.model.grid
    if 0 < config.model.max_length < rows * columns:
        raise ConfigError(
            f"config.model.max_length is {config.model.max_length}; a grid of {rows}x{columns} "
            f"codes needs {rows * columns}."
        )
    return config


def check_shared_table(config: ConfigDict) -> None:
    """Raises `ConfigError` where a condition has no row in the codes' table."""
    condition, size = config.condition, config.model.codebook_size
    if condition.own_table:
        return
    if condition.kind == "none":
        needed, what = condition.start_token + 1, "start_token"
    else:
        needed, what = condition.num_classes + (condition.dropout > 0.0), "num_classes"
    if needed > size:
        raise ConfigError(
            f"config.condition.{what} is {condition[what]}, and the codes' table has {size} rows; "
            "set config.condition.own_table=True."
        )


def images_config(config: ConfigDict, tokenizer: Tokenizer) -> ConfigDict:
    """The tokenizer's config with this run's data, for the pipeline of images."""
    images = tokenizer.config.copy_and_resolve_references()
    with images.unlocked():
        images.seed, images.data = config.seed, config.data
        images.training.batch_size = config.training.batch_size
        if config.tokenizer.resolution:
            images.model.resolution = config.tokenizer.resolution
    return images
