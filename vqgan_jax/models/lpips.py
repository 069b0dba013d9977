"""LPIPS, the learned perceptual distance (Zhang et al. 2018), on VGG16 or AlexNet features.

Parameters: `network/conv_{i}/{kernel,bias}` and `heads/head_{k}` `(C,)`. They are never random in
use: `interop/lpips.py` reads the published ones.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqgan_jax.models.layers import Conv, at_least_float32
from vqgan_jax.models.operations import max_pool

# Mean and deviation of ImageNet's pixels, moved from [0, 1] to [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)

VGG16_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# features, kernel, stride, padding, pooling in front
ALEXNET_LAYERS = (
    (64, 11, 4, 2, False),
    (192, 5, 1, 2, True),
    (384, 3, 1, 1, True),
    (256, 3, 1, 1, False),
    (256, 3, 1, 1, False),
)
HEAD_WIDTHS = {"vgg16": (64, 128, 256, 512, 512), "alexnet": (64, 192, 384, 256, 256)}


class VGG16(nn.Module):
    """The last activation in front of each pooling (relu1_2, 2_2, 3_3, 4_3, 5_3)."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        features, index = [], 0
        for i, widths in enumerate(VGG16_WIDTHS):
            if i > 0:
                x = max_pool(x)
            for width in widths:
                x = nn.relu(Conv(width, dtype=self.dtype, name=f"conv_{index}")(x))
                index += 1
            features.append(x)
        return features


class AlexNet(nn.Module):
    """The activations of the five convolutions."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        features = []
        for i, (width, size, stride, pad, pool) in enumerate(ALEXNET_LAYERS):
            if pool:
                x = nn.max_pool(x, (3, 3), strides=(2, 2))
            padding = ((pad, pad), (pad, pad))
            x = Conv(width, size, stride, padding, dtype=self.dtype, name=f"conv_{i}")(x)
            x = nn.relu(x)
            features.append(x)
        return features


class Heads(nn.Module):
    """A non-negative weight for each channel of each feature map; dropout as in the reference."""

    widths: tuple[int, ...]
    dropout: float = 0.5

    @nn.compact
    def __call__(self, differences, train: bool):
        distance = 0.0
        for k, (width, difference) in enumerate(zip(self.widths, differences, strict=True)):
            weight = self.param(f"head_{k}", nn.initializers.zeros, (width,))
            difference = nn.Dropout(self.dropout, deterministic=not train)(difference)
            distance += jnp.einsum("b h w c, c -> b h w", difference, weight).mean(axis=(1, 2))
        return distance


class LPIPS(nn.Module):
    """Distance `(B,)` float32 between images `(B, H, W, 3)` in [-1, 1]; 0 for equal images.

    One channel is taken as grey. `train` applies the heads' dropout (random stream "dropout"),
    which the reference does in training by accident.
    """

    backbone: str = "vgg16"
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        networks = {"vgg16": VGG16, "alexnet": AlexNet}
        self.network = networks[self.backbone](self.dtype)
        self.heads = Heads(HEAD_WIDTHS[self.backbone])

    def __call__(self, images, reconstructions, train: bool = False):
        differences = [
            jnp.square(a - b)
            for a, b in zip(self._features(images), self._features(reconstructions), strict=True)
        ]
        return self.heads(differences, train)

    def _features(self, images):
        x = (images - jnp.asarray(SHIFT)) / jnp.asarray(SCALE)
        return [_unit_length(at_least_float32(f)) for f in self.network(x)]


def _unit_length(features: jax.Array) -> jax.Array:
    """Features over their length; a column of zeros stays zero, with a finite gradient."""
    squares = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
    length = jnp.sqrt(jnp.where(squares > 0, squares, 1.0))
    return features / (jnp.where(squares > 0, length, 0.0) + 1e-10)
