"""The patch discriminator of "Image-to-Image Translation with Conditional Adversarial Networks".

Isola et al. 2017, appendix 6.1.2; the reference's form of it, with three choices of normalisation.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqgan_jax.models.layers import Conv, GroupNorm, at_least_float32


class ActNorm(nn.Module):
    """A channel's scale and bias that start by whitening the first batch (Kingma et al. 2018)."""

    @nn.compact
    def __call__(self, x):
        x = at_least_float32(x)

        def initial_bias(_):
            return -x.mean(axis=(0, 1, 2))

        def initial_scale(_):
            return 1.0 / (x.std(axis=(0, 1, 2), ddof=1) + 1e-6)

        bias, scale = self.param("bias", initial_bias), self.param("scale", initial_scale)
        return scale * (x + bias)


class BatchNorm(nn.Module):
    """Batch normalisation over the global batch (Ioffe and Szegedy 2015), statistics in float32.

    Running statistics, in the collection "batch_stats", follow PyTorch: momentum 0.1 and the
    unbiased variance. Training never reads them.
    """

    momentum: float = 0.1
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x, train: bool):
        channels = x.shape[-1]
        near_one = nn.initializers.normal(0.02)
        scale = self.param("scale", lambda key, shape: 1.0 + near_one(key, shape), (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        running_variance = self.variable("batch_stats", "var", jnp.ones, (channels,))
        x = at_least_float32(x)
        if not train:
            mean, variance = running_mean.value, running_variance.value
        else:
            mean = x.mean(axis=(0, 1, 2))
            variance = jnp.mean(jnp.square(x - mean), axis=(0, 1, 2))
            if not self.is_initializing():
                count = x.size // channels
                unbiased = variance * (count / max(count - 1, 1))
                running_mean.value += self.momentum * (mean - running_mean.value)
                running_variance.value += self.momentum * (unbiased - running_variance.value)
        factor = scale * jax.lax.rsqrt(variance + self.epsilon)
        return x * factor + (bias - mean * factor)


class PatchDiscriminator(nn.Module):
    """Images `(B, H, W, C)` -> one logit a patch, `(B, h, w, 1)` float32; high means real."""

    channels: int = 64
    num_layers: int = 3
    norm: str = "batch"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images, train: bool = False):
        def conv(i, features, stride, use_bias=True):
            return Conv(
                features,
                kernel_size=4,
                stride=stride,
                padding=((1, 1), (1, 1)),
                use_bias=use_bias,
                kernel_init=nn.initializers.normal(0.02),
                dtype=self.dtype,
                name=f"conv_{i}",
            )

        x = nn.leaky_relu(conv(0, self.channels, stride=2)(images), 0.2)
        for i in range(1, self.num_layers + 1):
            features = self.channels * min(2**i, 8)
            stride = 2 if i < self.num_layers else 1
            x = conv(i, features, stride, use_bias=self.norm == "act")(x)
            x = self._normalize(f"norm_{i}", x, train).astype(self.dtype)
            x = nn.leaky_relu(x, 0.2)
        return at_least_float32(conv(self.num_layers + 1, 1, stride=1)(x))

    def _normalize(self, name, x, train):
        if self.norm == "batch":
            return BatchNorm(name=name)(x, train)
        if self.norm == "act":
            return ActNorm(name=name)(x)
        if self.norm == "group":
            return GroupNorm(num_groups=16, name=name)(x)
        raise ValueError(f"unknown norm {self.norm!r}; it must be batch, act or group")
