"""The smallest run that has every part but LPIPS, which takes longer than all of them together:
both players, evaluations, checkpoints. `tiny_vit_config.py` has LPIPS too.

The tests' environment names its images and perceptual weights; see `training_runs.py`.
"""

import os

from vqgan_jax.configuration import tokenizer_config


def get_config(arg: str = ""):
    """The config; `arg` is the dtype of the computation, float32 unless it says float64."""
    config = tokenizer_config()
    config.model.dtype = arg or "float32"
    config.model.resolution = 16
    config.model.channels = 8
    config.model.num_groups = 4
    config.model.channel_multipliers = (1, 1)
    config.model.num_res_blocks = 0  # the decoder has one a level
    config.model.attention_resolutions = ()
    config.model.latent_channels = 8
    config.model.quantizer.codebook_size = 16  # few: rounding decides ties, and few codes have few
    config.model.quantizer.code_dim = 8
    config.loss.perceptual = 0.0
    config.loss.perceptual_network.backbone = "alexnet"
    config.loss.perceptual_network.path = os.environ["VQGAN_JAX_TEST_WEIGHTS"]
    config.loss.perceptual_network.sha256 = os.environ["VQGAN_JAX_TEST_SHA256"]
    config.discriminator.channels = 8
    config.discriminator.num_layers = 1
    config.discriminator.start = 0
    config.data.name = "folder:" + os.environ["VQGAN_JAX_TEST_IMAGES"]
    config.data.threads = 2
    config.training.batch_size = 8
    config.training.num_steps = 14
    config.training.log_every = 1
    config.training.evaluate_every = 7
    config.training.checkpoint_every = 4
    config.training.keep_latest = 20
    config.training.grid_images = 4
    return config
