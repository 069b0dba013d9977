"""Reconstruction figures against scikit-image, codebook figures against NumPy and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from skimage import data as skimage_data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from vqgan_jax.metrics.codebook import code_counts, perplexity, usage
from vqgan_jax.metrics.reconstruction import as_8_bit, psnr, ssim


def photograph(height, width):
    astronaut = skimage_data.astronaut()
    return np.stack([astronaut[:height, 150 : 150 + width], astronaut[-height:, -width:]])


def damaged(images_8_bit):
    noise = np.random.default_rng(0).normal(0, 12, images_8_bit.shape)
    blurred = (images_8_bit + np.roll(images_8_bit, 1, axis=1).astype(float)) / 2
    return np.clip(np.round(blurred + noise), 0, 255).astype(np.uint8)


def from_8_bit(images_8_bit):
    return jnp.asarray(images_8_bit, jnp.float32) / 127.5 - 1


@pytest.mark.parametrize("size", [(16, 16), (11, 40), (96, 64)])
def test_ssim_is_that_of_scikit_image_on_8_bit_images(size):
    images = photograph(*size)
    reconstructions = damaged(images)
    expected = [
        structural_similarity(
            image,
            reconstruction,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
        )
        for image, reconstruction in zip(images, reconstructions, strict=True)
    ]
    found = jax.jit(ssim)(from_8_bit(images), from_8_bit(reconstructions))
    assert found.shape == (2,) and found.dtype == jnp.float32
    assert min(expected) > 0.2 and max(expected) < 0.95
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_ssim_keeps_its_precision_in_flat_bright_regions():
    generator = np.random.default_rng(1)
    images = (0.9 + 1e-3 * generator.normal(size=(1, 24, 24, 3))).astype(np.float32)
    reconstructions = images + 1e-3 * generator.normal(size=images.shape).astype(np.float32)
    expected = structural_similarity(
        (images[0].astype(np.float64) + 1) / 2,
        (reconstructions[0].astype(np.float64) + 1) / 2,
        channel_axis=-1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1.0,
    )
    np.testing.assert_allclose(ssim(images, reconstructions), [expected], atol=1e-4)


def test_ssim_of_equal_images_is_one_and_falls_with_damage():
    images = from_8_bit(photograph(32, 32))
    noise = jax.random.normal(jax.random.key(0), images.shape)
    figures = [jax.jit(ssim)(images, images + sigma * noise) for sigma in (0.0, 0.05, 0.2, 0.8)]
    np.testing.assert_allclose(figures[0], 1.0, atol=1e-6)
    assert np.all(np.diff(np.stack(figures), axis=0) < 0)


def test_psnr_is_that_of_scikit_image():
    images = photograph(40, 24)
    reconstructions = damaged(images)
    expected = [
        peak_signal_noise_ratio(image, reconstruction, data_range=255)
        for image, reconstruction in zip(images, reconstructions, strict=True)
    ]
    found = psnr(from_8_bit(images), from_8_bit(reconstructions))
    assert found.shape == (2,)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_psnr_of_a_known_error():
    images = jnp.zeros((1, 4, 4, 3))
    np.testing.assert_allclose(psnr(images, images + 0.2), [20.0], rtol=1e-5)
    assert psnr(images, images)[0] == np.inf


def test_8_bit_rounding_is_that_of_a_file():
    levels = np.arange(256, dtype=np.uint8)
    images = from_8_bit(levels)
    np.testing.assert_array_equal(as_8_bit(images), images)
    shifted = images + jnp.asarray(np.random.default_rng(0).uniform(-0.49, 0.49, 256) / 127.5)
    np.testing.assert_array_equal(as_8_bit(shifted), images)
    np.testing.assert_array_equal(as_8_bit(jnp.array([-3.0, 1.5])), [-1.0, 1.0])
    assert as_8_bit(jnp.ones(2, jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_wrong_shapes_are_named(metric):
    with pytest.raises(ValueError, match=r"\(1, 16, 16, 3\) and \(2, 16, 16, 3\)"):
        metric(jnp.zeros((1, 16, 16, 3)), jnp.zeros((2, 16, 16, 3)))
    with pytest.raises(ValueError, match=r"\(B, H, W, C\)"):
        metric(jnp.zeros((16, 16, 3)), jnp.zeros((16, 16, 3)))


def test_ssim_names_its_smallest_size():
    with pytest.raises(ValueError, match="at least 11x11 pixels; these are 10x32"):
        ssim(jnp.zeros((1, 10, 32, 3)), jnp.zeros((1, 10, 32, 3)))


@pytest.mark.parametrize("shape", [(5, 4, 3), (5, 7), (5, 2, 2, 4)])
@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
def test_code_counts_are_those_of_numpy(shape, dtype):
    codes = np.random.default_rng(2).integers(0, 11, shape).astype(dtype)
    mask = np.array([True, False, True, True, False])
    count = jax.jit(code_counts, static_argnums=1)
    np.testing.assert_array_equal(count(codes, 13), np.bincount(codes.ravel(), minlength=13))
    masked = count(codes, 13, mask)
    assert masked.dtype == jnp.int32
    np.testing.assert_array_equal(masked, np.bincount(codes[mask].ravel(), minlength=13))


def test_the_last_code_counts_beside_padded_images():
    codes = np.full((2, 2, 2), 7)
    np.testing.assert_array_equal(code_counts(codes, 8, np.array([True, False])), [0] * 7 + [4])


@pytest.mark.parametrize("wrap", [lambda function: function, jax.jit], ids=["host", "jit"])
def test_usage_and_perplexity(wrap):
    counts = np.random.default_rng(3).poisson(2.0, 1000)
    assert wrap(usage)(counts) == pytest.approx(np.count_nonzero(counts) / 1000, rel=1e-6)
    expected = np.exp(scipy.stats.entropy(counts))
    np.testing.assert_allclose(wrap(perplexity)(counts), expected, rtol=1e-5)
    assert wrap(perplexity)(jnp.full(16, 3, jnp.int32)) == pytest.approx(16.0, rel=1e-6)
    assert wrap(perplexity)(np.array([0, 9, 0])) == 1.0
    assert wrap(usage)(jnp.array([0, 9, 0, 1])) == 0.5


def test_perplexity_of_a_large_codebook_and_a_split_beyond_int32():
    counts = np.random.default_rng(4).poisson(30_000.0, 262_144)
    assert counts.sum() > 2**32
    expected = np.exp(scipy.stats.entropy(counts))
    np.testing.assert_allclose(perplexity(counts), expected, rtol=1e-5)


def test_perplexity_of_nothing_is_not_a_number():
    assert np.isnan(perplexity(jnp.zeros(4, jnp.int32)))
