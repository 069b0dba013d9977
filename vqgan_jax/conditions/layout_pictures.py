"""Layouts of scenes as pictures, for the logs."""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vqgan_jax.conditions.layouts import (
    ATTRIBUTES,
    WHOLE_SCENE,
    Box,
    Layout,
    SceneObject,
)

_GOLDEN_RATIO = 0.618033988749895  # its multiples modulo 1 stay far apart: hues for any number
_FRAME = (64, 64, 64)


def draw_layout(
    layout: Layout, height: int, width: int, class_names: Sequence[str] = ()
) -> np.ndarray:
    """Draws every object's box with its class, and the crop in dark grey, on white.

    The colour depends on the class alone. Boxes without area, such as those of decoded centres, are
    discs. Attributes are given by their first letters, "dog (g, o)".

    Args:
        layout: of the whole scene, such as `encoding.decode(tokens)`.
        height, width: of the picture, in pixels.
        class_names: in the order of their numbers; empty writes the numbers.

    Returns:
        uint8 (H, W, 3).
    """
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(min(max(10, height // 24), 24))
    line = max(1, round(max(height, width) / 128))
    radius = 1.5 * line
    for item in layout.objects:
        color = _color(item.label)
        left, top, right, bottom = _pixels(item.box, height, width)
        if left == right and top == bottom:
            draw.ellipse((left - radius, top - radius, left + radius, top + radius), fill=color)
        else:
            draw.rectangle((left, top, right, bottom), outline=color, width=line)
        corner = (left + 2 * line, top + line)
        draw.text(corner, _caption(item, class_names), fill="black", font=font)
    if layout.crop != WHOLE_SCENE:
        draw.rectangle(_pixels(layout.crop, height, width), outline=_FRAME, width=line)
    return np.asarray(picture)


def _pixels(box: Box, height: int, width: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom; all are pixels of the picture."""
    x, y, box_width, box_height = box
    right, bottom = x + box_width, y + box_height
    columns = (round(min(max(share, 0), 1) * (width - 1)) for share in (x, right))
    rows = (round(min(max(share, 0), 1) * (height - 1)) for share in (y, bottom))
    (left, right), (top, bottom) = columns, rows
    return left, top, right, bottom


def _caption(item: SceneObject, class_names: Sequence[str]) -> str:
    name = class_names[item.label] if class_names else str(item.label)
    letters = ", ".join(attribute[0] for attribute in ATTRIBUTES if attribute in item.attributes)
    return f"{name} ({letters})" if letters else name


def _color(label: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(label * _GOLDEN_RATIO % 1, 0.85, 0.85)
    return round(255 * red), round(255 * green), round(255 * blue)
