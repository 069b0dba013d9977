"""Small configs for plans: no data, no weights, no tokenizer; shapes fill a chip's tiles."""

from vqgan_jax.configuration import tokenizer_config, transformer_config


def small_transformer(layers=2, batch_size=64, **mesh):
    """Of 4x4 codes; a batch's activations are larger than any of its parameters."""
    config = transformer_config()
    config.model.update(num_layers=layers, num_heads=2, width=128)
    config.model.update(codebook_size=256, grid=(4, 4), dtype="bfloat16")
    config.training.batch_size = batch_size
    config.mesh.update(mesh)
    return config


def small_tokenizer(batch_size=32, resolution=32, blocks=0, **mesh):
    """Convolutional, with both players and no LPIPS."""
    config = tokenizer_config()
    config.model.update(resolution=resolution, channels=32, channel_multipliers=(1, 2))
    config.model.update(num_res_blocks=blocks, attention_resolutions=(), latent_channels=32)
    config.model.update(dtype="bfloat16")
    config.model.quantizer.update(codebook_size=64, code_dim=16)
    config.loss.perceptual = 0.0
    config.discriminator.update(channels=16, num_layers=1, start=0)
    config.training.batch_size = batch_size
    config.mesh.update(mesh)
    return config
