"""Nearest code vectors and k-means, in memory that does not grow with the codebook."""

import jax
import jax.numpy as jnp

MAX_DISTANCES = 2**25  # float32 values of one block of distances: 128 MiB


def l2_normalize(vectors: jax.Array) -> jax.Array:
    """Vectors `(..., D)` at unit length; zero stays zero, with a finite gradient."""
    return vectors * jax.lax.rsqrt(
        jnp.maximum(jnp.sum(jnp.square(vectors), axis=-1, keepdims=True), 1e-12)
    )


def nearest_codes(latents: jax.Array, codebook: jax.Array) -> jax.Array:
    """Index of the nearest row of `codebook` `(K, D)` for each of `latents` `(..., D)`, int32.

    Squared Euclidean distance in float32, up to the latent's own norm: |e|^2 - 2 z.e. The lowest
    index wins a tie. The codebook is scanned in blocks, so memory is flat in K. No gradient.
    """
    latents, codebook = jax.lax.stop_gradient((latents, codebook))
    points = latents.reshape(-1, latents.shape[-1])
    size = codebook.shape[0]
    block = min(size, max(128, MAX_DISTANCES // points.shape[0]))

    def nearest_of(rows, offset):
        products = jnp.einsum(
            "n d, k d -> n k",
            points,
            rows,
            precision=jax.lax.Precision.HIGHEST,
        )
        distances = jnp.sum(jnp.square(rows), axis=-1) - 2.0 * products
        indices = offset + jnp.arange(rows.shape[0])
        distances = jnp.where(indices < size, distances, jnp.inf)
        best = jnp.argmin(distances, axis=-1)
        return jnp.min(distances, axis=-1), (best + offset).astype(jnp.int32)

    if block == size:
        return nearest_of(codebook, 0)[1].reshape(latents.shape[:-1])

    num_blocks = -(-size // block)
    padded = jnp.pad(codebook, ((0, num_blocks * block - size), (0, 0)))

    def step(best, i):
        rows = jax.lax.dynamic_slice_in_dim(padded, i * block, block)
        distance, index = nearest_of(rows, i * block)
        closer = distance < best[0]
        return (jnp.where(closer, distance, best[0]), jnp.where(closer, index, best[1])), None

    start = (
        jnp.full(points.shape[0], jnp.inf),
        jnp.zeros(points.shape[0], jnp.int32),
    )
    (_, codes), _ = jax.lax.scan(step, start, jnp.arange(num_blocks))
    return codes.reshape(latents.shape[:-1])


def kmeans(key: jax.Array, points: jax.Array, num_centres: int, iterations: int = 10) -> jax.Array:
    """Centres `(num_centres, D)` of `points` `(N, D)` after Lloyd's iterations.

    They start at random points, each point at most once while there are enough; where there are
    fewer points than centres, the repeats are moved apart by noise of 1 % of the points' spread.
    A centre without points stays where it was.
    """
    choose, jitter = jax.random.split(key)
    count = points.shape[0]
    rows = jax.random.permutation(choose, max(count, num_centres))[:num_centres] % count
    centres = jnp.take(points, rows, axis=0)
    if count < num_centres:
        centres += 0.01 * points.std() * jax.random.normal(jitter, centres.shape)

    def lloyd(_, centres):
        nearest = nearest_codes(points, centres)
        counts = jnp.zeros(num_centres).at[nearest].add(1.0)
        sums = jnp.zeros_like(centres).at[nearest].add(points)
        return jnp.where(counts[:, None] > 0, sums / jnp.maximum(counts, 1)[:, None], centres)

    return jax.lax.fori_loop(0, iterations, lloyd, centres)
