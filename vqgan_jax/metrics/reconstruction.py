"""How close reconstructions come to their images, pixel by pixel: PSNR and SSIM.

Both take images in [-1, 1]. Publications compare 8-bit images, so an evaluation passes both sides
through `as_8_bit` first.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_WINDOW = 11
_SIGMA = 1.5
_K1 = 0.01
_K2 = 0.03


def as_8_bit(images: jax.Array) -> jax.Array:
    """Images as they would come back from an 8-bit file: clipped and rounded to 256 levels.

    Args:
        images: any shape, nominally in [-1, 1].

    Returns:
        float32 of the same shape, on the levels `level / 127.5 - 1` of 0 to 255.
    """
    levels = jnp.round((jnp.clip(images.astype(jnp.float32), -1.0, 1.0) + 1.0) * 127.5)
    return levels / 127.5 - 1.0


def psnr(images: jax.Array, reconstructions: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio of every image.

    The data range is 2 on [-1, 1], which gives the number of data range 1 on [0, 1] or 255 on
    8-bit images.

    Args:
        images: (B, H, W, C) in [-1, 1].
        reconstructions: the same shape and range.

    Returns:
        (B,) float32 in dB; infinite where the two are equal.

    Raises:
        ValueError: the shapes differ or are not (B, H, W, C).
    """
    _check_shapes(images, reconstructions)
    difference = images.astype(jnp.float32) - reconstructions.astype(jnp.float32)
    mean_squared_error = jnp.mean(jnp.square(difference), axis=(1, 2, 3))
    return 10.0 * jnp.log10(4.0 / mean_squared_error)


def ssim(images: jax.Array, reconstructions: jax.Array) -> jax.Array:
    """Structural similarity of every image (Wang et al. 2004, "Image Quality Assessment").

    Equation 13 with a Gaussian window of 11 pixels and sigma 1.5, K1 = 0.01 and K2 = 0.03, at
    every position where the window lies inside the image, averaged over positions and channels.
    SSIM is not invariant to an offset: it is defined for intensities from 0, so the images are
    moved to [0, 1] (data range 1) first. On [-1, 1] with data range 2 it would be another number.

    Args:
        images: (B, H, W, C) in [-1, 1], H and W of at least 11.
        reconstructions: the same shape and range.

    Returns:
        (B,) float32, at most 1.

    Raises:
        ValueError: the shapes differ, are not (B, H, W, C), or are smaller than the window.
    """
    _check_shapes(images, reconstructions)
    height, width = images.shape[1:3]
    if min(height, width) < _WINDOW:
        raise ValueError(
            f"SSIM needs images of at least {_WINDOW}x{_WINDOW} pixels; these are {height}x{width}."
        )
    x = (images.astype(jnp.float32) + 1.0) / 2.0
    y = (reconstructions.astype(jnp.float32) + 1.0) / 2.0

    # The formula needs the two variances only as their sum: four filtered maps, not five.
    moments = _gaussian_filter(jnp.concatenate([x, y, x * x + y * y, x * y], axis=-1))
    mean_x, mean_y, mean_squares, mean_product = jnp.split(moments, 4, axis=-1)
    product_of_means = mean_x * mean_y
    squares_of_means = mean_x**2 + mean_y**2
    covariance = mean_product - product_of_means
    variances = mean_squares - squares_of_means

    c1, c2 = _K1**2, _K2**2
    luminance = (2.0 * product_of_means + c1) / (squares_of_means + c1)
    structure = (2.0 * covariance + c2) / (variances + c2)
    return jnp.mean(luminance * structure, axis=(1, 2, 3))


def _gaussian_filter(maps: jax.Array) -> jax.Array:
    """(B, H, W, C) -> (B, H - 10, W - 10, C): each channel under the window, inside the image.

    Two products with banded matrices instead of depthwise convolutions, which are slow on every
    backend. The highest precision, because variances are small differences of these means.
    """
    rows, columns = _window_matrix(maps.shape[1]), _window_matrix(maps.shape[2])
    maps = jnp.einsum("ih,bhwc->biwc", rows, maps, precision=lax.Precision.HIGHEST)
    return jnp.einsum("jw,biwc->bijc", columns, maps, precision=lax.Precision.HIGHEST)


def _window_matrix(size: int) -> np.ndarray:
    """(size - 10, size): row i holds the Gaussian window that starts at pixel i."""
    offsets = np.arange(_WINDOW) - _WINDOW // 2
    window = np.exp(-(offsets**2) / (2.0 * _SIGMA**2))
    matrix = np.zeros((size - _WINDOW + 1, size), np.float32)
    for start, row in enumerate(matrix):
        row[start : start + _WINDOW] = window / window.sum()
    return matrix


def _check_shapes(images: jax.Array, reconstructions: jax.Array) -> None:
    if images.ndim != 4 or images.shape != reconstructions.shape:
        raise ValueError(
            "images and reconstructions must have one shape (B, H, W, C); they have "
            f"{images.shape} and {reconstructions.shape}."
        )
