"""A small ViT-VQGAN at f4 of 64-pixel satellite tiles of the Earth, for two CPU cores.

    python -m vqgan_jax.train --config=configs/vit_earth.py

It has the codes of the quick start, 16x16 of 512, at about the same cost of a step. It was not run
to its end yet.
"""

from vqgan_jax.configuration import parse_argument, tokenizer_config

VARIANTS = ("",)


def get_config(arg: str = ""):
    """A small tokenizer of `earth`; `arg` may name another data set."""
    argument = parse_argument(arg, data="earth")
    config = tokenizer_config()

    model = config.model
    model.architecture = "vit"
    model.resolution = 64
    model.vit.patch = 4
    model.vit.encoder.update(layers=3, heads=4, width=128)
    model.vit.decoder.update(layers=3, heads=4, width=128)
    model.quantizer.kind = "ema"
    model.quantizer.l2_normalize = True
    model.quantizer.codebook_size = 512
    model.quantizer.code_dim = 16
    model.quantizer.kmeans_init = True
    model.quantizer.restart_below = 0.01

    config.loss.perceptual_network.backbone = "alexnet"  # 18 times cheaper than VGG16 on a CPU
    config.discriminator.channels = 32
    config.discriminator.num_layers = 2
    config.discriminator.start = 400
    config.discriminator.weight = 0.2

    config.optimizer.learning_rate = 1e-3
    config.optimizer.discriminator_learning_rate = 3e-4
    config.optimizer.b1, config.optimizer.b2 = 0.9, 0.99
    config.optimizer.weight_decay = 1e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 50
    config.optimizer.end_factor = 0.1
    config.optimizer.clip_norm = 1.0
    config.optimizer.ema_decay = 0.99

    config.data.name = argument.data
    config.training.batch_size = 16
    config.training.num_steps = 600
    config.training.evaluate_every = 300
    config.training.checkpoint_every = 150
    config.training.log_every = 25
    return config
