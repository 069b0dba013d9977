"""Pictures of any size for a trained tokenizer: from files, folders and its validation split."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath

import numpy as np
from ml_collections import ConfigDict

from vqgan_jax.configuration import downsampling_factor
from vqgan_jax.data.decoding import (
    SUFFIXES,
    DecodeOptions,
    decode_depth,
    decode_image,
    decode_label_map,
)
from vqgan_jax.data.images import to_grey
from vqgan_jax.data.listing import list_files
from vqgan_jax.data.pipeline import evaluation_images
from vqgan_jax.data.sources import open_configured
from vqgan_jax.data.splits import expand_user
from vqgan_jax.data.transforms import resize_shorter_side
from vqgan_jax.errors import DataError

VALIDATION = "validation"
HELD_OUT_SPLITS = ("validation", "test")  # of a named data set, the first that it has


@dataclasses.dataclass(frozen=True)
class Picture:
    """One input.

    Attributes:
        name: of a PNG for it, relative to an output directory; no two pictures share it.
        origin: where it comes from, for people.
        read: gives uint8 `(H, W, C)`, or `(H, W)` for label maps, as the tokenizer takes it. Raises
            `DataError` where that cannot be.
    """

    name: str
    origin: str
    read: Callable[[], np.ndarray]


def list_pictures(
    inputs: Sequence[str],
    config: ConfigDict,
    smallest: int,
    resize: int | None = None,
    validation_images: int = 16,
    reserved: Sequence[str] = (),
) -> list[Picture]:
    """The pictures of each input, in order; no file is opened yet.

    Args:
        inputs: files, folders with all below them, names of data sets, of which the validation
            or test split is taken, or the word "validation" for that of the tokenizer's training.
        config: of the tokenizer.
        smallest: pixels that a picture must have in each direction.
        resize: shorter side in pixels before the crop; None takes the pixels as they are.
        validation_images: how many of the validation split, evenly spaced.
        reserved: names that no picture may have.

    Raises:
        DataError: an input does not exist, or there is no picture at all.
    """
    sources = []  # (path relative to the input, where it comes from, what gives its pixels)
    for item in inputs:
        if item == VALIDATION or _is_named(item):
            own = config if item == VALIDATION else _with_dataset(config, item)
            for i, image in enumerate(evaluation_images(own, validation_images)):
                origin = f"picture {i} of {own.data.name} {own.data.validation_split}"
                get_pixels = functools.partial(np.asarray, image)
                sources.append((PurePath(f"{VALIDATION}-{i:04}"), origin, get_pixels))
        else:
            for path, relative in find_files(Path(expand_user(item.removeprefix("folder:")))):
                sources.append((relative, str(path), functools.partial(_decode, path, config)))
    if not sources:
        where = ", ".join(inputs) or "an empty --dataset"
        raise DataError(f"There are no images in {where} ({', '.join(SUFFIXES)}).")
    names = unique_names([relative for relative, _, _ in sources], reserved)
    return [
        Picture(
            name, origin, functools.partial(_read, origin, get_pixels, config, smallest, resize)
        )
        for name, (_, origin, get_pixels) in zip(names, sources, strict=True)
    ]


def _is_named(item: str) -> bool:
    """Whether it is the name of a data set, and no path."""
    return not Path(item).exists() and item.partition("/")[0].isidentifier() and "." not in item


def _with_dataset(config: ConfigDict, name: str) -> ConfigDict:
    """The config with another data set, and its split of images that nothing is trained on."""
    config = config.copy_and_resolve_references()
    config.data.update(name=name, image_key="image")
    errors = []
    for split in HELD_OUT_SPLITS:
        config.data.validation_split = split
        try:
            open_configured(config.data, split, config.model.resolution)
        except DataError as error:
            errors.append(error)
        else:
            return config
    raise errors[0]


def find_files(root: Path) -> list[tuple[Path, PurePath]]:
    """(path, path relative to `root`) of the image files below a folder, sorted; or of one file.

    Raises:
        DataError: there is neither.
    """
    if root.is_file():
        return [(root, PurePath(root.name))]
    if not root.is_dir():
        raise DataError(
            f"There is no file or folder {root}. A path with a comma is quoted: "
            """--dataset='"a,b.png"'."""
        )
    found = [Path(path) for path in list_files(root, SUFFIXES).files]
    return [(path, path.relative_to(root)) for path in sorted(found)]


def unique_names(paths: Sequence[PurePath], reserved: Sequence[str] = ()) -> list[str]:
    """PNG names for relative paths, numbered where two would be the same file."""
    taken, names = set(reserved), []
    for path in paths:
        name, number = path.with_suffix(".png"), 1
        while str(name).casefold() in taken:  # some file systems do not tell A.png from a.png
            number += 1
            name = path.with_name(f"{path.stem}-{number}.png")
        taken.add(str(name).casefold())
        names.append(str(name))
    return names


def crop_to_multiple(image: np.ndarray, factor: int) -> np.ndarray:
    """The centre of `(H, W, ...)` at the largest size that `factor` divides."""
    height, width = (size // factor * factor for size in image.shape[:2])
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def _read(
    origin: str,
    get_pixels: Callable[[], np.ndarray],
    config: ConfigDict,
    smallest: int,
    resize: int | None,
) -> np.ndarray:
    """What `Picture.read` gives."""
    image = get_pixels()
    if resize is not None:
        try:
            image = resize_shorter_side(image, resize, config.data.max_pixels)
        except DataError as error:
            raise DataError(f"{origin}: {error}") from error
    height, width = image.shape[:2]
    image = crop_to_multiple(image, downsampling_factor(config.model))
    if min(image.shape[:2]) < smallest:
        raise DataError(
            f"{origin} has {width} x {height} pixels, which are too few: {smallest} are needed in "
            "each direction. --resize makes it larger."
        )
    if image.ndim == 3 and config.model.in_channels == 1:
        return to_grey(image)
    return image


def _decode(path: Path, config: ConfigDict) -> np.ndarray:
    """uint8 `(H, W, 3)` of a file, or `(H, W)` where the tokenizer is one of label maps."""
    num_labels, options = config.data.num_labels, DecodeOptions.from_config(config.data)
    if num_labels == 0:
        decode = decode_depth if config.data.image_key == "depth" else decode_image
        return decode(path, options)
    labels = decode_label_map(path, options)
    if labels.max() >= num_labels:
        raise DataError(
            f"{path} has the label {labels.max()}; the tokenizer knows 0 to {num_labels - 1}."
        )
    return labels
