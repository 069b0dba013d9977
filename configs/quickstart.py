"""A VQGAN f4 on 64-pixel satellite tiles of the Earth, for two CPU cores.

python -m vqgan_jax.train --config=configs/quickstart.py
"""

from vqgan_jax.configuration import parse_argument, tokenizer_config

VARIANTS = ("",)


def get_config(arg: str = ""):
    """A small tokenizer of `earth`; `arg` may name another data set."""
    argument = parse_argument(arg, data="earth")
    config = tokenizer_config()

    model = config.model
    model.resolution = 64
    model.channels = 32
    model.channel_multipliers = (1, 1, 2)
    model.num_res_blocks = 1
    model.attention_resolutions = ()
    model.latent_channels = 64
    model.num_groups = 4
    model.quantizer.kind = "ema"
    model.quantizer.codebook_size = 512
    model.quantizer.code_dim = 16
    model.quantizer.kmeans_init = True
    model.quantizer.restart_below = 0.01

    config.loss.perceptual_network.backbone = "alexnet"  # 18 times cheaper than VGG16 on a CPU
    config.discriminator.channels = 32
    config.discriminator.num_layers = 2
    config.discriminator.start = 500
    config.discriminator.weight = 0.2

    config.optimizer.learning_rate = 1e-3
    config.optimizer.discriminator_learning_rate = 3e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 50
    config.optimizer.end_factor = 0.1
    config.optimizer.clip_norm = 1.0
    config.optimizer.ema_decay = 0.99

    config.data.name = argument.data
    config.training.batch_size = 16
    config.training.num_steps = 700
    config.training.evaluate_every = 350
    config.training.checkpoint_every = 175
    config.training.log_every = 25
    config.training.pictures_every = 100
    return config
