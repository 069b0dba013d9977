"""Nearest code vectors and k-means, in memory that does not grow with the codebook."""

import jax
import jax.numpy as jnp

MAX_DISTANCES = 2**25  # float32 values of one block of distances: 128 MiB


def l2_normalize(vectors: jax.Array) -> jax.Array:
    """Vectors `(..., D)` at unit length; zero stays zero, with a finite gradient."""
    return vectors * jax.lax.rsqrt(
        jnp.maximum(jnp.sum(jnp.square(vectors), axis=-1, keepdims=True), 1e-12)
    )


def squared_distances(points: jax.Array, rows: jax.Array) -> jax.Array:
    """|e|^2 - 2 z.e `(N, K)` of points z `(N, D)` and rows e `(K, D)`: less |z|^2 than it says."""
    products = jnp.einsum("n d, k d -> n k", points, rows, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(jnp.square(rows), axis=-1) - 2.0 * products


def codebook_blocks(codebook: jax.Array, num_points: int) -> tuple[jax.Array, jax.Array]:
    """A codebook `(K, D)` in blocks that have `MAX_DISTANCES` to so many points, or 128 rows.

    Returns:
        `(blocks, rows, D)`, the last padded with zeros; and `(blocks, rows)`, False for padding.
    """
    size, dim = codebook.shape
    rows = min(size, max(128, MAX_DISTANCES // num_points))
    num_blocks = -(-size // rows)
    padded = jnp.pad(codebook, ((0, num_blocks * rows - size), (0, 0)))
    exists = jnp.arange(num_blocks * rows) < size
    return padded.reshape(num_blocks, rows, dim), exists.reshape(num_blocks, rows)


def nearest_codes(latents: jax.Array, codebook: jax.Array) -> jax.Array:
    """Index of the nearest row of `codebook` `(K, D)` for each of `latents` `(..., D)`, int32.

    Squared Euclidean distance in float32, up to the latent's own norm: |e|^2 - 2 z.e. The lowest
    index wins a tie. The codebook is scanned in blocks, so memory is flat in K. No gradient.
    """
    latents, codebook = jax.lax.stop_gradient((latents, codebook))
    points = latents.reshape(-1, latents.shape[-1])
    blocks, exist = codebook_blocks(codebook, points.shape[0])
    num_blocks, size = exist.shape

    def nearest_of(rows, exists, offset):
        distances = jnp.where(exists, squared_distances(points, rows), jnp.inf)
        best = jnp.argmin(distances, axis=-1)
        return jnp.min(distances, axis=-1), (best + offset).astype(jnp.int32)

    if num_blocks == 1:
        return nearest_of(blocks[0], exist[0], 0)[1].reshape(latents.shape[:-1])

    def step(best, block):
        distance, index = nearest_of(*block)
        closer = distance < best[0]
        return (jnp.where(closer, distance, best[0]), jnp.where(closer, index, best[1])), None

    start = (
        jnp.full(points.shape[0], jnp.inf),
        jnp.zeros(points.shape[0], jnp.int32),
    )
    (_, codes), _ = jax.lax.scan(step, start, (blocks, exist, size * jnp.arange(num_blocks)))
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
