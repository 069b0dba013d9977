"""The files of drawn samples: PNGs by number, an overview, arrays, and the settings of it all."""

import math
import os
import pathlib
import zipfile
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vqgan_jax.checkpoints.directory_lock import is_empty
from vqgan_jax.configuration.common import shortened
from vqgan_jax.configuration.documents import parse_json, read_bytes
from vqgan_jax.errors import DataError

GRID, ARRAYS, SETTINGS = "grid.png", "samples.npz", "settings.json"
GRID_SAMPLES, GRID_COLUMNS, GRID_SIDE, LARGEST_SIDE = 64, 8, 128, 512
FONT_SIZE, MARGIN = 14, 6


def compare(output: pathlib.Path, settings: dict) -> None:
    """Raises `DataError` where `output` is not new, empty, or begun with the same settings."""
    file = output / SETTINGS
    if file.is_file():
        stored = parse_json(read_bytes(file), str(file))
        if not isinstance(stored, dict):
            raise DataError(f"{file} is damaged: it holds no settings.")
        names = dict.fromkeys((*settings, *stored))
        different = [name for name in names if stored.get(name) != settings.get(name)]
        if different:
            name = different[0]
            raise DataError(
                f"{output} was begun with {name} {shortened(stored.get(name))}, and this is "
                f"{shortened(settings.get(name))}; choose another --output."
            )
        return
    left = [path.name for path in leftovers(output)]
    if output.exists() and not (output.is_dir() and is_empty(output, besides=left)):
        raise DataError(f"{output} exists and is not empty; choose another --output.")


def stored_samples(path: pathlib.Path) -> int:
    """How many samples an archive of `finish` has, without reading them; 0 where none is whole."""
    if not path.exists():
        return 0
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as array:
            np.lib.format.read_magic(array)
            shape, _, _ = np.lib.format.read_array_header_1_0(array)
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError, NotImplementedError):
        return 0
    return shape[0] if shape else 0


def finish(
    output: pathlib.Path,
    num_samples: int,
    labels: np.ndarray | None,
    class_names: Sequence[str],
    formats: Sequence[str],
    arrays: Mapping[str, np.ndarray],
) -> None:
    """Writes the overview and the arrays, from the PNGs; `arrays` are more of them."""
    for path in leftovers(output):
        path.unlink()
    paths = [path_of(output, index) for index in range(num_samples)]
    if "grid" in formats:
        shown = labelled_grid(
            [thumbnail(path) for path in paths[:GRID_SAMPLES]],
            None if labels is None else labels[:GRID_SAMPLES],
            class_names,
        )
        shown.save(output / GRID)
    if "npz" in formats:
        images = np.stack([np.asarray(Image.open(path)) for path in paths])
        arrays = {"arr_0": images, **({} if labels is None else {"labels": labels}), **arrays}
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
