"""The discriminator of StyleGAN2, which is that of ViT-VQGAN.

Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN" (residual blocks, 4.1);
run-time scaled weights and the deviation over the batch are from Karras et al. 2018, "Progressive
Growing of GANs" (3 and 4.1), the blur from Zhang 2019, "Making Convolutional Networks
Shift-Invariant Again".
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqgan_jax.models.layers import at_least_float32
from vqgan_jax.models.operations import add_bias, convolve

BLUR = (1, 3, 3, 1)  # of each axis, normalised where it is used
LOWEST = 4  # the side at which the blocks end


def blur(x: jax.Array, padding: int, stride: int = 1) -> jax.Array:
    """`(B, H, W, C)` filtered with [1, 3, 3, 1] / 8 along both axes, zeros around.

    Gives `(H + 2 padding - 4) // stride + 1` rows, and columns likewise. One axis after the other,
    as sums of shifted maps: they fuse, where a convolution by channels is slow on most backends.
    """
    for axis in (1, 2):
        widths = [(0, 0)] * x.ndim
        widths[axis] = (padding, padding)
        padded = jnp.pad(x, widths)
        last = (padded.shape[axis] - len(BLUR)) // stride * stride
        x = sum(
            weight / sum(BLUR) * jax.lax.slice_in_dim(padded, i, i + last + 1, stride, axis)
            for i, weight in enumerate(BLUR)
        )
    return x


def minibatch_deviation(x: jax.Array, group_size: int) -> jax.Array:
    """How much a group of images differs: its standard deviation, a value an image `(B, 1, 1, 1)`.

    The deviation of each position and channel over the images of a group, averaged ("Progressive
    Growing of GANs", section 3). There are M = ceil(B / group_size) groups, and image i is in group
    i modulo M. Where `group_size` divides B, all are of that size; elsewhere they differ by one.

    So groups depend on the batch alone, not on the devices that it lies on; and the micro-batches
    of `accumulate`, which take every so manyth row, have the groups of the whole batch wherever
    `group_size` divides them.

    Args:
        x: `(B, h, w, C)`, float32 or wider.
        group_size: images of a group at most.
    """
    batch, *rest = x.shape
    groups = -(-batch // group_size)
    rows = -(-batch // groups)  # of the largest group
    padded = jnp.pad(x, ((0, rows * groups - batch), (0, 0), (0, 0), (0, 0)))
    grouped = padded.reshape(rows, groups, *rest)
    member = (jnp.arange(rows * groups) < batch).reshape(rows, groups, 1, 1, 1).astype(x.dtype)
    count = member.sum(axis=0)
    mean = grouped.sum(axis=0) / count
    variance = jnp.sum(member * jnp.square(grouped - mean), axis=0) / count
    deviation = jnp.sqrt(variance + 1e-8).mean(axis=(1, 2, 3))
    return jnp.tile(deviation, rows)[:batch].reshape(batch, 1, 1, 1)


def activate(x: jax.Array) -> jax.Array:
    """sqrt(2) leaky_relu(x, 0.2): about the variance of x."""
    return math.sqrt(2.0) * nn.leaky_relu(x, 0.2)


class EqualizedConv(nn.Module):
    """Convolution whose kernel is N(0, 1) times 1 / sqrt(fan-in) at run time.

    So that all layers learn at the same rate under Adam ("Progressive Growing of GANs", 4.1). With
    `downsample` the input is blurred and the stride is 2: even sizes are halved.
    """

    features: int
    kernel_size: int = 3
    downsample: bool = False
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        size, channels = self.kernel_size, x.shape[-1]
        shape = (size, size, channels, self.features)
        kernel = self.param("kernel", nn.initializers.normal(1.0), shape)
        kernel = kernel * (1.0 / math.sqrt(size * size * channels))
        x, half = x.astype(self.dtype), size // 2
        stride, padding = 1, ((half, half), (half, half))
        if self.downsample:
            stride, padding = (2, ((0, 0), (0, 0)))
            if size == 1:  # what a stride skips need not be blurred
                x, stride = blur(x, padding=1, stride=2), 1
            else:
                x = blur(x, padding=1 + half)
        x = convolve(x, kernel.astype(self.dtype), stride, padding)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            x = add_bias(x, bias.astype(self.dtype))
        return x


class EqualizedDense(nn.Module):
    """`(B, N)` -> `(B, features)`, its kernel scaled as that of `EqualizedConv`."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.normal(1.0), shape)
        kernel = kernel * (1.0 / math.sqrt(x.shape[-1]))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return x.astype(self.dtype) @ kernel.astype(self.dtype) + bias.astype(self.dtype)


class DownBlock(nn.Module):
    """Two convolutions that halve the sides, plus a 1x1 convolution of the blurred input.

    The sum is divided by sqrt(2), which keeps the variance.
    """

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        h = activate(EqualizedConv(x.shape[-1], dtype=self.dtype, name="conv1")(x))
        h = EqualizedConv(self.features, downsample=True, dtype=self.dtype, name="conv2")(h)
        shortcut = EqualizedConv(
            self.features,
            kernel_size=1,
            downsample=True,
            use_bias=False,
            dtype=self.dtype,
            name="shortcut",
        )
        return (activate(h) + shortcut(x)) * math.sqrt(0.5)


class StyleGANDiscriminator(nn.Module):
    """Images `(B, H, W, C)` -> one logit each, `(B, 1, 1, 1)` float32; high means real.

    Sides are halved while they are even and the half is at least 4, so those of 4 times a power of
    two come down to 4x4. What is left goes through a dense layer: the images of a run have one
    size.

    Attributes:
        base_channels: a map of side s has min(base_channels / s, max_channels) channels. 32,768 is
            that of StyleGAN2 (its config F); smaller ones train on a CPU.
        max_channels: see above.
        group_size: images whose deviation each sees ("minibatch_deviation"); 1 leaves it out, and
            every image is judged by itself.
        dtype: of the computation; parameters are float32.

    Raises:
        ValueError: images with a side below 4.
    """

    base_channels: int = 32_768
    max_channels: int = 512
    group_size: int = 4
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images, train: bool = False):
        del train  # as `PatchDiscriminator` takes it; nothing here differs in training
        if min(images.shape[1:3]) < LOWEST:
            raise ValueError(
                f"the stylegan discriminator needs images of at least {LOWEST} x {LOWEST} pixels; "
                f"these are {images.shape[2]} x {images.shape[1]}."
            )
        x = EqualizedConv(self._channels(images), 1, dtype=self.dtype, name="from_images")(images)
        x, level = activate(x), 0
        while all(side % 2 == 0 and side // 2 >= LOWEST for side in x.shape[1:3]):
            halved = x[:, ::2, ::2]
            x = DownBlock(self._channels(halved), self.dtype, name=f"block_{level}")(x)
            level += 1
        channels = x.shape[-1]
        if self.group_size > 1:
            deviation = minibatch_deviation(at_least_float32(x), self.group_size)
            deviation = jnp.broadcast_to(deviation.astype(x.dtype), (*x.shape[:3], 1))
            x = jnp.concatenate([x, deviation], axis=-1)
        x = activate(EqualizedConv(channels, dtype=self.dtype, name="conv_out")(x))
        x = x.reshape(x.shape[0], -1)
        x = activate(EqualizedDense(channels, self.dtype, name="dense")(x))
        logits = EqualizedDense(1, self.dtype, name="logits")(x)
        return at_least_float32(logits)[:, :, None, None]

    def _channels(self, x) -> int:
        return max(1, min(self.base_channels // max(x.shape[1:3]), self.max_channels))
