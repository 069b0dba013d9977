"""One small problem for all quantizers: how much of its codebook does each come to use?

Points are a mixture of 64 Gaussians in 8 dimensions. A linear autoencoder learns to give them back
through 256 codes, in one compiled loop of 200 steps of Adam.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vqgan_jax.configuration import tokenizer_config
from vqgan_jax.metrics.codebook import code_counts, usage
from vqgan_jax.models.quantizers import make_quantizer
from vqgan_jax.training.objectives import quantization_objective

STEPS, BATCH, DIM = 200, 256, 8
CENTRES = 2 * np.random.default_rng(0).standard_normal((64, DIM)).astype(np.float32)


def points(key, count):
    """`(1, 1, count, 8)`: a row of positions, as a quantizer takes them."""
    choose, spread = jax.random.split(key)
    chosen = jnp.take(CENTRES, jax.random.randint(choose, (count,), 0, len(CENTRES)), axis=0)
    return (chosen + jax.random.normal(spread, chosen.shape))[None, None]


def usage_after_training(entropy=0.0, **options):
    """Share of the codes that 8,192 new points use."""
    config = tokenizer_config()
    config.loss.legacy_codebook, config.loss.entropy = False, entropy
    config.loss.entropy_temperature = 1.0
    config.model.quantizer.update({"codebook_size": 256} | options)
    quantizer = config.model.quantizer
    module, optimizer = make_quantizer(**quantizer.to_dict()), optax.adam(1e-2)

    def loss(params, codebook, batch, step):
        result, updates = module.apply(
            {"params": params["quantizer"], "codebook": codebook},
            batch @ params["encoder"],
            train=True,
            temperature=0.9,
            rngs={"gumbel": jax.random.key(step), "codebook": jax.random.key(step)},
            mutable=["codebook"],
        )
        error = jnp.mean(jnp.square(result.quantized @ params["decoder"] - batch))
        objective, _ = quantization_objective(config.loss, quantizer.kind, result)
        return error + objective, updates.get("codebook", {})

    def step(carry, number):
        params, codebook, state = carry
        batch = points(jax.random.fold_in(jax.random.key(1), number), BATCH)
        gradients, codebook = jax.grad(loss, has_aux=True)(params, codebook, batch, number)
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(params, updates), codebook, state), None

    @jax.jit
    def run():
        first, dim = points(jax.random.key(2), BATCH), quantizer.code_dim
        encoder, decoder = (
            jax.random.normal(jax.random.key(seed), shape) * shape[0] ** -0.5
            for seed, shape in ((3, (DIM, dim)), (4, (dim, DIM)))
        )
        variables = module.init(jax.random.key(5), first @ encoder)
        params = {"encoder": encoder, "decoder": decoder, "quantizer": variables.get("params", {})}
        carry = params, variables.get("codebook", {}), optimizer.init(params)
        (params, codebook, _), _ = jax.lax.scan(step, carry, jnp.arange(STEPS))
        result = module.apply(
            {"params": params["quantizer"], "codebook": codebook},
            points(jax.random.key(6), 8192) @ params["encoder"],
        )
        return code_counts(result.codes, quantizer.codebook_size, depth=quantizer.depth)

    return float(usage(run()))


@pytest.mark.slow
def test_usage_of_each_quantizer():
    used = {
        "plain, 256-d": usage_after_training(kind="nearest", code_dim=256),
        "rotation, 256-d": usage_after_training(code_dim=256, gradient="rotation"),
        "ema, 256-d": usage_after_training(kind="ema", ema_decay=0.9, restart_below=0.1),
        "plain, 8-d": usage_after_training(code_dim=8),
        "entropy, 8-d": usage_after_training(code_dim=8, entropy=0.5),
        "unit length, 4-d": usage_after_training(code_dim=4, l2_normalize=True),
        "gumbel": usage_after_training(kind="gumbel", code_dim=8),
        "simvq": usage_after_training(kind="simvq", code_dim=8),
        "fsq": usage_after_training(kind="fsq", code_dim=3, levels=(8, 8, 4)),
        "lfq": usage_after_training(kind="lfq", code_dim=8, entropy=0.5),
        "residual": usage_after_training(kind="residual", code_dim=8, depth=2, codebook_size=16),
        "product": usage_after_training(kind="product", code_dim=8, depth=2, codebook_size=16),
    }
    assert used["plain, 256-d"] < 0.25 and used["unit length, 4-d"] > 0.95
    assert used["entropy, 8-d"] > 1.5 * used["plain, 8-d"]
    assert min(used[name] for name in ("ema, 256-d", "simvq", "fsq", "lfq")) > 0.8
    assert min(used[name] for name in ("residual", "product")) > 0.6
    assert min(used[name] for name in ("rotation, 256-d", "gumbel")) > 0.05
