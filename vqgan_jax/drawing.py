"""What the command that draws images has to draw, and what it shows meanwhile."""

import functools
import hashlib
import io
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from PIL import Image

from vqgan_jax.conditions.files import in_turn, read_known_part
from vqgan_jax.conditions.layouts import Layout
from vqgan_jax.errors import DataError
from vqgan_jax.sampling.sliding_window import steps_of_codes
from vqgan_jax.training.progress import format_duration

REPORT_SECONDS = 10.0
WINDOWS = 16  # of the transformer, at a time


class Drawing:
    """What is to be drawn, for any numbers of samples.

    Attributes:
        generator: draws it.
        grid: rows and columns of codes.
        given: by kind of condition, values for the samples in turn.
        options: of `Generator.sample_codes`, the same for all samples.
    """

    def __init__(self, generator, grid: tuple[int, int], given: Mapping[str, Sequence], options):
        self.generator, self.grid, self.given, self.options = generator, grid, given, options
        self.size = generator.size_of(grid)
        self._known, self._known_mask = None, None

    @property
    def slides(self) -> bool:
        """Whether images are larger than those of the training."""
        return self.grid != tuple(self.generator.config.model.grid)

    @property
    def batch_size(self) -> int:
        """Samples at once on a device: as many as make `WINDOWS` windows at a time, at least 1."""
        in_flight = -(-self.grid[1] // self.generator.config.model.grid[1])
        return max(1, WINDOWS // in_flight)

    def complete(self, path: str, keep: str) -> None:
        """Keeps a part of an image, exactly in codes; see `read_known_part`."""
        tokenizer = self.generator.tokenizer
        if tokenizer.config.data.num_labels:
            raise DataError("--complete takes a picture, and this model draws label maps.")
        pixels, known = read_known_part(path, keep, self.size, tokenizer.factor)
        codes = tokenizer.encode_raw(pixels[None])
        self._known, self._known_mask = np.asarray(codes).reshape(-1), known.reshape(-1)

    def settings(self) -> dict:
        """What samples depend on beside seed, classes and options, for `settings.json`."""
        settings = {"size": list(self.size)}
        files = {kind: values for kind, values in self.given.items() if kind != "class"}
        for kind, values in files.items():
            digest = hashlib.sha256()
            for value in values:
                digest.update(_bytes_of_layout(value) if kind == "layout" else value.tobytes())
            settings[f"condition {kind}"] = digest.hexdigest()
        if self._known is not None:
            known = np.where(self._known_mask, self._known, -1)
            settings["known"] = hashlib.sha256(known.astype("<i4").tobytes()).hexdigest()
        return settings

    def is_drawn(self, step: int) -> np.ndarray:
        """Which codes are there after so many steps of a window that slides, bool `(h, w)`."""
        known = False if self._known is None else self._known_mask.reshape(self.grid)
        return (self._steps < step) | known

    def work(self, step: int) -> int:
        """How many of the first steps have something to draw; the others cost nothing."""
        known = np.zeros(self.grid, bool) if self._known is None else self.is_drawn(0)
        steps = np.unique(self._steps[~known])
        return int(np.count_nonzero(steps < step))

    @functools.cached_property
    def _steps(self) -> np.ndarray:
        return steps_of_codes(*self.grid, self.generator.config.model.grid[1])

    def draw(self, numbers: np.ndarray, batch_size: int, on_progress=None) -> np.ndarray:
        """The codes of samples by number, `(len(numbers), h, w)`."""
        condition = {
            kind: values if len(values) == 1 and kind != "class" else in_turn(values, numbers)
            for kind, values in self.given.items()
        }
        codes = self.generator.sample_codes(
            num_samples=len(numbers),
            condition=condition or None,
            indices=numbers,
            batch_size=batch_size,
            height=self.size[0],
            width=self.size[1],
            known=self._known,
            known_mask=self._known_mask,
            on_progress=on_progress,
            **self.options,
        )
        return codes.reshape(-1, *self.grid)


def _bytes_of_layout(layout: Layout) -> bytes:
    objects = [(item.label, item.box, sorted(item.attributes)) for item in layout.objects]
    return repr((objects, layout.crop)).encode()


class Film:
    """Watches images form: prints how far they are, and keeps pictures of it."""

    def __init__(self, drawing: Drawing, show: bool):
        """Of a batch of samples; `show` keeps pictures of the first one."""
        self.show, self._drawing = show, drawing
        self._frames: list[tuple[int, np.ndarray]] = []
        self._first: tuple[float, int] | None = None  # time and work: compilation lies before
        self._reported = time.monotonic()

    def __call__(self, step: int, total: int, codes: np.ndarray) -> None:
        """Takes in the codes `(B, h, w)` after a step."""
        if self.show:
            self._frames.append((step, np.array(codes[:1])))
        now, work = time.monotonic(), self._drawing.work(step)
        if self._first is None and work > 0:
            self._first = now, work
        if jax.process_index() == 0 and (now - self._reported > REPORT_SECONDS or step == total):
            start, done = self._first or (now, work)
            text = f"step {step}/{total}"
            if work > done:
                remaining = self._drawing.work(total) - work
                text += f"  left {format_duration((now - start) * remaining / (work - done))}"
            print(text, flush=True)
            self._reported = now

    def encoded(self) -> bytes:
        """An animated GIF of the first sample, grey where there is nothing yet."""
        frames = []
        for step, codes in self._frames:
            image = self._drawing.generator.decode(codes)[0]
            factor = self._drawing.generator.tokenizer.factor
            drawn = self._drawing.is_drawn(step).repeat(factor, axis=0).repeat(factor, axis=1)
            frames.append(Image.fromarray(np.where(drawn[..., None], image, np.uint8(128))))
        content = io.BytesIO()
        frames[0].save(
            content,
            format="gif",
            save_all=True,
            append_images=frames[1:],
            duration=[100] * (len(frames) - 1) + [2000],
            loop=0,
        )
        return content.getvalue()
