"""Images sampled from a transformer into a directory.

The output has a PNG for each sample, `000000.png` and so on; `grid.png`, an overview of the first
ones, with a row for each class; `samples.npz`, uint8 (N, H, W, 3) as `arr_0`, as public FID scripts
read it, with the classes as `labels`; and `animation.gif`, the first image as it forms. Of a model
with classes, samples are of all of them in turn, or of those that are named; of other conditions,
files are taken in turn. Images larger than those of the training are sampled through a window that
slides over them. What the options leave open is as the model's config says. A pass that was begun
in the output is completed.

Of a model with classes, a classifier can choose among more samples than are asked for, at an
acceptance of 0.5 the better half of twice as many; see `rejection`. Candidates are in
`candidates/`, each PNG with its score; the samples are the accepted ones, and `scores.json` says
which and how they scored.
"""

import contextlib
import io
import json
import math
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from PIL import Image

from vqgan_jax import distributed
from vqgan_jax.checkpoints.directory_lock import locked
from vqgan_jax.conditions.files import read_conditions
from vqgan_jax.configuration.memory import require_memory
from vqgan_jax.drawing import Drawing, Film
from vqgan_jax.errors import DataError
from vqgan_jax.rejection import (
    CANDIDATES,
    Rejection,
    accept,
    find_classifier,
    is_accepted,
    score_text,
)
from vqgan_jax.sample_files import (
    ARRAYS,
    SETTINGS,
    compare,
    finish,
    path_of,
    stored_samples,
    write_atomically,
)
from vqgan_jax.training.progress import format_duration

FORMATS = ("png", "grid", "npz")
ANIMATION = "animation.gif"
ACCEPTANCE = 0.5


def sample(
    checkpoint: str,
    output: str | pathlib.Path,
    num_samples: int,
    classes: Sequence[str] = (),
    formats: Sequence[str] = ("png", "grid"),
    batch_size: int | None = None,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    conditions: Mapping[str, str] | None = None,
    complete: str = "",
    keep: str = "top",
    animate: bool = False,
    classifier: str = "",
    acceptance: float | None = None,
    tokenizer: str = "",
    **options,
) -> None:
    """Draws what is missing of `num_samples` images and writes them to `output`.

    Args:
        checkpoint: a transformer's run directory, checkpoint or export.
        output: a directory that is new, empty, or was begun with the same settings.
        num_samples: how many there shall be.
        classes: of the samples in turn, by name or number; empty for all of the model.
        formats: of "png", "grid" and "npz".
        batch_size: samples at once on each device; None for 16, of large images as many as draw 16
            windows at a time.
        seed: of the noise.
        height: of the images in pixels; None as in training.
        width: the same.
        conditions: files or folders of files, by kind, for the samples in turn.
        complete: an image of which a part is kept; see `conditions.files.read_known_part`.
        keep: which half, where the image is not transparent.
        animate: whether to show how the first samples form.
        classifier: a function that chooses among more samples, as `MODULE:FUNCTION`; see
            `rejection.Rejection`. Empty for none.
        acceptance: the share of samples that it accepts, so that `num_samples` are left; None for
            `ACCEPTANCE`.
        tokenizer: that makes images of codes, as of `vqgan_jax.load`; empty for the model's own.
        **options: of `Generator.settings`; None as the model's config says.

    Raises:
        CheckpointError: of `vqgan_jax.load`, and where it is a tokenizer.
        DataError: an option cannot be, or `output` holds something else.
    """
    from vqgan_jax.generation import Generator
    from vqgan_jax.inference import load
    from vqgan_jax.training.checkpoints import CheckpointError

    output = pathlib.Path(output)
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise DataError(f"--format is {','.join(formats)}; it takes {', '.join(FORMATS)}.")
    if num_samples < 1 or (batch_size is not None and batch_size < 1):
        raise DataError("--num_samples and --batch_size must be at least 1.")
    generator = load(checkpoint, tokenizer)
    if not isinstance(generator, Generator):
        raise CheckpointError(f"{checkpoint} is a tokenizer; sample needs a transformer.")
    condition = generator.config.condition
    try:
        if not classes and "class" in condition.kinds:
            classes = range(condition.num_classes)
        if classes and "class" not in condition.kinds:
            raise ValueError("this model has no classes.")
        labels = generator.given.labels(list(classes), len(classes)) if classes else None
    except ValueError as error:
        raise DataError(f"--class: {error}") from error
    given = {} if labels is None else {"class": labels}
    files = {
        kind: read_conditions(condition, kind, path) for kind, path in (conditions or {}).items()
    }
    given |= {kind: list(values.values()) for kind, values in files.items()}
    try:
        options = generator.settings(**options)
        grid = generator.grid(height, width)
        if animate:
            generator.check_window("pictures of images as they form (--animate)")
    except ValueError as error:
        raise DataError(str(error)) from error
    pixels = math.prod(generator.size_of(grid)) * 3
    require_memory(
        num_samples * (pixels if "npz" in formats else 16),
        f"--num_samples={num_samples}",
        "draw fewer at a time, or without --format=npz",
    )
    require_memory(
        (batch_size or 1) * pixels * 4,
        f"A batch of {batch_size or 1} images of {' x '.join(map(str, generator.size_of(grid)))}",
        "take a smaller --batch_size, --height or --width",
    )
    for kind in condition.images.keys() & files.keys():
        for file, picture in files[kind].items():
            try:
                generator.given.check_image(kind, picture, generator.size_of(grid))
            except ValueError as error:
                raise DataError(f"{file}: {error}") from error
    try:  # what does not fit together ends here: as a trial, the first of each
        generator.given.batch({kind: values[0] for kind, values in given.items()} or None, 1, grid)
    except ValueError as error:
        raise DataError(str(error)) from error
    drawing = Drawing(generator, grid, given, options | {"seed": seed})
    if complete:
        drawing.complete(complete, keep)
    rejection = None
    if classifier:
        if labels is None:
            raise DataError("--classifier chooses by class, and this model has no classes.")
        acceptance = ACCEPTANCE if acceptance is None else acceptance
        classify = find_classifier(classifier)
        rejection = Rejection(classify, acceptance, labels, num_samples, condition.num_classes)
        rejection.scores(np.zeros((1, *drawing.size, 3), np.uint8), labels[:1])  # as a trial
    elif acceptance is not None:
        raise DataError("--acceptance is of the samples that --classifier chooses; name one.")

    # Nothing is written before everything is known to be right.
    settings = {"seed": seed, "classes": None if labels is None else labels.tolist()} | options
    settings |= {"model": generator.fingerprint} | drawing.settings()
    if rejection is not None:
        settings |= {"classifier": classifier, "acceptance": acceptance}
    with locked(output) if jax.process_index() == 0 else contextlib.nullcontext():
        compare(output, settings)
        distributed.barrier("sample: compared")
        if jax.process_index() == 0:
            output.mkdir(parents=True, exist_ok=True)
            if not (output / SETTINGS).exists():
                write_atomically(
                    output / SETTINGS, (json.dumps(settings, indent=2) + "\n").encode()
                )
        distributed.barrier("sample: begun")

        of_sample = None if labels is None else labels[np.arange(num_samples) % len(labels)]
        if "png" in formats or stored_samples(output / ARRAYS) != num_samples:
            batch_size = batch_size or drawing.batch_size
            if rejection is None:
                draw_missing(drawing, output, output, np.arange(num_samples), batch_size, animate)
            elif not is_accepted(rejection, output):
                folder = output / CANDIDATES
                folder.mkdir(exist_ok=True)
                draw_missing(
                    drawing, output, folder, rejection.numbers, batch_size, animate, rejection
                )
            distributed.barrier("sample: drawn", distributed.NO_TIMEOUT)
            if jax.process_index() == 0:
                arrays = {} if rejection is None else accept(rejection, output)
                finish(output, num_samples, of_sample, generator.class_names, formats, arrays)
        if jax.process_index() == 0:
            if "png" not in formats:
                for index in range(num_samples):
                    path_of(output, index).unlink(missing_ok=True)
                shutil.rmtree(output / CANDIDATES, ignore_errors=True)
            print(f"{output} has {num_samples} samples: {', '.join(formats)}.")


def draw_missing(
    drawing: Drawing,
    output: pathlib.Path,
    folder: pathlib.Path,
    numbers: np.ndarray,
    batch_size: int,
    animate: bool,
    rejection: Rejection | None = None,
) -> None:
    """Draws the batches of which a PNG is missing, those of this process.

    Batches are always the same ones: a sample that is drawn again has the same neighbours, and so
    the same rounding. They are of one size, and as few places as can be are left over in the last.

    Args:
        drawing: what is drawn.
        output: where the animation goes.
        folder: where the PNGs go.
        numbers: of the samples, ascending.
        batch_size: samples at once on each device, at most.
        animate: whether to show how the first sample forms.
        rejection: scores the samples, which are its candidates.
    """
    devices = jax.local_device_count()
    count = math.ceil(len(numbers) / (batch_size * devices))
    batch_size = math.ceil(len(numbers) / (count * devices))
    size = batch_size * devices
    batches = [numbers[first : first + size] for first in range(0, len(numbers), size)]
    mine = batches[jax.process_index() :: jax.process_count()]
    todo = [indices for indices in mine if not all(path_of(folder, i).exists() for i in indices)]
    if animate and mine and mine[0][0] == 0 and not (output / ANIMATION).exists():
        todo = [mine[0], *(indices for indices in todo if indices[0] != 0)]
    done, total, after_first = 0, sum(map(len, todo)), None
    for indices in todo:
        full = np.concatenate([indices, np.repeat(indices[-1:], size - len(indices))])
        film = Film(drawing, show=animate and indices[0] == 0)
        codes = drawing.draw(full, batch_size, film if film.show or drawing.slides else None)
        images = drawing.generator.decode(codes, batch_size)
        scores = None
        if rejection is not None:
            scores = rejection.scores(images, rejection.label_of(full))
        if film.show:
            write_atomically(output / ANIMATION, film.encoded())
        for place, index in enumerate(indices):
            if path_of(folder, index).exists():
                continue
            text = None if scores is None else score_text(scores[place])
            encoded = io.BytesIO()
            Image.fromarray(images[place]).save(encoded, format="png", pnginfo=text)
            write_atomically(path_of(folder, index), encoded.getvalue())
        done += len(indices)
        if jax.process_index() == 0:
            text, now = f"{done} of {total} samples", time.perf_counter()
            if after_first is None:  # which had the compilation
                after_first = done, now
            else:
                rate = (done - after_first[0]) / (now - after_first[1])
                text += f", {rate:.2f} a second, left {format_duration((total - done) / rate)}"
            print(text, flush=True)
