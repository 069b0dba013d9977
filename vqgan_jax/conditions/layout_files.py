"""Layouts of scenes in JSON files, as people write them.

    {"objects": [{"class": "dog", "box": [0.1, 0.4, 0.3, 0.5], "occluded": true},
                 {"class": 17, "box": [0.5, 0.2, 0.5, 0.8]}],
     "crop": [0, 0, 1, 1]}

A class is a name or a number from 0. A box is x and y of the upper left corner, then width and
height, in shares of the scene. "crop" is the part of the scene that the image shows; it may be
missing (all of it), and a list of objects alone is a layout too. Attributes that may be true of an
object are "group", "occluded", "depiction" and "inside", where the model was trained with them.

The files of a data set are the same but for "crop", which depends on how an image is cropped; they
may have more objects and attributes than a model takes.
"""

import difflib
import json
import os
from collections.abc import Sequence
from typing import Any

from vqgan_jax.conditions.json_files import parse_file
from vqgan_jax.conditions.layouts import (
    ATTRIBUTES,
    WHOLE_SCENE,
    Box,
    Layout,
    LayoutEncoding,
    SceneObject,
    is_within_scene,
)
from vqgan_jax.configuration.documents import parse_json
from vqgan_jax.errors import DataError


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
    return parse_file(path, lambda text: parse_layout(text, encoding, class_names))


def read_objects(
    path: str | os.PathLike, class_names: Sequence[str] = ()
) -> tuple[SceneObject, ...]:
    """Reads and checks the objects of a data set's image, in the order of the file.

    Args:
        path: a JSON file, described in the module, without "crop".
        class_names: of the data set; empty where classes have only numbers, of any size.

    Raises:
        DataError: the file cannot be read, or it is no list of objects; one line that names it.
    """

    def parse(text: bytes) -> tuple[SceneObject, ...]:
        content = _content(text, ("objects",))
        return _objects(content, len(class_names), ATTRIBUTES, class_names)

    return parse_file(path, parse)


def parse_layout(
    text: str | bytes, encoding: LayoutEncoding, class_names: Sequence[str] = ()
) -> Layout:
    """A layout from JSON, described in the module.

    Raises:
        DataError: the text is not JSON or not a layout, a class is unknown, a box leaves the image
            or has no area, an attribute is unknown to the model, or there are too many objects; one
            line that names the object.
    """
    content = _content(text, ("objects", "crop"))
    if len(content["objects"]) > encoding.max_objects:
        raise DataError(
            f"The layout has {len(content['objects'])} objects; the model takes at most "
            f"{encoding.max_objects}."
        )
    objects = _objects(content, encoding.num_classes, encoding.attributes, class_names)
    crop = _box(content["crop"], "crop") if "crop" in content else WHOLE_SCENE
    return Layout(objects, crop)


def _content(text: str | bytes, known: Sequence[str]) -> dict[str, Any]:
    """An object of `known` keys, "objects" among them, which is a list."""
    content = parse_json(text)
    if isinstance(content, list):
        content = {"objects": content}
    if not isinstance(content, dict) or not isinstance(content.get("objects"), list):
        raise DataError(
            'A layout is a list of objects, or {"objects": [...], "crop": [x, y, width, height]}.'
        )
    _require_known(content, known, "The layout")
    return content


def _objects(
    content: dict[str, Any],
    num_classes: int,
    attributes: Sequence[str],
    class_names: Sequence[str],
) -> tuple[SceneObject, ...]:
    """The objects of a layout; `num_classes` 0 takes any number for a class."""
    return tuple(
        _object(entry, f"objects[{index}]", num_classes, attributes, class_names)
        for index, entry in enumerate(content["objects"])
    )


def _object(
    entry: Any,
    where: str,
    num_classes: int,
    attributes: Sequence[str],
    class_names: Sequence[str],
) -> SceneObject:
    if not isinstance(entry, dict) or not {"class", "box"} <= entry.keys():
        raise DataError(f'{where} must be {{"class": NAME, "box": [x, y, width, height]}}.')
    _require_known(entry, ("class", "box", *attributes), where)
    for name in attributes:
        if not isinstance(entry.get(name, False), bool):
            raise DataError(f"{where}: {name!r} must be true or false, not {entry[name]!r}.")
    true = frozenset(name for name in attributes if entry.get(name))
    label = _label(entry["class"], where, num_classes, class_names)
    return SceneObject(label, _box(entry["box"], where), true)


def _label(value: Any, where: str, num_classes: int, class_names: Sequence[str]) -> int:
    numbers = f"from 0 to {num_classes - 1}" if num_classes else "from 0"
    if isinstance(value, str):
        if value in class_names:
            return list(class_names).index(value)
        if not class_names:
            raise DataError(
                f"{where}: the class is {value!r}, but classes have no names here; give a number "
                f"{numbers}."
            )
        similar = difflib.get_close_matches(value, class_names, n=1)
        guess = f"; is {similar[0]!r} meant?" if similar else "."
        raise DataError(f"{where}: there is no class {value!r}{guess}")
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(f"{where}: a class is a name or a number, not {json.dumps(value)}.")
    if value < 0 or 0 < num_classes <= value:
        raise DataError(f"{where}: the class {value} is outside of the numbers {numbers}.")
    return value


def _box(value: Any, where: str) -> Box:
    is_box = isinstance(value, list) and len(value) == 4
    if not is_box or any(isinstance(x, bool) or not isinstance(x, int | float) for x in value):
        raise DataError(f"{where}: a box is [x, y, width, height], four numbers.")
    x, y, width, height = value
    if not is_within_scene(value):  # nor is NaN, which JSON's reader lets pass
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
        raise DataError(f"{where} has {unknown[0]!r}; known here are {', '.join(known)}.")
