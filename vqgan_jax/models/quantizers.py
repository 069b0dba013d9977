"""Vector quantisers: latents in, codes and code vectors out, with a straight-through gradient.

All share one interface: `__call__(latents, train, temperature) -> Quantized` and
`lookup(codes) -> vectors`. The losses that train them are in `losses/quantization.py`.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from vqgan_jax.models.layers import Conv, at_least_float32
from vqgan_jax.models.nearest import kmeans, l2_normalize, nearest_codes


@flax.struct.dataclass
class Quantized:
    """What a quantiser makes of latents `(B, h, w, D)`."""

    quantized: jax.Array  # (B, h, w, D) for the decoder; gradients pass straight through
    codes: jax.Array  # (B, h, w) int32
    latents: jax.Array  # (B, h, w, D) float32, as they were compared with the codes
    vectors: jax.Array  # (B, h, w, D) float32, the codebook's rows
    logits: jax.Array | None = None  # (B, h, w, K), Gumbel only


def straight_through(latents: jax.Array, vectors: jax.Array) -> jax.Array:
    """The value of `vectors` with the gradient of `latents` (van den Oord et al. 2017, 3.2)."""
    return latents + jax.lax.stop_gradient(vectors - latents)


def uniform_codebook(key, shape, dtype=jnp.float32):
    """Uniform in +-1/K, the start of the reference's codebook."""
    return jax.random.uniform(key, shape, dtype, -1.0 / shape[0], 1.0 / shape[0])


class NearestQuantizer(nn.Module):
    """The nearest code by Euclidean distance ("Taming Transformers", equation 2).

    With `l2_normalize`, latents and codes are compared and handed on at unit length, so that the
    distance is the cosine's (Yu et al. 2022, "Vector-quantized Image Modeling", 3.2).
    With `kmeans_init`, the codebook starts at the k-means centres of the latents that `init` sees.
    """

    codebook_size: int
    code_dim: int
    l2_normalize: bool = False
    kmeans_init: bool = False

    @nn.compact
    def __call__(self, latents, train: bool = False, temperature=None) -> Quantized:
        latents = self._compared(at_least_float32(latents))
        codebook = self._compared(self._codebook(latents))
        codes = nearest_codes(latents, codebook)
        vectors = jnp.take(codebook, codes, axis=0)
        if train and not self.is_initializing():
            self._update(latents, codes)
        return Quantized(straight_through(latents, vectors), codes, latents, vectors)

    def lookup(self, codes):
        """Codes `(B, h, w)` -> code vectors `(B, h, w, D)`."""
        return jnp.take(self._compared(self._stored_codebook()), codes, axis=0)

    def _compared(self, vectors):
        return l2_normalize(vectors) if self.l2_normalize else vectors

    def _initial_codebook(self, key, latents):
        shape = (self.codebook_size, self.code_dim)
        if not self.kmeans_init:
            return uniform_codebook(key, shape)
        return self._compared(kmeans(key, latents.reshape(-1, self.code_dim), self.codebook_size))

    def _codebook(self, latents):
        return self.param("codebook", self._initial_codebook, latents)

    def _stored_codebook(self):
        return self.get_variable("params", "codebook")

    def _update(self, latents, codes):
        """The codebook learns by its gradient; nothing to do in the forward pass."""


class EMAQuantizer(NearestQuantizer):
    """Nearest code; the codebook follows the latents as an exponential moving average.

    Van den Oord et al. 2017, appendix A.1, with Laplace smoothing of the counts. The state is in
    the collection "codebook" (`embedding` (K, D), `counts` (K,), `sums` (K, D)), so no optimiser
    touches it. Statistics are those of the global batch. With `restart_below`, a code whose count
    falls below it is put on a random latent of the batch (Dhariwal et al. 2020, "Jukebox", 3.1);
    this draws from the random stream "codebook".
    """

    decay: float = 0.99
    epsilon: float = 1e-5
    restart_below: float = 0.0

    def _codebook(self, latents):
        def initial():
            return self._initial_codebook(self.make_rng("params"), latents)

        embedding = self.variable("codebook", "embedding", initial)
        self.variable("codebook", "counts", jnp.ones, (self.codebook_size,))
        self.variable("codebook", "sums", lambda: embedding.value)
        return embedding.value

    def _stored_codebook(self):
        return self.get_variable("codebook", "embedding")

    def _update(self, latents, codes):
        points = jax.lax.stop_gradient(latents).reshape(-1, self.code_dim)
        codes = codes.reshape(-1)
        batch_counts = jnp.zeros(self.codebook_size).at[codes].add(1.0)
        batch_sums = jnp.zeros((self.codebook_size, self.code_dim)).at[codes].add(points)

        def moving(name, new):
            return self.decay * self.get_variable("codebook", name) + (1 - self.decay) * new

        counts, sums = moving("counts", batch_counts), moving("sums", batch_sums)
        total = counts.sum()
        smoothed = (counts + self.epsilon) / (total + self.codebook_size * self.epsilon) * total
        embedding = self._compared(sums / smoothed[:, None])
        if self.restart_below > 0:
            rows = jax.random.randint(
                self.make_rng("codebook"), (self.codebook_size,), 0, points.shape[0]
            )
            dead = counts < self.restart_below
            fresh = jnp.take(points, rows, axis=0)
            embedding = jnp.where(dead[:, None], fresh, embedding)
            sums = jnp.where(dead[:, None], fresh, sums)
            counts = jnp.where(dead, 1.0, counts)
        self.put_variable("codebook", "embedding", embedding)
        self.put_variable("codebook", "counts", counts)
        self.put_variable("codebook", "sums", sums)


class GumbelQuantizer(nn.Module):
    """Codes drawn by the Gumbel-softmax with straight-through samples (Jang et al. 2017).

    `temperature` (a scalar) sharpens the relaxed sample. In training, noise comes from the random
    stream "gumbel"; at evaluation the code is the most probable one and nothing is drawn.
    """

    codebook_size: int
    code_dim: int

    @nn.compact
    def __call__(self, latents, train: bool = False, temperature=1.0) -> Quantized:
        latents = at_least_float32(latents)
        logits = Conv(self.codebook_size, kernel_size=1, dtype=latents.dtype, name="projection")(
            latents
        )
        codebook = self.param(
            "codebook", nn.initializers.normal(1.0), (self.codebook_size, self.code_dim)
        )
        if not train:
            codes = jnp.argmax(logits, axis=-1)
            vectors = jnp.take(codebook, codes, axis=0)
            return Quantized(vectors, codes, latents, vectors, logits)
        noise = jax.random.gumbel(self.make_rng("gumbel"), logits.shape)
        relaxed = jax.nn.softmax((logits + noise) / temperature, axis=-1)
        codes = jnp.argmax(relaxed, axis=-1)
        sample = straight_through(relaxed, jax.nn.one_hot(codes, self.codebook_size))
        vectors = jnp.einsum("b h w k, k d -> b h w d", sample, codebook)
        return Quantized(vectors, codes, latents, vectors, logits)

    def lookup(self, codes):
        """Codes `(B, h, w)` -> code vectors `(B, h, w, D)`."""
        return jnp.take(self.get_variable("params", "codebook"), codes, axis=0)


def make_quantizer(
    kind: str,
    codebook_size: int,
    code_dim: int,
    l2_normalize: bool,
    kmeans_init: bool,
    ema_decay: float,
    restart_below: float,
) -> nn.Module:
    """The quantiser that a config's `model.quantizer` describes."""
    if kind == "gumbel":
        return GumbelQuantizer(codebook_size, code_dim)
    if kind == "ema":
        return EMAQuantizer(
            codebook_size,
            code_dim,
            l2_normalize,
            kmeans_init,
            decay=ema_decay,
            restart_below=restart_below,
        )
    if kind == "nearest":
        return NearestQuantizer(codebook_size, code_dim, l2_normalize, kmeans_init)
    raise ValueError(f"unknown quantizer kind {kind!r}; it must be nearest, ema or gumbel")
