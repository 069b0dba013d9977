"""The smallest run of stage 2 that has every part: classes left out, corrupted inputs, dropout.

The tests' environment names the directory of its tokenizer, codes and images; see
`transformer_runs.py`.
"""

import os

from vqgan_jax.configuration import transformer_config


def get_config(arg: str = ""):
    """The config; `arg` is the dtype of the computation, float32 unless it says float64."""
    inputs = os.environ["VQGAN_JAX_TEST_TRANSFORMER"]
    config = transformer_config()
    config.model.dtype = arg or "float32"
    config.model.num_layers = 2
    config.model.num_heads = 2
    config.model.width = 32
    config.model.dropout = 0.1
    config.condition.kinds = ("class",)
    config.condition.dropout = 0.2
    config.tokenizer.path = f"{inputs}/tokenizer"
    config.data.codes = f"{inputs}/codes"
    config.data.name = f"folder:{inputs}/images"
    config.data.threads = 2
    config.optimizer.learning_rate = 3e-3
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip_norm = 1.0
    config.optimizer.ema_decay = 0.9
    config.training.pkeep = 0.9
    config.training.batch_size = 8
    config.training.num_steps = 10
    config.training.log_every = 1
    config.training.evaluate_every = 5
    config.training.checkpoint_every = 2
    config.training.keep_latest = 20
    config.training.grid_images = 4
    config.sampling.top_k = 8
    config.sampling.guidance_scale = 1.5
    return config
