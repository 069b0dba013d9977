"""Draws images from a transformer.

    python -m vqgan_jax.sample --checkpoint=runs/quickstart_transformer --output=samples
    python -m vqgan_jax.sample --checkpoint=DIR --output=DIR --num_samples=50000 --format=npz
    python -m vqgan_jax.sample --checkpoint=DIR --output=DIR --num_samples=1 --height=512
        --width=1024 --condition=segmentation=map.png --animate

The output has a PNG for each sample, `000000.png` and so on; `grid.png`, an overview of the first
ones, with a row for each class; `samples.npz`, uint8 (N, H, W, 3) as `arr_0`, as public FID scripts
read it, with the classes as `labels`; and `animation.gif`, the first image as it forms. Of a model
with classes, samples are of all of them in turn, or of those that `--class` names; of other
conditions, files are taken in turn. Images larger than those of the training are drawn through a
window that slides over them. What the options leave open is as the model's config says. The same
command makes what is missing of an output that was begun.
"""

import io
import json
import math
import os
import pathlib
import time
import zipfile
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from PIL import Image, ImageDraw, ImageFont

from vqgan_jax import commands
from vqgan_jax.conditions.files import SIDES, read_conditions
from vqgan_jax.data.errors import DataError
from vqgan_jax.drawing import Drawing, Film
from vqgan_jax.training.progress import format_duration

FORMATS = ("png", "grid", "npz")
GRID, ARRAYS, SETTINGS = "grid.png", "samples.npz", "settings.json"
ANIMATION = "animation.gif"
GRID_SAMPLES, GRID_COLUMNS, GRID_SIDE, LARGEST_SIDE = 64, 8, 128, 512
FONT_SIZE, MARGIN = 14, 6


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
    generator = load(checkpoint)
    if not isinstance(generator, Generator):
        raise CheckpointError(f"{checkpoint} is a tokenizer; sample needs a transformer.")
    condition = generator.config.condition
    try:
        if not classes and "class" in condition.kinds:
            classes = [str(i) for i in range(condition.num_classes)]
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

    # Nothing is written before everything is known to be right.
    settings = {"seed": seed, "classes": None if labels is None else labels.tolist()} | options
    settings |= {"model": generator.fingerprint} | drawing.settings()
    compare(output, settings)
    multihost_utils.sync_global_devices("sample: compared")
    if jax.process_index() == 0:
        output.mkdir(parents=True, exist_ok=True)
        if not (output / SETTINGS).exists():
            write_atomically(output / SETTINGS, (json.dumps(settings, indent=2) + "\n").encode())
    multihost_utils.sync_global_devices("sample: begun")

    of_sample = None if labels is None else labels[np.arange(num_samples) % len(labels)]
    if "png" in formats or stored_samples(output / ARRAYS) != num_samples:
        draw_missing(drawing, output, num_samples, batch_size or drawing.batch_size, animate)
        multihost_utils.sync_global_devices("sample: drawn")
        if jax.process_index() == 0:
            finish(generator, output, num_samples, of_sample, formats)
    if jax.process_index() == 0:
        if "png" not in formats:
            for index in range(num_samples):
                path_of(output, index).unlink(missing_ok=True)
        print(f"{output} has {num_samples} samples: {', '.join(formats)}.")


def compare(output: pathlib.Path, settings: dict) -> None:
    """Raises `DataError` where `output` is not new, empty, or begun with the same settings."""
    file = output / SETTINGS
    if file.is_file():
        stored = json.loads(file.read_text())
        names = dict.fromkeys((*settings, *stored))
        different = [name for name in names if stored.get(name) != settings.get(name)]
        if different:
            name = different[0]
            raise DataError(
                f"{output} was begun with {name} {stored.get(name)}, and this is "
                f"{settings.get(name)}; choose another --output."
            )
        return
    if output.exists() and not (output.is_dir() and set(output.iterdir()) <= leftovers(output)):
        raise DataError(f"{output} exists and is not empty; choose another --output.")


def stored_samples(path: pathlib.Path) -> int:
    """How many samples an archive of `finish` has, 0 where there is none, without reading them."""
    if not path.exists():
        return 0
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as array:
        np.lib.format.read_magic(array)
        shape, _, _ = np.lib.format.read_array_header_1_0(array)
    return shape[0]


def draw_missing(drawing, output, num_samples, batch_size, animate) -> None:
    """Draws the batches of which a PNG is missing, those of this process.

    For one `num_samples` batches are always the same ones: a sample that is drawn again has the
    same neighbours, and so the same rounding. They are of one size, and few places are left over in
    the last.
    """
    devices = jax.local_device_count()
    count = math.ceil(num_samples / (batch_size * devices))
    batch_size = math.ceil(num_samples / (count * devices))
    size = batch_size * devices
    batches = [
        np.arange(first, min(first + size, num_samples)) for first in range(0, num_samples, size)
    ]
    mine = batches[jax.process_index() :: jax.process_count()]
    todo = [indices for indices in mine if not all(path_of(output, i).exists() for i in indices)]
    if animate and mine and mine[0][0] == 0 and not (output / ANIMATION).exists():
        todo = [mine[0], *(indices for indices in todo if indices[0] != 0)]
    done, total, after_first = 0, sum(map(len, todo)), None
    for indices in todo:
        full = np.concatenate([indices, np.repeat(indices[-1:], size - len(indices))])
        film = Film(drawing, show=animate and indices[0] == 0)
        codes = drawing.draw(full, batch_size, film if film.show or drawing.slides else None)
        images = drawing.generator.decode(codes, batch_size)
        if film.show:
            write_atomically(output / ANIMATION, film.encoded())
        for index, image in zip(indices, images, strict=False):
            if path_of(output, index).exists():
                continue
            encoded = io.BytesIO()
            Image.fromarray(image).save(encoded, format="png")
            write_atomically(path_of(output, index), encoded.getvalue())
        done += len(indices)
        if jax.process_index() == 0:
            text, now = f"{done} of {total} samples", time.perf_counter()
            if after_first is None:  # which had the compilation
                after_first = done, now
            else:
                rate = (done - after_first[0]) / (now - after_first[1])
                text += f", {rate:.2f} a second, left {format_duration((total - done) / rate)}"
            print(text, flush=True)


def finish(generator, output, num_samples, labels, formats) -> None:
    """Writes the overview and the arrays, from the PNGs."""
    for path in leftovers(output):
        path.unlink()
    paths = [path_of(output, index) for index in range(num_samples)]
    if "grid" in formats:
        shown = labelled_grid(
            [thumbnail(path) for path in paths[:GRID_SAMPLES]],
            None if labels is None else labels[:GRID_SAMPLES],
            generator.class_names,
        )
        shown.save(output / GRID)
    if "npz" in formats:
        images = np.stack([np.asarray(Image.open(path)) for path in paths])
        arrays = {"arr_0": images} | ({} if labels is None else {"labels": labels})
        temporary = partial_path(output / ARRAYS)
        with temporary.open("wb") as file:  # not by way of memory, where they are already once
            np.savez(file, **arrays)
        temporary.replace(output / ARRAYS)


def thumbnail(path: pathlib.Path) -> np.ndarray:
    """A picture, large ones smaller: uint8 `(H, W, 3)`."""
    with Image.open(path) as image:
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        return np.asarray(image)


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
    longest = max(ImageFont.load_default(FONT_SIZE).getlength(name) for name, _ in rows)
    left = 0 if labels is None else math.ceil(longest) + 2 * MARGIN
    columns = min(GRID_COLUMNS, max(len(row) for _, row in rows))
    grid = Image.new(
        "RGB", (left + columns * (width + 2) - 2, len(rows) * (height + 2) - 2), "white"
    )
    text = ImageDraw.Draw(grid)
    for number, (name, row) in enumerate(rows):
        top = number * (height + 2)
        if left:
            place = (MARGIN, top + height // 2)
            text.text(place, name, fill="black", anchor="lm", font_size=FONT_SIZE)
        for column, image in enumerate(row[:columns]):
            picture = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            grid.paste(picture, (left + column * (width + 2), top))
    return grid


def path_of(output: pathlib.Path, index: int) -> pathlib.Path:
    """Where a sample's PNG is."""
    return output / f"{index:06}.png"


def write_atomically(path: pathlib.Path, content) -> None:
    """A file that is there is whole."""
    temporary = partial_path(path)
    temporary.write_bytes(content)
    temporary.replace(path)


def leftovers(output: pathlib.Path) -> set[pathlib.Path]:
    """What a killed command was about to write."""
    return set(output.glob(".*.partial"))


def partial_path(path: pathlib.Path) -> pathlib.Path:
    """Where a file is written before it takes its name."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


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
        flags.FLAGS["height"].value,
        flags.FLAGS["width"].value,
        split_conditions(flags.FLAGS["condition"].value),
        flags.FLAGS["complete"].value,
        flags.FLAGS["keep"].value,
        flags.FLAGS["animate"].value,
        **values,
    )


def split_conditions(given: Sequence[str]) -> dict[str, str]:
    """KIND=PATH, several of them, to a mapping.

    Raises:
        DataError: one is not of that form, or of a kind that there was already.
    """
    found = {}
    for text in given:
        kind, equals, path = text.partition("=")
        if not equals:
            raise DataError(f"--condition={text}: it must be KIND=PATH.")
        if kind in found:
            raise DataError(
                f"--condition={kind}=... is given twice; for several samples, give a folder."
            )
        found[kind] = path
    return found


OPTIONS = ("temperature", "top_k", "top_p", "guidance_scale", "guidance_schedule")


def _define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "A transformer's run directory, checkpoint or export.")
    flags.DEFINE_string("output", None, "A new directory, or one that was begun.")
    flags.DEFINE_integer("num_samples", 64, "How many images there shall be.")
    flags.DEFINE_list("class", [], "Their classes in turn, by name or number; all by default.")
    flags.DEFINE_list("format", ["png", "grid"], f"Of {', '.join(FORMATS)}.")
    flags.DEFINE_integer(
        "batch_size", None, "Samples at once on each device; 16, and fewer of large images."
    )
    flags.DEFINE_integer("seed", 0, "Of the noise.")
    flags.DEFINE_float("temperature", None, "Below 1: likelier codes; 0 takes the likeliest.")
    flags.DEFINE_integer("top_k", None, "Draw from so many likeliest codes; 0 for all.")
    flags.DEFINE_float("top_p", None, "Draw from the likeliest codes that reach this probability.")
    flags.DEFINE_float("guidance_scale", None, "Classifier-free guidance; 1 for none.")
    flags.DEFINE_string("guidance_schedule", None, "constant, linear or cosine.")
    flags.DEFINE_integer("height", None, "Pixels; as in training by default.", lower_bound=1)
    flags.DEFINE_integer("width", None, "Pixels; as in training by default.", lower_bound=1)
    flags.DEFINE_multi_string(
        "condition",
        [],
        "KIND=PATH of a file or folder: pictures, maps, layouts. Once for each kind.",
    )
    flags.DEFINE_string(
        "complete", "", "An image to keep a part of: what is not transparent, or the half --keep."
    )
    flags.DEFINE_enum("keep", "top", SIDES, "The half of --complete that is kept.")
    flags.DEFINE_bool("animate", False, "Write an animated GIF of the first image as it forms.")
    flags.mark_flags_as_required(["checkpoint", "output"])


if __name__ == "__main__":
    _define_flags()
    commands.run(main)
