"""Conditions and parts of images from files, for the command that draws images."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vqgan_jax.conditions.keypoint_files import read_keypoints
from vqgan_jax.conditions.layout_files import read_layout
from vqgan_jax.conditions.scene_layouts import layout_encoding
from vqgan_jax.data.decoding import (
    decode_alpha,
    decode_depth,
    decode_image,
    decode_label_map,
    open_image,
)
from vqgan_jax.data.listing import list_files
from vqgan_jax.errors import DataError, UnreadableImage

SIDES = ("top", "bottom", "left", "right")


def read_conditions(condition: ConfigDict, kind: str, path: str) -> dict[pathlib.Path, Any]:
    """What `GivenConditions` takes of a kind, by file: of one, or of all of a folder in order.

    Args:
        condition: `config.condition` of the transformer.
        kind: "layout", for JSON files, or the name of a condition image, for pictures; skeletons
            may also be keypoints in JSON files, in pixels of the image to draw.
        path: a file or a folder.

    Raises:
        DataError: the model has no such condition, or a file is none of that kind.
    """
    kinds = [name for name in condition.kinds if name not in ("class", "coordinates")]
    if kind not in kinds:
        raise DataError(
            f"--condition={kind}=...: the model has no condition {kind!r} that is a file; it has "
            f"{', '.join(kinds) or 'none'}." + (" Classes are for --class." * (kind == "class"))
        )
    if not path:
        raise DataError(f"--condition={kind}=: the path is missing.")
    place = pathlib.Path(path).expanduser()
    if not place.exists():
        raise DataError(f"--condition={kind}={path}: there is no such file.")
    files = (
        sorted(
            file
            for file in map(pathlib.Path, list_files(place, ("",)).files)
            if file.parent == place
        )
        if place.is_dir()
        else [place]
    )
    if not files:
        raise DataError(f"--condition={kind}={path}: the folder is empty.")
    if kind == "layout":
        layout = condition.layout
        encoding, class_names = layout_encoding(layout), tuple(layout.class_names)
        return {file: read_layout(file, encoding, class_names) for file in files}
    image = condition.images[kind]
    decode = decode_depth if "depth" in (kind, image.image_key) else decode_image
    decode = decode_label_map if image.num_labels else decode
    return {
        file: read_keypoints(file)
        if image.derive == "skeleton" and file.suffix.lower() == ".json"
        else _decoded(kind, file, decode)
        for file in files
    }


def _decoded(kind: str, file: pathlib.Path, decode) -> np.ndarray:
    try:
        return decode(file)
    except UnreadableImage:
        raise
    except DataError as error:
        if decode is decode_label_map and "label map" in str(error):
            with open_image(file) as picture:
                mode = picture.mode
            raise DataError(
                f"The condition {kind} is a label map, a grey or palette picture whose values are "
                f"labels; {file} has the mode {mode}."
            ) from error
        raise


def read_known_part(
    path: str, side: str, size: tuple[int, int], factor: int
) -> tuple[np.ndarray, np.ndarray]:
    """An image that is to be completed, and which of its codes are known.

    Where it is transparent it is to be drawn; an image that is not is known in one half.

    Args:
        path: of the image.
        side: of `SIDES`: the half that is kept.
        size: height and width of the image to draw.
        factor: pixels a code.

    Returns:
        uint8 `(H, W, 3)`; bool `(h, w)`, true where every pixel of a code is known.

    Raises:
        DataError: it is no image, or of another size.
    """
    pixels = decode_image(path)
    if pixels.shape[:2] != size:
        raise DataError(
            f"--complete={path} has {pixels.shape[1]} x {pixels.shape[0]} pixels (width x height), "
            f"and the image to draw {size[1]} x {size[0]}."
        )
    height, width = size
    known = np.ones(size, bool)
    alpha = decode_alpha(path)
    if alpha is not None:
        known = alpha == 255
    if known.all():
        half = {
            "top": np.s_[: height // 2],
            "bottom": np.s_[height - height // 2 :],
            "left": np.s_[:, : width // 2],
            "right": np.s_[:, width - width // 2 :],
        }
        known = np.zeros(size, bool)
        known[half[side]] = True
    squares = known.reshape(height // factor, factor, width // factor, factor)
    return pixels, squares.all(axis=(1, 3))


def in_turn(values: Sequence, numbers: np.ndarray) -> list:
    """The value of each sample: the first for sample 0, and from the start again after the last."""
    return [values[number % len(values)] for number in numbers]
