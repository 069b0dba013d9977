"""A VQGAN on 64-pixel tiles of the Earth, for a laptop's CPU."""

from vqgan_jax.configuration import tokenizer_config


def get_config(arg: str = ""):
    """The config; it takes no argument."""
    del arg
    config = tokenizer_config()
    config.model.resolution = 64
    config.model.channels = 32
    config.model.channel_multipliers = (1, 2, 2)
    config.model.num_res_blocks = 1
    config.model.attention_resolutions = (16,)
    config.model.latent_channels = 64
    config.model.quantizer.codebook_size = 512
    config.model.quantizer.code_dim = 32
    config.data.name = "earth"
    config.training.batch_size = 16
    config.training.num_steps = 1000
    config.training.evaluate_every = 500
    config.training.checkpoint_every = 250
    config.discriminator.start = 500
    return config
