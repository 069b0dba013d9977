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

from vqgan_jax.data.code_batches import evaluation_code_batches, training_code_batches
from vqgan_jax.data.code_verification import Verification
from vqgan_jax.data.codes import open_codes
from vqgan_jax.data.elements import spaced_indices
from vqgan_jax.data.pipeline import (
    evaluation_batches,
    evaluation_examples,
    training_batches,
)
from vqgan_jax.data.sources import open_configured
from vqgan_jax.generation import Generator
from vqgan_jax.metrics.baselines import code_frequency_bits, left_neighbour_bits
from vqgan_jax.models.transformer import cast_kernels
from vqgan_jax.training.compilation import (
    compile_init,
    compile_options,
    compile_update,
    with_rows_of,
)
from vqgan_jax.training.encoding import encode_raw
from vqgan_jax.training.hardware import chip_of, forward_flops
from vqgan_jax.training.learner import Learner
from vqgan_jax.training.opening import data_line, model_line, num_parameters
from vqgan_jax.training.pictures import tiled
from vqgan_jax.training.run_tokenizers import keep_tokenizers, tokenizers_of_run
from vqgan_jax.training.sharding import batch_sharding, replicated, state_shardings
from vqgan_jax.training.states import TransformerState
from vqgan_jax.training.transformer_setup import (
    check_all_codes,
    condition_sources,
    images_config,
    resolved,
)
from vqgan_jax.training.transformer_step import transformer_evaluation_step
from vqgan_jax.training.warm_start import initial_params

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
        self._tokenizer, self._of_conditions = tokenizers_of_run(config, workdir)
        self._splits = (config.data.train_split, config.data.validation_split)
        self._codes = None
        if config.data.codes:
            root = pathlib.Path(config.data.codes)
            self._codes = [open_codes(root / split) for split in self._splits]
        self.config = config = resolved(config, self._tokenizer, self._of_conditions, self._codes)
        if self._codes is None:
            self._images_config = images_config(config, self._tokenizer)
            self._sources = condition_sources(config, self._tokenizer)
        else:
            check_all_codes(config, self._tokenizer, self._of_conditions, self._codes)
        self._verifications = [
            Verification(codes, jax.process_index(), jax.process_count())
            for codes in self._codes or ()
        ]

        self._micro_batch_size = config.training.batch_size // config.optimizer.accumulate
        self._rows = batch_sharding(mesh, self._micro_batch_size, "the micro-batch size")
        self._whole = replicated(mesh)
        self._learner = Learner.from_config(config)
        self.abstract_state = jax.eval_shape(self._learner.init)
        self.layout = state_shardings(self.abstract_state, config.sharding_rules, mesh)
        self._update = compile_update(self._learner, self.layout, mesh)
        self._judge = jax.jit(
            with_rows_of(mesh, functools.partial(transformer_evaluation_step, self._learner)),
            out_shardings=self._whole,
        )
        # On every device as a whole, so as they are used: matrices are half as large in bfloat16.
        self._for_sampling = jax.jit(
            functools.partial(cast_kernels, dtype=self._learner.transformer.dtype),
            out_shardings=self._whole,
        )
        # From batch to codes, by the name that they have there: the images' and the conditions'.
        self._encoders = {
            name: jax.jit(
                functools.partial(encode_raw, tokenizer),
                out_shardings=self._rows,
                compiler_options=compile_options(),
            )
            for name, tokenizer in self._tokenizers.items()
        }

        self._num_images = self._counts()
        limit, validation = config.training.evaluation_images, self._num_images[1]
        self.num_evaluated = min(limit or validation, validation)
        chip = chip_of(mesh.devices.flat[0])
        num_codes = math.prod(config.model.grid)
        flops = 3.0 * forward_flops(self._learner.transformer, num_codes)
        self._num_codes = num_codes
        self._peak_share = flops / (chip.flops * mesh.devices.size) if chip else None

    def _counts(self) -> tuple[int, int]:
        """Images of the training and the validation split."""
        if self._codes is not None:
            return len(self._codes[0]), len(self._codes[1])
        config = self._images_config
        train, validation = (
            len(open_configured(config.data, split, config.model.resolution))
            for split in self._splits
        )
        return train, validation

    def opening_lines(self) -> list[str]:
        """The model and the data, for people."""
        parameters = {"model": num_parameters(self.abstract_state.params)}
        counts = dict(zip(self._splits, self._num_images, strict=True))
        name = f"codes {self.config.data.codes}" if self._codes else self.config.data.name
        return [
            model_line(self.config, parameters),
            data_line(name, counts, self.config.condition.num_classes),
        ]

    def compiles(self, step: int) -> str:
        """All steps are one program."""
        del step
        return ""

    def batches(self, start_step: int) -> Iterator:
        """Batches for the steps from `start_step` on; its `close()` ends their threads."""
        if self._codes is None:
            return training_batches(
                self._images_config, self._rows, start_step, conditions=self._sources
            )
        return training_code_batches(self._codes[0], self.config, self._rows, start_step)

    def check_data(self) -> None:
        """Raises `DataError` where a file of codes is not as it was written."""
        for verification in self._verifications:
            verification.wait()

    def init(self, batch) -> TransformerState:
        """The state before the first step, born on the devices."""
        del batch
        path = self.config.training.initialize_from
        if path:
            params = initial_params(path, self.abstract_state.params)
            state = compile_init(self._learner.init_from, self.layout)(params)
        else:
            state = compile_init(self._learner.init, self.layout)()
        # Not before all checks: a run that cannot begin leaves no tokenizer to the next try.
        keep_tokenizers(self._tokenizer, self._of_conditions, self._workdir)
        return state

    def update(self, state: TransformerState, batch, step: int) -> tuple[TransformerState, dict]:
        """One update."""
        del step
        return self._update(state, self._tokens_of(batch))

    def _tokens_of(self, batch):
        """A batch as it is, or with the codes that the frozen tokenizers give its images."""
        if "codes" in batch:
            return batch
        encoded = {
            name: encode(self._tokenizer_variables[name], batch[name])
            for name, encode in self._encoders.items()
        }
        rest = {name: values for name, values in batch.items() if name not in encoded}
        return {"codes": encoded.pop("image")} | rest | encoded

    @property
    def _tokenizers(self):
        """All of them, by the names of what they encode in a batch of images."""
        return {"image": self._tokenizer} | self._of_conditions

    @functools.cached_property
    def _tokenizer_variables(self):
        """On all devices; by way of the host, as the device that has them is of one process."""
        variables = {name: own.variables for name, own in self._tokenizers.items()}
        return jax.device_put(jax.device_get(variables), self._whole)

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
            batches = evaluation_batches(
                self._images_config, self._rows, size, limit, conditions=self._sources
            )
        else:
            batches = evaluation_code_batches(self._codes[1], self.config, self._rows, size, limit)
        with contextlib.closing(batches):
            sums = [
                self._judge(state.inference_params, self._tokens_of(batch), mask)
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
        return Generator(self.config, None, self._tokenizer, self._of_conditions)

    def pictures(self, state: TransformerState) -> np.ndarray:
        """Samples, of classes spread over all where there are any, `(H, W, 3)` uint8."""
        count = self.config.training.grid_images
        params = self._for_sampling(state.inference_params)
        # Every process draws all of them by itself, from what its own first device has.
        params = jax.tree.map(lambda leaf: leaf.addressable_data(0), params)
        generator = self._generator.with_params(params)
        draw = functools.partial(generator.sample, seed=self.config.seed)
        kinds = self.config.condition.kinds
        if set(kinds) <= {"class", "coordinates"}:
            classes = np.arange(count) * self.config.condition.num_classes // count
            images = draw(num_samples=count, condition=classes if "class" in kinds else None)
        else:  # those of the validation split, each beside its sample
            rows = self._pictured
            samples = draw(num_samples=len(rows["codes"]), rows=rows)
            shown = [*generator.condition_pictures(rows), samples]
            images = np.stack(shown, axis=1).reshape(-1, *samples.shape[1:])
        return tiled(images, columns=8, enlarge=max(1, 128 // images.shape[1]))

    @functools.cached_property
    def _pictured(self) -> dict[str, np.ndarray]:
        """Codes and conditions of some images of the validation split, evenly spaced."""
        count = self.config.training.grid_images // 2
        if self._codes is not None:
            return self._codes[1].rows(spaced_indices(len(self._codes[1]), count))
        examples = evaluation_examples(self._images_config, count, self._sources)
        codes = {
            name: np.asarray(jax.jit(functools.partial(encode_raw, own))(own.variables, images))
            for name, own in self._tokenizers.items()
            for images in (examples.pop(name),)
        }
        return {"codes": codes.pop("image")} | examples | codes
