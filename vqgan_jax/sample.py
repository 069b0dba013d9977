"""Draws images from a transformer.

    python -m vqgan_jax.sample --checkpoint=runs/quickstart_transformer --output=samples
    python -m vqgan_jax.sample --checkpoint=DIR --output=DIR --num_samples=50000 --format=npz

The output has a PNG for each sample, `000000.png` and so on; `grid.png`, an overview of the first
ones, with a row for each class; and `samples.npz`, uint8 (N, H, W, 3) as `arr_0`, as public FID
scripts read it, with the classes as `labels`. Of a model with classes, samples are of all of them
in turn, or of those that `--class` names. What the options leave open is as the model's config
says. The same command makes what is missing of an output that was begun.
"""

import io
import json
import os
import pathlib
import time
from collections.abc import Sequence

import jax
import numpy as np
from absl import flags
from PIL import Image, ImageDraw

from vqgan_jax import commands
from vqgan_jax.data.errors import DataError

FORMATS = ("png", "grid", "npz")
GRID, ARRAYS, SETTINGS = "grid.png", "samples.npz", "settings.json"
GRID_SAMPLES, GRID_COLUMNS, GRID_SIDE = 64, 8, 128
LABEL_WIDTH = 180


def sample(
    checkpoint: str,
    output: str | pathlib.Path,
    num_samples: int,
    classes: Sequence[str] = (),
    formats: Sequence[str] = ("png", "grid"),
    batch_size: int = 16,
    seed: int = 0,
    **options,
) -> None:
    """Draws what is missing of `num_samples` images and writes them to `output`.

    Args:
        checkpoint: a transformer's run directory, checkpoint or export.
        output: a directory that is new, empty, or was begun with the same settings.
        num_samples: how many there shall be.
        classes: of the samples in turn, by name or number; empty for all of the model.
        formats: of "png", "grid" and "npz".
        batch_size: samples at once on each device.
        seed: of the noise.
        **options: of `Generator.sample_codes`; None as the model's config says.

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
    if num_samples < 1 or batch_size < 1:
        raise DataError("--num_samples and --batch_size must be at least 1.")
    generator = load(checkpoint)
    if not isinstance(generator, Generator):
        raise CheckpointError(f"{checkpoint} is a tokenizer; sample needs a transformer.")
    try:
        if not classes and generator.config.condition.kind == "class":
            classes = [str(i) for i in range(generator.config.condition.num_classes)]
        labels = generator.labels(list(classes), len(classes)) if classes else None
    except ValueError as error:
        raise DataError(f"--class: {error}") from error

    settings = {"seed": seed, "classes": None if labels is None else labels.tolist()} | options
    begin(output, settings | {"model": generator.fingerprint})
    of_sample = None if labels is None else labels[np.arange(num_samples) % len(labels)]
    draw_missing(generator, output, num_samples, of_sample, batch_size, seed, options)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("samples are drawn")
    if jax.process_index() == 0:
        finish(generator, output, num_samples, of_sample, formats)


def begin(output: pathlib.Path, settings: dict) -> None:
    """Makes the directory, or checks that what is there was begun with the same settings."""
    file = output / SETTINGS
    if file.is_file():
        stored = json.loads(file.read_text())
        different = [name for name in settings if stored.get(name) != settings[name]]
        if different:
            name = different[0]
            raise DataError(
                f"{output} was begun with {name} {stored.get(name)}, and this is {settings[name]}; "
                "choose another --output."
            )
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"{output} exists and is not empty; choose another --output.")
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(file, (json.dumps(settings, indent=2) + "\n").encode())


def draw_missing(generator, output, num_samples, labels, batch_size, seed, options) -> None:
    """Draws the batches of which a PNG is missing, those of this process.

    Batches are always the same ones: a sample that is drawn again has the same neighbours, and so
    the same rounding.
    """
    size = batch_size * jax.local_device_count()
    batches = [
        np.arange(first, min(first + size, num_samples)) for first in range(0, num_samples, size)
    ]
    mine = batches[jax.process_index() :: jax.process_count()]
    todo = [indices for indices in mine if not all(path_of(output, i).exists() for i in indices)]
    start, done = time.perf_counter(), 0
    for indices in todo:
        full = np.concatenate([indices, np.repeat(indices[-1:], size - len(indices))])
        try:
            images = generator.sample(
                seed,
                len(full),
                condition=None if labels is None else labels[full],
                indices=full,
                batch_size=batch_size,
                **options,
            )
        except ValueError as error:
            raise DataError(str(error)) from error
        for index, image in zip(indices, images, strict=False):
            encoded = io.BytesIO()
            Image.fromarray(image).save(encoded, format="png")
            write_atomically(path_of(output, index), encoded.getvalue())
        done += len(indices)
        rate = done / (time.perf_counter() - start)
        if jax.process_index() == 0:
            print(f"{done} of {sum(map(len, todo))} samples, {rate:.2f} a second.", flush=True)


def finish(generator, output, num_samples, labels, formats) -> None:
    """Writes the overview and the arrays, from the PNGs."""
    paths = [path_of(output, index) for index in range(num_samples)]
    if "grid" in formats:
        shown = labelled_grid(
            [np.asarray(Image.open(path)) for path in paths[:GRID_SAMPLES]],
            None if labels is None else labels[:GRID_SAMPLES],
            generator.class_names,
        )
        shown.save(output / GRID)
    if "npz" in formats:
        images = np.stack([np.asarray(Image.open(path)) for path in paths])
        encoded = io.BytesIO()
        arrays = {"arr_0": images} | ({} if labels is None else {"labels": labels})
        np.savez(encoded, **arrays)
        write_atomically(output / ARRAYS, encoded.getbuffer())
    if "png" not in formats:
        for path in paths:
            path.unlink()
    print(f"Wrote {num_samples} samples to {output}: {', '.join(formats)}.")


def labelled_grid(
    images: Sequence[np.ndarray], labels: np.ndarray | None, class_names: Sequence[str]
) -> Image.Image:
    """Images `(H, W, 3)` uint8 in rows; with labels, a row for each class behind its name."""
    if labels is None:
        rows = [
            ("", list(images[i : i + GRID_COLUMNS])) for i in range(0, len(images), GRID_COLUMNS)
        ]
    else:
        rows = [
            (
                class_names[label] if class_names else str(label),
                [image for image, own in zip(images, labels, strict=True) if own == label],
            )
            for label in np.unique(labels)
        ]
    scale = max(1, GRID_SIDE // images[0].shape[0])
    height, width = (size * scale for size in images[0].shape[:2])
    left = 0 if labels is None else LABEL_WIDTH
    columns = min(GRID_COLUMNS, max(len(row) for _, row in rows))
    grid = Image.new(
        "RGB", (left + columns * (width + 2) - 2, len(rows) * (height + 2) - 2), "white"
    )
    text = ImageDraw.Draw(grid)
    for number, (name, row) in enumerate(rows):
        top = number * (height + 2)
        if left:
            text.text((6, top + height // 2), name, fill="black", anchor="lm", font_size=14)
        for column, image in enumerate(row[:columns]):
            picture = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            grid.paste(picture, (left + column * (width + 2), top))
    return grid


def path_of(output: pathlib.Path, index: int) -> pathlib.Path:
    """Where a sample's PNG is."""
    return output / f"{index:06}.png"


def write_atomically(path: pathlib.Path, content) -> None:
    """A file that is there is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    temporary.write_bytes(content)
    temporary.replace(path)


def main() -> None:
    """Draws what the flags say."""
    commands.start_distributed()
    values = {name: flags.FLAGS[name].value for name in OPTIONS}
    sample(
        flags.FLAGS["checkpoint"].value,
        flags.FLAGS["output"].value,
        flags.FLAGS["num_samples"].value,
        flags.FLAGS["class"].value,
        flags.FLAGS["format"].value,
        flags.FLAGS["batch_size"].value,
        flags.FLAGS["seed"].value,
        **values,
    )


OPTIONS = ("temperature", "top_k", "top_p", "guidance_scale", "guidance_schedule")


def _define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "A transformer's run directory, checkpoint or export.")
    flags.DEFINE_string("output", None, "A new directory, or one that was begun.")
    flags.DEFINE_integer("num_samples", 64, "How many images there shall be.")
    flags.DEFINE_list("class", [], "Their classes in turn, by name or number; all by default.")
    flags.DEFINE_list("format", ["png", "grid"], f"Of {', '.join(FORMATS)}.")
    flags.DEFINE_integer("batch_size", 16, "Samples at once on each device.")
    flags.DEFINE_integer("seed", 0, "Of the noise.")
    flags.DEFINE_float("temperature", None, "Below 1: likelier codes; 0 takes the likeliest.")
    flags.DEFINE_integer("top_k", None, "Draw from so many likeliest codes; 0 for all.")
    flags.DEFINE_float("top_p", None, "Draw from the likeliest codes that reach this probability.")
    flags.DEFINE_float("guidance_scale", None, "Classifier-free guidance; 1 for none.")
    flags.DEFINE_string("guidance_schedule", None, "constant, linear or cosine.")
    flags.mark_flags_as_required(["checkpoint", "output"])


if __name__ == "__main__":
    _define_flags()
    commands.run(main)
