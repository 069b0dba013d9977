"""The nearest code of a codebook that follows the latents as a moving average."""

import jax
import jax.numpy as jnp

from vqgan_jax.models.quantizers.nearest import NearestQuantizer


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
            return self._compared(self._initial_codebook(self.make_rng("params"), latents))

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
