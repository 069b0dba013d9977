"""Tokenizers at f8 of the Earth and of its maps, for two CPU cores: what large pictures are made of.

    python -m vqgan_jax.train --config=configs/earth_f8.py
    python -m vqgan_jax.train --config=configs/earth_f8.py:segmentation --workdir=runs/earth_f8_segmentation
    python -m vqgan_jax.train --config=configs/earth_f8.py:relief --workdir=runs/earth_f8_relief

Trained on crops of 64 pixels. Norms are those of each position alone and there is no attention, so
that away from borders a place has the same codes in a crop and in an image of any size: with group
normalisation over the whole image, codes drawn window by window were decoded in wrong colours. Of
`:segmentation`, the 17 classes of land cover, binary cross-entropy and no discriminator.

The first command took 31 minutes on two cores that had other work, and ended with PSNR 28.5 dB, SSIM
0.67, LPIPS (AlexNet) 0.101 and 73 % of the codes in use on 43 unseen tiles. An unseen place of
256x512 pixels has PSNR 27.2 dB as a whole, and 27.1 in tiles of 128, with 72 % of the codes alike.
The second took 12 minutes and ended with 82 % of the pixels right and 96 % of the codes in use; the
best 256 codes of 8x8 pixels that know nothing of their neighbours, found by k-means, have 86 %. Half of
the third, 1,500 steps, ended with 24.8 dB after 12 minutes, with hues lost and a weave on plains.
"""  # noqa: E501

from vqgan_jax.configuration import parse_argument, tokenizer_config

VARIANTS = ("", "segmentation", "relief")


def get_config(arg: str = ""):
    """`arg` is the picture: "image", "relief" or "segmentation"."""
    argument = parse_argument(arg, data="image")
    config = tokenizer_config()

    model = config.model
    model.resolution = 64
    model.channels = 32
    model.channel_multipliers = (1, 1, 2, 4)
    model.num_res_blocks = 1
    model.attention_resolutions = ()
    model.latent_channels = 128
    model.middle_attention = False
    model.norm = "layer"  # codes and colours at a place are the same in images of every size
    model.quantizer.kind = "ema"
    model.quantizer.codebook_size = 1024
    model.quantizer.code_dim = 32
    model.quantizer.kmeans_init = True
    model.quantizer.ema_decay = 0.95  # codes that nothing uses start again after 31 steps
    model.quantizer.restart_below = 0.2

    config.data.name = "earth/128"
    config.data.image_key = argument.data
    if argument.data == "segmentation":
        model.in_channels = model.out_channels = config.data.num_labels = 17
        model.quantizer.codebook_size = 256
        config.loss.l1 = config.loss.perceptual = 0.0
        config.loss.binary_cross_entropy = 17.0  # its mean is over the classes too
        config.discriminator.enabled = False
    else:
        config.loss.perceptual_network.backbone = "alexnet"
        config.discriminator.channels = 32
        config.discriminator.num_layers = 2
        config.discriminator.start = 1000
        config.discriminator.weight = 0.2

    config.optimizer.learning_rate = 6e-4
    config.optimizer.discriminator_learning_rate = 3e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 50
    config.optimizer.end_factor = 0.1
    config.optimizer.clip_norm = 1.0
    config.optimizer.ema_decay = 0.99

    config.training.batch_size = 16
    config.training.num_steps = 1600
    if argument.data != "image":  # more and smaller steps: four times as far in the same time
        config.training.batch_size = 4
        config.training.num_steps = 3000
    config.training.evaluate_every = 400
    config.training.checkpoint_every = 125
    config.training.log_every = 25
    return config
