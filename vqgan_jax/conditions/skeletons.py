"""Keypoints of bodies drawn as skeletons: the poses of people as a picture.

The picture goes through an image tokenizer like any other, as in the pose-guided synthesis on
DeepFashion of Esser et al. (2021), section 4.2.
"""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

# Pairs of keypoints that a bone connects, in the numbering of the two common detectors.
LIMBS = {
    # 17 keypoints of COCO: nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles, of
    # each pair the left one first.
    "coco": (
        *((0, 1), (0, 2), (1, 2), (1, 3), (2, 4), (3, 5), (4, 6)),
        *((5, 6), (5, 7), (7, 9), (6, 8), (8, 10), (5, 11), (6, 12), (11, 12)),
        *((11, 13), (13, 15), (12, 14), (14, 16)),
    ),
    # 18 keypoints of OpenPose: nose, neck, then shoulder, elbow and wrist, right and left, then
    # hip, knee and ankle, right and left, then the right and left eye and the right and left ear.
    "openpose": (
        *((1, 2), (2, 3), (3, 4), (1, 5), (5, 6), (6, 7)),
        *((1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13)),
        *((1, 0), (0, 14), (14, 16), (0, 15), (15, 17)),
    ),
}


# The same keypoint of a mirrored body: left and right change places.
_MIRRORED = {
    "coco": (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15),
    "openpose": (0, 1, 5, 6, 7, 2, 3, 4, 11, 12, 13, 8, 9, 10, 15, 14, 17, 16),
}
_NUMBERINGS = {17: "coco", 18: "openpose"}  # by how many keypoints there are


def draw_people(people: np.ndarray, height: int, width: int) -> np.ndarray:
    """Draws the skeletons of people, later ones over earlier ones; see `draw_skeleton`.

    Args:
        people: (P, N, 3) keypoints of each person, 17 as COCO or 18 as OpenPose numbers them.
        height, width: of the picture, in pixels.

    Returns:
        uint8 (H, W, 3); black without people.

    Raises:
        ValueError: keypoints are not (P, 17 or 18, 3), or a visible one has no finite place.
    """
    limbs = LIMBS[_numbering(people)]
    picture = np.zeros((height, width, 3), np.uint8)
    for keypoints in people:
        skeleton = draw_skeleton(keypoints, limbs, height, width)
        picture = np.where(skeleton.any(axis=-1, keepdims=True), skeleton, picture)
    return picture


def mirror_people(people: np.ndarray, width: int) -> np.ndarray:
    """Keypoints as a detector finds them in the picture mirrored left and right.

    What was a left arm is a right arm there, so that limbs keep the colours of their sides.

    Args:
        people: (P, N, 3), as of `draw_people`.
        width: of the picture, in pixels.
    """
    mirrored = people[:, list(_MIRRORED[_numbering(people)])]
    mirrored[..., 0] = width - 1 - mirrored[..., 0]
    return mirrored


def _numbering(people: np.ndarray) -> str:
    shape = np.shape(people)
    if len(shape) != 3 or shape[1] not in _NUMBERINGS or shape[2] != 3:
        raise ValueError(
            "Keypoints of people have the shape (P, 17, 3), numbered as COCO does, or (P, 18, 3), "
            f"as OpenPose does; not {shape}."
        )
    return _NUMBERINGS[shape[1]]


def draw_skeleton(
    keypoints: np.ndarray,
    limbs: Sequence[tuple[int, int]],
    height: int,
    width: int,
    thickness: int = 0,
) -> np.ndarray:
    """Draws limbs as lines on black, each in a colour of its own, and keypoints as white discs.

    A limb's colour depends only on its place in the list: the hue goes once around. A limb is drawn
    where both of its ends are visible. What lies outside the picture is cut off, so keypoints may
    be those of a crop. Later limbs lie over earlier ones.

    Args:
        keypoints: (N, 3), of each x (column) and y (row) in pixels from the centre of the upper
            left pixel, and whether it is visible (above 0).
        limbs: pairs of row numbers of `keypoints`, such as `LIMBS["coco"]`.
        height, width: of the picture, in pixels.
        thickness: of lines and discs, in pixels; 0 takes a 64th of the shorter side, at least 1.

    Returns:
        uint8 (H, W, 3).

    Raises:
        ValueError: keypoints are not (N, 3), a visible one has no finite place, or a limb names a
            keypoint that does not exist.
    """
    keypoints = np.asarray(keypoints, np.float64)
    if keypoints.ndim != 2 or keypoints.shape[1] != 3:
        raise ValueError(f"Keypoints have the shape (N, 3): x, y, visible; not {keypoints.shape}.")
    visible = keypoints[:, 2] > 0
    lost = np.flatnonzero(visible & ~np.isfinite(keypoints[:, :2]).all(axis=1))
    if len(lost):
        x, y, _ = keypoints[lost[0]]
        raise ValueError(f"Keypoint {lost[0]} is visible, but its place is ({x}, {y}).")
    for limb in limbs:
        if not all(0 <= end < len(keypoints) for end in limb):
            raise ValueError(
                f"The limb {tuple(limb)} names a keypoint outside of 0 to {len(keypoints) - 1}."
            )
    thickness = thickness or max(1, round(min(height, width) / 64))
    picture = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(picture)
    for number, (begin, end) in enumerate(limbs):
        if visible[begin] and visible[end]:
            line = [tuple(keypoints[begin, :2]), tuple(keypoints[end, :2])]
            draw.line(line, fill=_hue(number / len(limbs)), width=thickness)
    radius = thickness / 2
    for x, y in keypoints[visible, :2]:
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill="white")
    return np.asarray(picture)


def _hue(hue: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue, 1.0, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)
