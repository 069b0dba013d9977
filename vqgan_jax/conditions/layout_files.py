"""Layouts of scenes in JSON files, as people write them.

    {"objects": [{"class": "dog", "box": [0.1, 0.4, 0.3, 0.5], "occluded": true},
                 {"class": 17, "box": [0.5, 0.2, 0.5, 0.8]}],
     "crop": [0, 0, 1, 1]}

A class is a name or a number from 0. A box is x and y of the upper left corner, then width and
height, in shares of the scene. "crop" is the part of the scene that the image shows; it may be
missing (all of it), and a list of objects alone is a layout too. Attributes that may be true of an
object are "group", "occluded", "depiction" and "inside", where the model was trained with them.
"""

import difflib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from vqgan_jax.conditions.layouts import WHOLE_SCENE, Box, Layout, LayoutEncoding, SceneObject
from vqgan_jax.data.errors import DataError

_ROUNDING = 1e-6  # x + width may exceed 1 by so much: 0.1 + 0.9 need not be 1 in floats


def read_layout(
    path: str | os.PathLike, encoding: LayoutEncoding, class_names: Sequence[str] = ()
) -> Layout:
    """Reads and checks a layout file.

    Args:
        path: a JSON file, described in the module.
        encoding: of the model that the layout is for.
        class_names: in the order of their numbers; empty where classes have only numbers.

    Raises:
        DataError: the file cannot be read, or as in `parse_layout`; one line that names the file.
    """
    try:
        text = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"The layout {path} cannot be read: {error.strerror}.") from error
    try:
        return parse_layout(text, encoding, class_names)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def parse_layout(
    text: str | bytes, encoding: LayoutEncoding, class_names: Sequence[str] = ()
) -> Layout:
    """A layout from JSON, described in the module.

    Raises:
        DataError: the text is not JSON or not a layout, a class is unknown, a box leaves the image
            or has no area, an attribute is unknown to the model, or there are too many objects; one
            line that names the object.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"This is not JSON: {error}.") from error
    if isinstance(content, list):
        content = {"objects": content}
    if not isinstance(content, dict) or not isinstance(content.get("objects"), list):
        raise DataError(
            'A layout is a list of objects, or {"objects": [...], "crop": [x, y, width, height]}.'
        )
    _require_known(content, ("objects", "crop"), "The layout")
    entries = content["objects"]
    if len(entries) > encoding.max_objects:
        raise DataError(
            f"The layout has {len(entries)} objects; the model takes at most "
            f"{encoding.max_objects}."
        )
    objects = [
        _object(entry, f"objects[{index}]", encoding, class_names)
        for index, entry in enumerate(entries)
    ]
    crop = _box(content["crop"], "crop") if "crop" in content else WHOLE_SCENE
    return Layout(tuple(objects), crop)


def _object(
    entry: Any, where: str, encoding: LayoutEncoding, class_names: Sequence[str]
) -> SceneObject:
    if not isinstance(entry, dict) or not {"class", "box"} <= entry.keys():
        raise DataError(f'{where} must be {{"class": NAME, "box": [x, y, width, height]}}.')
    _require_known(entry, ("class", "box", *encoding.attributes), where)
    for name in encoding.attributes:
        if not isinstance(entry.get(name, False), bool):
            raise DataError(f"{where}: {name!r} must be true or false, not {entry[name]!r}.")
    attributes = frozenset(name for name in encoding.attributes if entry.get(name))
    label = _label(entry["class"], where, encoding.num_classes, class_names)
    return SceneObject(label, _box(entry["box"], where), attributes)


def _label(value: Any, where: str, num_classes: int, class_names: Sequence[str]) -> int:
    if isinstance(value, str):
        if value in class_names:
            return list(class_names).index(value)
        if not class_names:
            raise DataError(
                f"{where}: the class is {value!r}, but the model has no names of classes; give a "
                f"number from 0 to {num_classes - 1}."
            )
        similar = difflib.get_close_matches(value, class_names, n=1)
        guess = f"; is {similar[0]!r} meant?" if similar else "."
        raise DataError(f"{where}: the model knows no class {value!r}{guess}")
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(f"{where}: a class is a name or a number, not {json.dumps(value)}.")
    if not 0 <= value < num_classes:
        raise DataError(f"{where}: the class {value} is outside of 0 to {num_classes - 1}.")
    return value


def _box(value: Any, where: str) -> Box:
    is_box = isinstance(value, list) and len(value) == 4
    if not is_box or any(isinstance(x, bool) or not isinstance(x, int | float) for x in value):
        raise DataError(f"{where}: a box is [x, y, width, height], four numbers.")
    x, y, width, height = value
    inside = all(0 <= number <= 1 for number in value)  # and no NaN, which JSON's reader lets pass
    if not inside or max(x + width, y + height) > 1 + _ROUNDING:
        raise DataError(
            f"{where}: the box {value} leaves the frame. x, y, width and height are shares of the "
            "scene, with x + width and y + height at most 1."
        )
    if min(width, height) == 0:
        raise DataError(f"{where}: the box {value} has no area.")
    return float(x), float(y), float(width), float(height)


def _require_known(entry: dict[str, Any], known: Sequence[str], where: str) -> None:
    unknown = [key for key in entry if key not in known]
    if unknown:
        raise DataError(f"{where} has {unknown[0]!r}; this model knows {', '.join(known)}.")
