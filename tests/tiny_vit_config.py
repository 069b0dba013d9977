"""The smallest run of a ViT-VQGAN that has every part: distribution of pixels, both players, LPIPS.

The tests' environment names its images and perceptual weights; see `training_runs.py`.
"""

import os

from vqgan_jax.configuration import tokenizer_config


def get_config(arg: str = ""):
    """The config; `arg` is the dtype of the computation, float32 unless it says float64."""
    config = tokenizer_config()
    model = config.model
    model.dtype = arg or "float32"
    model.architecture = "vit"
    model.resolution = 32
    model.logit_laplace = True
    model.vit.patch = 8
    model.vit.encoder.update(layers=1, heads=2, width=16)
    model.vit.decoder.update(layers=2, heads=3, width=24)
    model.quantizer.update(codebook_size=16, code_dim=8, l2_normalize=True, kmeans_init=True)
    config.loss.update(l1=0.0, l2=1.0, perceptual=0.1, logit_laplace=0.1, legacy_codebook=False)
    config.loss.perceptual_network.backbone = "alexnet"
    config.loss.perceptual_network.path = os.environ["VQGAN_JAX_TEST_WEIGHTS"]
    config.loss.perceptual_network.sha256 = os.environ["VQGAN_JAX_TEST_SHA256"]
    config.discriminator.update(channels=16, num_layers=1, start=0)
    config.discriminator.update(weight=0.1, adaptive_weight=False)
    config.optimizer.update(learning_rate=1e-3, b1=0.9, b2=0.99, weight_decay=1e-4)
    config.data.name = "folder:" + os.environ["VQGAN_JAX_TEST_IMAGES"]
    config.data.threads = 2
    config.training.batch_size = 8
    config.training.num_steps = 4
    config.training.log_every = 1
    config.training.evaluate_every = 2
    config.training.checkpoint_every = 2
    config.training.keep_latest = 20
    config.training.grid_images = 4
    return config
