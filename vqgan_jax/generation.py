"""Trained transformers for other programs: codes and images drawn from them."""

import copy
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from vqgan_jax.conditions.given import Condition, GivenConditions
from vqgan_jax.conditions.kinds import Conditions
from vqgan_jax.inference import Tokenizer
from vqgan_jax.models.orders import ROW_MAJOR
from vqgan_jax.models.tiled_decoding import decode_codes
from vqgan_jax.sampling.decoding import sample_codes
from vqgan_jax.sampling.filters import Filters
from vqgan_jax.sampling.guidance import SCHEDULES, guidance_scales
from vqgan_jax.sampling.likelihood import log_likelihood
from vqgan_jax.sampling.sliding_window import num_steps, sample_steps
from vqgan_jax.training.learner import make_transformer
from vqgan_jax.training.pictures import intensities_to_rgb, label_colors

STEPS, REPORTS = 64, 40  # of a sliding window: steps between two reports at most; reports


class Generator:
    """A transformer with its tokenizer: draws codes and decodes them to images.

    Attributes:
        config: the config of its training, resolved.
        params: the transformer's.
        transformer: the network, a Flax module.
        tokenizer: what decodes its codes.
        of_conditions: the tokenizers of its condition images, by name.
        given: how conditions are given.
        class_names: empty where classes have no names.
    """

    def __init__(
        self,
        config: ConfigDict,
        params,
        tokenizer: Tokenizer,
        of_conditions: Mapping[str, Tokenizer] | None = None,
    ):
        """A generator around given parameters; `load` makes one from files."""
        self.config, self.params, self.tokenizer = config, params, tokenizer
        self.of_conditions = dict(of_conditions or {})
        self.given = GivenConditions(config, tokenizer.factor, self.of_conditions)
        self.class_names = config.condition.class_names
        self.transformer = make_transformer(config)
        self._conditions = Conditions.from_config(config)
        # Of the two in the middle of a window, the reference's scenes have the earlier code there.
        later = 0 if "layout" in config.condition.kinds else 1
        self._middle = tuple((size - 1 + later) // 2 for size in config.model.grid)
        devices = jax.local_devices()
        mesh = jax.make_mesh(
            (len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices
        )
        self._num_devices = len(devices)
        self._rows = NamedSharding(mesh, PartitionSpec("data"))
        self._whole = NamedSharding(mesh, PartitionSpec())
        # Compiled when they are first used, and shared by what `with_params` makes.
        self._draw = self._on_each_device(self._draw_rows, 4)
        self._slide = self._on_each_device(self._slide_rows, 6)
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
        """SHA-256 of all parameters, the transformer's and the tokenizers'."""
        digest = hashlib.sha256()
        of_conditions = [own.variables for _, own in sorted(self.of_conditions.items())]
        for tree in (self.params, self.tokenizer.variables, *of_conditions):
            for leaf in jax.tree.leaves(tree):
                digest.update(np.ascontiguousarray(leaf).data)
        return digest.hexdigest()

    def sample(self, seed: int = 0, num_samples: int = 16, **options) -> np.ndarray:
        """Draws images; options as of `sample_codes`.

        Returns:
            `(num_samples, H, W, 3)` uint8.
        """
        grid = self.grid(options.get("height"), options.get("width"))
        codes = self.sample_codes(seed, num_samples, **options)
        return self.decode(codes.reshape(-1, *grid), options.get("batch_size"))

    def decode(self, codes: np.ndarray, batch_size: int | None = None) -> np.ndarray:
        """Codes `(B, h, w)` -> images `(B, H, W, 3)` uint8; label maps in their colours."""
        size = self._rows_at_once(batch_size, len(codes))
        images = [
            self._decode(self._tokenizer_variables, jax.device_put(part, self._rows))
            for part in _batches(codes, size)
        ]
        return np.concatenate([to_rgb(self.tokenizer, part) for part in images])[: len(codes)]

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
        on_progress: Callable[[int, int, np.ndarray], None] | None = None,
        rows: Mapping[str, np.ndarray] | None = None,
    ) -> np.ndarray:
        """Draws codes, a whole batch in one compiled program.

        An image larger than those of the training is drawn through a window that slides over it.

        Sample number i depends on `seed` and i alone, up to rounding: not on the batch that it is
        drawn in, nor on the number of devices.

        Args:
            seed: of the noise.
            num_samples: how many.
            condition: as of `GivenConditions.batch`: a class, or one for each sample, by number or
                name; pictures; layouts; None for no condition.
            temperature: 0 takes the most likely code. None here and below: as the config says.
            top_k: so many most likely codes; 0 for all.
            top_p: the most likely codes that together reach this probability.
            guidance_scale: 1 is no guidance.
            guidance_schedule: "constant", "linear" or "cosine".
            known: `(num_samples, N)` or `(N,)` codes, of which those in `known_mask` are kept; N
                codes are those of the whole image, row by row.
            known_mask: like `known`, bool: any part of the image.
            indices: the samples' numbers; None for 0, 1, ...
            batch_size: samples at once on each device; None for all, at most 64.
            height: of the images in pixels, at least that of the training's; None for that.
            width: the same.
            on_progress: called some 40 times for each part of `batch_size` with the steps made,
                all steps of the part, and its codes so far `(B, h, w)`, 0 where there are none
                yet and with the last row again where the part is not full; each code then costs a
                whole forward pass, as it does in larger images.
            rows: of a batch of `num_samples` codes, whose conditions are taken; with no
                `condition`.

        Returns:
            `(num_samples, N)` int32.

        Raises:
            ValueError: an option cannot be.
        """
        grid = self.grid(height, width)
        if on_progress is not None:
            self.check_window("pictures of images as they form")
        _check(num_samples >= 1, f"num_samples is {num_samples}; it must be at least 1.")
        settings = self.settings(temperature, top_k, top_p, guidance_scale, guidance_schedule)
        if rows is None:
            rows = self.given.batch(condition, num_samples, grid)
        else:
            rows = self._conditions.read(rows)
        top_p, scale = settings["top_p"], settings["guidance_scale"]
        filters = Filters(
            temperature=np.float32(settings["temperature"]),
            top_p=None if top_p == 1.0 else np.float32(top_p),
            top_k=min(settings["top_k"], self.config.model.codebook_size),
        )
        scales = None
        if scale != 1.0:
            scales = guidance_scales(scale, math.prod(grid), settings["guidance_schedule"])
        indices = np.asarray(range(num_samples) if indices is None else indices, np.uint32)
        _check(len(indices) == num_samples, f"{len(indices)} indices for {num_samples} samples.")
        known, known_mask = self._known(known, known_mask, num_samples, math.prod(grid))

        size = self._rows_at_once(batch_size, num_samples)
        whole = self._params, jax.random.key(seed), filters, scales
        slides = on_progress is not None or grid != tuple(self.config.model.grid)
        drawn = []
        for part in _batches((rows, indices, known, known_mask), size):
            part = jax.device_put(part, self._rows)
            if slides:
                drawn.append(self._slide_over(grid, whole, part, on_progress))
            else:
                drawn.append(self._draw(*whole, *part))
        return np.concatenate(jax.device_get(drawn))[:num_samples]

    def _slide_over(self, grid, whole, part, on_progress) -> jax.Array:
        """Draws large images, some steps at a time, so that there is something to see of it."""
        params, key, filters, scales = whole
        rows, indices, known, known_mask = part
        codes, mask = known.reshape(-1, *grid), known_mask.reshape(-1, *grid)
        scales = None if scales is None else scales.reshape(grid)
        total = num_steps(*grid, self.config.model.grid[1])
        count = min(STEPS, math.ceil(total / REPORTS))
        for first in range(0, total, count):
            codes = self._slide(
                params, key, filters, scales, first, count, rows, indices, codes, mask
            )
            if on_progress is not None:
                on_progress(min(first + count, total), total, np.asarray(codes))
        return codes.reshape(len(codes), -1)

    def condition_pictures(self, rows: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """What the conditions of a batch of codes look like, `(B, H, W, 3)` uint8 each; no class.

        Images are as their tokenizers decode them: what the transformer knows of them.
        """
        pictures = []
        for kind in self._conditions.kinds:
            if kind.name in self.of_conditions:
                tokenizer = self.of_conditions[kind.name]
                codes = np.asarray(rows[kind.name]).reshape(-1, *kind.shape)
                pictures.append(to_rgb(tokenizer, tokenizer.decode(codes)))
            elif kind.name != "class":
                size = self.size_of(self.config.model.grid)
                pictures.append(np.stack([kind.picture(t, *size) for t in rows[kind.name]]))
        return pictures

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
            "guidance needs a model that was trained without conditions too "
            "(config.condition.dropout).",
        )
        _check(
            schedule in SCHEDULES,
            f"guidance_schedule is {schedule!r}; it must be one of {', '.join(SCHEDULES)}.",
        )
        return found

    def log_likelihood(self, codes: np.ndarray, condition: Condition = None) -> np.ndarray:
        """The logarithm of each code's probability given those before it in the model's order.

        Args:
            codes: `(B, N)` or, as a tokenizer gives them, `(B, h, w)` integers.
            condition: as of `sample_codes`.

        Returns:
            `(B, N)` float32, in nats, row by row.

        Raises:
            ValueError: they are not codes of this model's grid.
        """
        codes = np.asarray(codes, np.int32)
        rows, columns = grid = tuple(self.config.model.grid)
        _check(
            codes.shape[1:] in ((rows * columns,), grid),
            f"codes have shape {codes.shape}; this model's are (B, {rows}, {columns}) or "
            f"(B, {rows * columns}).",
        )
        self._check_range(codes, "codes")
        codes = codes.reshape(len(codes), -1)
        given = self.given.batch(condition, len(codes), grid)
        return np.asarray(self._likelihood(self._params, given, codes))

    def _known(self, known, known_mask, num_samples, num_codes):
        shape = (num_samples, num_codes)
        if known is None:
            return np.zeros(shape, np.int32), np.zeros(shape, bool)
        _check(known_mask is not None, "known codes need known_mask, which says where they are.")
        known = np.broadcast_to(np.asarray(known, np.int32), shape)
        known_mask = np.broadcast_to(np.asarray(known_mask, bool), shape)
        self._check_range(known, "known codes")
        return np.where(known_mask, known, 0), known_mask

    def _check_range(self, codes: np.ndarray, name: str) -> None:
        size = self.config.model.codebook_size
        inside = codes.size == 0 or (codes.min() >= 0 and codes.max() < size)
        _check(inside, f"{name} are outside of 0 to {size - 1}.")

    def grid(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Rows and columns of codes of an image with these sides in pixels; None as in training.

        Raises:
            ValueError: the image would be smaller than the training's, or of broken codes, or it
                would be larger and the model's order of codes is none for larger images.
        """
        factor, sizes = self.tokenizer.factor, []
        step = math.lcm(factor, *(own.factor for own in self.of_conditions.values()))
        for name, asked, window in zip(
            ("height", "width"), (height, width), self.config.model.grid, strict=True
        ):
            pixels = asked or window * factor
            _check(
                pixels % step == 0 and pixels >= window * factor,
                f"{name} is {pixels}; it must be a multiple of {step} pixels and at least "
                f"{window * factor}, the size of the images that the model was trained on.",
            )
            sizes.append(pixels // factor)
        if tuple(sizes) != tuple(self.config.model.grid):
            self.check_window("images larger than those of the training")
        return tuple(sizes)

    def check_window(self, what: str) -> None:
        """Raises `ValueError` where codes cannot be drawn through a window, which `what` needs."""
        order = self.config.model.order
        _check(
            order == ROW_MAJOR,
            f"{what} are drawn through a sliding window, which needs a model of the order "
            f"{ROW_MAJOR}; this model's order of codes is {order} (config.model.order).",
        )

    def size_of(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Height and width in pixels of an image of `grid` codes."""
        return grid[0] * self.tokenizer.factor, grid[1] * self.tokenizer.factor

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

    def _contexts(self, given, guided: bool, indices) -> tuple[list, list | None]:
        """The parts of the conditions, and those of no condition for guidance."""
        batch = given or {"indices": indices}
        null = self._conditions.parts(batch, dropped=True) if guided else None
        return self._conditions.parts(batch), null

    def _draw_rows(self, params, key, filters, scales, given, indices, known, known_mask):
        parts, null = self._contexts(given, scales is not None, indices)
        return sample_codes(
            self.transformer,
            params,
            _joined(parts),
            key,
            indices,
            filters,
            known,
            known_mask,
            None if null is None else _joined(null),
            scales,
        )

    def _slide_rows(self, params, key, filters, scales, first, count, given, indices, codes, mask):
        parts, null = self._contexts(given, scales is not None, indices)
        return sample_steps(
            self.transformer,
            params,
            parts,
            key,
            indices,
            filters,
            codes,
            mask,
            first,
            count,
            null,
            scales,
            middle=self._middle,
        )

    def _decode_rows(self, variables, codes):
        return decode_codes(self.tokenizer.module, variables, codes)

    def _log_likelihood(self, params, given, codes):
        parts, _ = self._contexts(given, False, codes)
        return log_likelihood(self.transformer, params, _joined(parts), codes)


def to_rgb(tokenizer: Tokenizer, decoded: jax.Array) -> np.ndarray:
    """What a tokenizer decodes, as pictures, uint8: label maps in their colours."""
    num_labels = tokenizer.config.data.num_labels
    if num_labels > 0:
        return label_colors(num_labels)[np.argmax(decoded, axis=-1)]
    return intensities_to_rgb(np.asarray(decoded))


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _joined(parts: Sequence[jax.Array]) -> jax.Array:
    """The parts of conditions as one sequence of tokens, `(B, num_conditions)`."""
    return jnp.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)


def _batches(tree, size: int) -> Iterator:
    """A tree of arrays `(N, ...)` in parts of `size` rows, the last filled up with its last row."""
    count = len(jax.tree.leaves(tree)[0])
    for first in range(0, count, size):
        rows = np.minimum(np.arange(first, first + size), count - 1)
        yield jax.tree.map(lambda array, rows=rows: array[rows], tree)
