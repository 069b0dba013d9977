"""Keypoints of the people in an image, in JSON files as people and detectors write them.

Each keypoint is x and y in pixels from the centre of the upper left pixel of the image, and whether
it is visible (above 0). There are 17 of a person as COCO numbers them, or 18 as OpenPose does:

    [[183.5, 71, 2], [188, 66.5, 2], ...]                  one person
    {"keypoints": [183.5, 71, 2, 188, 66.5, 2, ...]}       an annotation of COCO, or a list of them
    {"people": [{"pose_keypoints_2d": [183.5, 71, 0.9, ...]}, ...]}       what OpenPose writes
"""

import json
import os
import sys
from typing import Any

import numpy as np

from vqgan_jax.conditions.json_files import parse_file
from vqgan_jax.configuration.documents import parse_json
from vqgan_jax.errors import DataError

_COUNTS = (17, 18)
_FORMS = (
    'Keypoints are [[x, y, visible], ...], {"keypoints": [...]}, a list of these, or {"people": '
    '[{"pose_keypoints_2d": [...]}, ...]}'
)


def read_keypoints(path: str | os.PathLike) -> np.ndarray:
    """Reads and checks a file of keypoints, described in the module.

    Returns:
        float64 (P, N, 3) of P people, none or more: x, y, visible; N is 17 or 18.

    Raises:
        DataError: the file cannot be read, or as in `parse_keypoints`; one line that names it.
    """
    return parse_file(path, parse_keypoints)


def parse_keypoints(text: str | bytes) -> np.ndarray:
    """Keypoints from JSON, as of `read_keypoints`.

    Raises:
        DataError: the text is not JSON or of none of the forms, people have other numbers of
            keypoints, or a visible one has no place; one line that names the person.
    """
    people = [_person(entry, index) for index, entry in enumerate(_people(parse_json(text)))]
    if len({len(person) for person in people}) > 1:
        raise DataError("Some people have 17 keypoints and others 18; all must have as many.")
    return np.stack(people) if people else np.zeros((0, _COUNTS[0], 3))


def _people(content: Any) -> list:
    """The keypoints of each person, in either form, unchecked."""
    if isinstance(content, dict) and isinstance(content.get("people"), list):
        return [_of(person, "pose_keypoints_2d") for person in content["people"]]
    if isinstance(content, dict):
        return [_of(content, "keypoints")]
    if isinstance(content, list) and all(isinstance(entry, dict) for entry in content):
        return [_of(entry, "keypoints") for entry in content]
    if isinstance(content, list):
        return [content]
    raise DataError(f"{_FORMS}.")


def _of(person: Any, key: str) -> Any:
    if not isinstance(person, dict) or key not in person:
        raise DataError(f"{_FORMS}; here {key!r} is missing.")
    return person[key]


def _person(entry: Any, index: int) -> np.ndarray:
    """float64 (N, 3)."""
    nested = isinstance(entry, list) and all(
        isinstance(point, list) and len(point) == 3 for point in entry
    )
    numbers = [number for point in entry for number in point] if nested else entry
    if not isinstance(numbers, list) or len(numbers) % 3 or not all(map(_is_number, numbers)):
        raise DataError(
            f"people[{index}]: keypoints are x, y, visible of each, three numbers; not "
            f"{json.dumps(entry)[:60]}."
        )
    keypoints = np.array(numbers, np.float64).reshape(-1, 3)
    if len(keypoints) not in _COUNTS:
        raise DataError(
            f"people[{index}] has {len(keypoints)} keypoints; 17, as COCO numbers them, and 18, as "
            "OpenPose does, can be drawn."
        )
    lost = np.flatnonzero((keypoints[:, 2] > 0) & ~np.isfinite(keypoints[:, :2]).all(axis=1))
    if len(lost):
        x, y, _ = keypoints[lost[0]]
        raise DataError(
            f"people[{index}]: keypoint {lost[0]} is visible, but its place is ({x}, {y})."
        )
    return keypoints


def _is_number(value: Any) -> bool:
    """Whether it is one that a float holds: integers in JSON have any number of digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) <= sys.float_info.max
