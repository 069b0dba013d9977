"""Pictures that are derived from an image or a depth map, as conditions of any data set.

All are uint8 (H, W, 3), so that an image tokenizer encodes them as it encodes photographs.
"""

import numpy as np
from PIL import Image

FROM_IMAGE = ("edges", "low_resolution")  # what is derived from the image itself
DERIVED = (*FROM_IMAGE, "skeleton")  # the last from keypoints

_BAND_PIXELS = 2**20


def canny_edges(image: np.ndarray, sigma: float = 2.0) -> np.ndarray:
    """Edges by the method of Canny (1986), white on black.

    Grey levels are taken in [-1, 1] and the thresholds of the gradient are 0.1 and 0.2, as in the
    reference; an isolated straight edge shows from a contrast of about 16 of 255 levels.

    Args:
        image: uint8 (H, W, 3).
        sigma: standard deviation of the Gaussian that blurs the image first, in pixels.

    Returns:
        uint8 (H, W, 3), 255 at edges and 0 elsewhere.

    Raises:
        ValueError: the image is not uint8 (H, W, 3), or sigma is not positive.
    """
    # scikit-image and the SciPy under it take long to import, which other conditions need not.
    from skimage.color import rgb2gray
    from skimage.feature import canny

    _require_picture(image)
    if not sigma > 0:
        raise ValueError(f"The sigma of Canny edges must be positive, not {sigma}.")
    grey = rgb2gray((image / 127.5 - 1).astype(np.float32))
    edges = canny(grey, sigma=sigma, low_threshold=0.1, high_threshold=0.2)
    return np.repeat(np.where(edges, np.uint8(255), np.uint8(0))[..., None], 3, axis=-1)


def low_resolution(image: np.ndarray, factor: int) -> np.ndarray:
    """What is left of an image after scaling down, at its old size: the input of super-resolution.

    Scaled down to (H // factor, W // factor) by Pillow's antialiased bicubic filter, then up again
    by the bicubic filter, each time rounded to uint8: the reference's low-resolution images.

    Args:
        image: uint8 (H, W, 3).
        factor: how many times smaller, 1 to the shorter side; 1 changes nothing.

    Returns:
        uint8 (H, W, 3).

    Raises:
        ValueError: the image is not uint8 (H, W, 3), or the factor is out of range.
    """
    _require_picture(image)
    height, width = image.shape[:2]
    if not 1 <= factor <= min(height, width):
        raise ValueError(
            f"An image of {height} x {width} pixels (height x width) cannot be scaled down by "
            f"{factor}; the factor must be 1 to {min(height, width)}."
        )
    bicubic = Image.Resampling.BICUBIC
    small = Image.fromarray(image).resize((width // factor, height // factor), bicubic)
    return np.asarray(small.resize((width, height), bicubic))


def depth_picture(depth: np.ndarray) -> np.ndarray:
    """A depth map of any unit as a grey picture that uses all levels.

    The smallest value of the map becomes 0 and the largest 255 (-1 and 1 for a model), linearly:
    relative depth, as networks for single images estimate it. A constant map is black.

    Args:
        depth: floats (H, W), finite.

    Returns:
        uint8 (H, W, 3), grey.

    Raises:
        ValueError: the map is not (H, W), is empty, or has values that are not finite.
    """
    depth = np.asarray(depth)
    if depth.ndim != 2 or depth.size == 0:
        raise ValueError(f"A depth map has the shape (H, W), not {depth.shape}.")
    # In bands: in float64 the map would need eight times as much memory as its picture's levels.
    height, width = depth.shape
    rows = max(1, _BAND_PIXELS // width)
    bands = [slice(top, top + rows) for top in range(0, height, rows)]
    if broken := sum(np.count_nonzero(~np.isfinite(depth[band])) for band in bands):
        raise ValueError(f"The depth map has {broken} values that are not finite.")
    nearest, farthest = np.float64(depth.min()), np.float64(depth.max())
    picture = np.empty((height, width, 3), np.uint8)
    for band in bands:
        shares = (depth[band].astype(np.float64) - nearest) / max(1e-8, farthest - nearest)
        picture[band] = np.rint(255 * shares).astype(np.uint8)[..., None]
    return picture


def _require_picture(image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(
            f"A picture must be uint8 (H, W, 3); this array is {image.dtype} {image.shape}."
        )
