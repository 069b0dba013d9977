"""Trained transformers for other programs: codes and images drawn from them."""

import copy
import functools
import hashlib
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from vqgan_jax.inference import Tokenizer
from vqgan_jax.sampling.decoding import sample_codes
from vqgan_jax.sampling.filters import Filters
from vqgan_jax.sampling.guidance import SCHEDULES, guidance_scales
from vqgan_jax.sampling.likelihood import log_likelihood
from vqgan_jax.training.learner import make_conditions, make_transformer
from vqgan_jax.training.pictures import intensities_to_rgb, label_colors

Condition = int | str | Sequence[int] | Sequence[str] | np.ndarray | None


class Generator:
    """A transformer with its tokenizer: draws codes and decodes them to images.

    Attributes:
        config: the config of its training, resolved.
        params: the transformer's.
        tokenizer: what decodes its codes.
        class_names: empty where classes have no names.
        num_codes: of an image.
    """

    def __init__(self, config: ConfigDict, params, tokenizer: Tokenizer):
        """A generator around given parameters; `load` makes one from files."""
        self.config, self.params, self.tokenizer = config, params, tokenizer
        self.class_names = config.condition.class_names
        self.num_codes = math.prod(config.model.grid)
        self._transformer = make_transformer(config)
        devices = jax.local_devices()
        mesh = jax.make_mesh(
            (len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices
        )
        self._num_devices = len(devices)
        self._rows = NamedSharding(mesh, PartitionSpec("data"))
        self._whole = NamedSharding(mesh, PartitionSpec())
        # Compiled when they are first used, and shared by what `with_params` makes.
        self._draw = self._on_each_device(self._draw_rows, 4)
        self._decode = self._on_each_device(self._decode_rows, 1)
        self._likelihood = jax.jit(self._log_likelihood)

    def with_params(self, params) -> "Generator":
        """The same with other parameters, without compiling anything anew."""
        other = copy.copy(self)
        other.params = params
        for name in ("_params", "fingerprint"):
            vars(other).pop(name, None)
        return other

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all parameters, the transformer's and the tokenizer's."""
        digest = hashlib.sha256()
        for tree in (self.params, self.tokenizer.variables):
            for leaf in jax.tree.leaves(tree):
                digest.update(np.ascontiguousarray(leaf).data)
        return digest.hexdigest()

    def sample(self, seed: int = 0, num_samples: int = 16, **options) -> np.ndarray:
        """Draws images; options as of `sample_codes`.

        Returns:
            `(num_samples, H, W, 3)` uint8.
        """
        height, width = options.get("height"), options.get("width")
        grid = self._grid(height, width)
        codes = self.sample_codes(seed, num_samples, **options)
        size = self._rows_at_once(options.get("batch_size"), num_samples)
        parts = _padded_parts(codes.reshape(-1, *grid), size)
        images = [
            self._decode(self._tokenizer_variables, jax.device_put(part, self._rows))
            for part in parts
        ]
        return np.concatenate([self._to_rgb(part) for part in images])[:num_samples]

    def sample_codes(
        self,
        seed: int = 0,
        num_samples: int = 16,
        condition: Condition = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        known: np.ndarray | None = None,
        known_mask: np.ndarray | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> np.ndarray:
        """Draws codes, a whole batch in one compiled program.

        Sample number i depends on `seed` and i alone, up to rounding: not on the batch that it is
        drawn in, nor on the number of devices.

        Args:
            seed: of the noise.
            num_samples: how many.
            condition: a class, or one for each sample, by number or name; None for no class.
            temperature: 0 takes the most likely code. None here and below: as the config says.
            top_k: so many most likely codes; 0 for all.
            top_p: the most likely codes that together reach this probability.
            guidance_scale: 1 is no guidance.
            guidance_schedule: "constant", "linear" or "cosine".
            known: `(num_samples, N)` or `(N,)` codes, of which those in `known_mask` are kept.
            known_mask: like `known`, bool: any part of the image.
            indices: the samples' numbers; None for 0, 1, ...
            batch_size: samples at once on each device; None for all, at most 64.
            height: of the images in pixels; None for that of the training's.
            width: the same.

        Returns:
            `(num_samples, N)` int32.

        Raises:
            ValueError: an option cannot be.
        """
        self._grid(height, width)
        _check(num_samples >= 1, f"num_samples is {num_samples}; it must be at least 1.")
        settings = self.settings(temperature, top_k, top_p, guidance_scale, guidance_schedule)
        labels = self.labels(condition, num_samples)
        top_p, scale = settings["top_p"], settings["guidance_scale"]
        filters = Filters(
            temperature=np.float32(settings["temperature"]),
            top_p=None if top_p == 1.0 else np.float32(top_p),
            top_k=min(settings["top_k"], self.config.model.codebook_size),
        )
        scales = None
        if scale != 1.0:
            scales = guidance_scales(scale, self.num_codes, settings["guidance_schedule"])
        known, known_mask = self._known(known, known_mask, num_samples)
        indices = np.asarray(range(num_samples) if indices is None else indices, np.uint32)
        _check(len(indices) == num_samples, f"{len(indices)} indices for {num_samples} samples.")

        size = self._rows_at_once(batch_size, num_samples)
        parts = [_padded_parts(array, size) for array in (labels, indices, known, known_mask)]
        drawn = []
        for rows in zip(*parts, strict=True):
            rows = jax.device_put(rows, self._rows)
            drawn.append(self._draw(self._params, jax.random.key(seed), filters, scales, *rows))
        return np.concatenate(jax.device_get(drawn))[:num_samples]

    def settings(
        self,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
    ) -> dict[str, float | int | str]:
        """How codes are drawn with these options of `sample_codes`, by name; none is None.

        Raises:
            ValueError: an option cannot be.
        """
        given = dict(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
        )
        defaults = self.config.sampling
        found = {name: defaults[name] if v is None else v for name, v in given.items()}
        temperature, top_k, top_p, scale, schedule = found.values()
        _check(temperature >= 0.0, f"temperature is {temperature}; it must not be negative.")
        _check(top_k >= 0, f"top_k is {top_k}; it must not be negative.")
        _check(0.0 < top_p <= 1.0, f"top_p is {top_p}; it must be in (0, 1].")
        _check(
            scale == 1.0 or self.config.condition.dropout > 0.0,
            "guidance needs a model that was trained without classes too "
            "(config.condition.dropout).",
        )
        _check(
            schedule in SCHEDULES,
            f"guidance_schedule is {schedule!r}; it must be one of {', '.join(SCHEDULES)}.",
        )
        return found

    def log_likelihood(self, codes: np.ndarray, condition: Condition = None) -> np.ndarray:
        """The logarithm of each code's probability given those before it, in nats.

        Args:
            codes: `(B, N)` or, as a tokenizer gives them, `(B, h, w)` integers.
            condition: as of `sample_codes`.

        Returns:
            `(B, N)` float32.

        Raises:
            ValueError: they are not codes of this model's grid.
        """
        codes = np.asarray(codes, np.int32)
        rows, columns = self.config.model.grid
        _check(
            codes.shape[1:] in ((self.num_codes,), (rows, columns)),
            f"codes have shape {codes.shape}; this model's are (B, {rows}, {columns}) or "
            f"(B, {self.num_codes}).",
        )
        self._check_range(codes, "codes")
        codes = codes.reshape(len(codes), self.num_codes)
        labels = self.labels(condition, len(codes))
        return np.asarray(self._likelihood(self._params, labels, codes))

    def labels(self, condition: Condition, num_samples: int) -> np.ndarray:
        """The class of each sample, `(num_samples,)` int32, -1 for none.

        Raises:
            ValueError: there is no such class, or the model needs one.
        """
        settings = self.config.condition
        if condition is None:
            _check(
                settings.kind == "none" or settings.dropout > 0.0,
                f"this model draws images of a class: condition must be one of its "
                f"{settings.num_classes} classes.",
            )
            return np.full(num_samples, -1, np.int32)
        _check(settings.kind == "class", "this model has no classes; condition must be None.")
        one_for_all = isinstance(condition, str) or np.ndim(condition) == 0
        wanted = [condition] * num_samples if one_for_all else list(condition)
        _check(
            len(wanted) == num_samples,
            f"condition has {len(wanted)} classes for {num_samples} samples.",
        )
        return np.array([self._class_number(name) for name in wanted], np.int32)

    def _class_number(self, name: int | str) -> int:
        count = self.config.condition.num_classes
        if isinstance(name, str) and not name.isdigit():
            names = ", ".join(self.class_names) or f"0 to {count - 1}"
            _check(name in self.class_names, f"there is no class {name!r}; there are {names}.")
            return self.class_names.index(name)
        _check(0 <= int(name) < count, f"there is no class {name}; there are 0 to {count - 1}.")
        return int(name)

    def _known(self, known, known_mask, num_samples):
        shape = (num_samples, self.num_codes)
        if known is None:
            return np.zeros(shape, np.int32), np.zeros(shape, bool)
        _check(known_mask is not None, "known codes need known_mask, which says where they are.")
        known = np.broadcast_to(np.asarray(known, np.int32), shape)
        self._check_range(known, "known codes")
        return known, np.broadcast_to(np.asarray(known_mask, bool), shape)

    def _check_range(self, codes: np.ndarray, name: str) -> None:
        size = self.config.model.codebook_size
        inside = codes.size == 0 or (codes.min() >= 0 and codes.max() < size)
        _check(inside, f"{name} are outside of 0 to {size - 1}.")

    def _grid(self, height: int | None, width: int | None) -> tuple[int, int]:
        rows, columns = self.config.model.grid
        size = rows * self.tokenizer.factor, columns * self.tokenizer.factor
        asked = height or size[0], width or size[1]
        _check(asked == size, f"this model draws images of {size[0]}x{size[1]} pixels.")
        return rows, columns

    def _rows_at_once(self, batch_size: int | None, num_samples: int) -> int:
        on_each = batch_size or min(64, -(-num_samples // self._num_devices))
        return on_each * self._num_devices

    @functools.cached_property
    def _params(self):
        return jax.device_put(self.params, self._whole)

    @functools.cached_property
    def _tokenizer_variables(self):
        return jax.device_put(self.tokenizer.variables, self._whole)

    def _on_each_device(self, function, num_whole: int):
        """A function of rows, compiled for one device's rows, so that others do not matter.

        Its first `num_whole` arguments are for all rows; of the others each device has its own.
        It takes the compiler's defaults: with the options of training, convolutions on a CPU are
        rounded otherwise where there are more devices.
        """

        def on_each_device(*arguments):
            whole, rows = PartitionSpec(), PartitionSpec("data")
            specs = (whole,) * num_whole + (rows,) * (len(arguments) - num_whole)
            return jax.shard_map(
                function, mesh=self._rows.mesh, in_specs=specs, out_specs=rows, check_vma=False
            )(*arguments)

        return jax.jit(on_each_device)

    def _draw_rows(self, params, key, filters, scales, labels, indices, known, known_mask):
        condition = self.config.condition
        null = None
        if scales is not None:
            null = make_conditions(condition, jnp.full_like(labels, -1))
        return sample_codes(
            self._transformer,
            params,
            make_conditions(condition, labels),
            key,
            indices,
            filters,
            known,
            known_mask,
            null,
            scales,
        )

    def _decode_rows(self, variables, codes):
        return self.tokenizer.module.apply(variables, codes, method="decode")

    def _log_likelihood(self, params, labels, codes):
        conditions = make_conditions(self.config.condition, labels)
        return log_likelihood(self._transformer, params, conditions, codes)

    def _to_rgb(self, decoded: jax.Array) -> np.ndarray:
        """What the tokenizer decodes, as pictures: label maps in their colours."""
        num_labels = self.tokenizer.config.data.num_labels
        if num_labels > 0:
            return label_colors(num_labels)[np.argmax(decoded, axis=-1)]
        return intensities_to_rgb(np.asarray(decoded))


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _padded_parts(array: np.ndarray, size: int) -> list[np.ndarray]:
    """Rows in parts of `size`, the last one filled up with its last row."""
    missing = -len(array) % size
    filled = np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])
    return np.split(filled, len(filled) // size)
