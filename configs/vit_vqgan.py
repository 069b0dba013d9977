"""ViT-VQGAN (Yu et al. 2022, arXiv:2110.04627): 1,024 codes an image by vision transformers.

    python -m vqgan_jax.train --config=configs/vit_vqgan.py:SS
    python -m vqgan_jax.train --config=configs/vit_vqgan.py:BB
    python -m vqgan_jax.train --config=configs/vit_vqgan.py:SL
    python -m vqgan_jax.train --config=configs/vit_vqgan.py:SL,folder=PATH

The two letters are the sizes of encoder and decoder, Small, Base or Large, in any combination. A
forward pass of an image takes 68.7, 212.6 and 764.5 billion multiply-adds in the blocks of SS, BB
and SL. The paper trained on 128 TPUv4 at batch size 256; its reconstruction FID on ImageNet's
validation images is 1.99, 1.55 and 1.28. This project has not trained these models to the end.

The paper says that the discriminator is that of StyleGAN, and not how it is trained: loss and R1
regularisation here are those of StyleGAN2. For features that no label ever touched, as the paper's
linear probe has them, add --config.loss.perceptual=0.
"""

from vqgan_jax.configuration import ConfigError, parse_argument, tokenizer_config

VARIANTS = ("", "SS", "BB", "SL,folder=images")
SIZES = {
    "S": dict(layers=8, heads=8, width=512),
    "B": dict(layers=12, heads=12, width=768),
    "L": dict(layers=32, heads=16, width=1280),
}


def get_config(arg: str = ""):
    """`arg` is the sizes of encoder and decoder, as in "SL", and a data set."""
    if arg and set(arg.partition(",")[0]) <= set(SIZES):
        arg = f"size={arg}"
    argument = parse_argument(arg, data="imagenet2012", size="BB")
    if len(argument.size) != 2 or not set(argument.size) <= set(SIZES):
        raise ConfigError(
            f"the config's argument size={argument.size} must be two letters of {', '.join(SIZES)}:"
            " the size of the encoder and that of the decoder."
        )
    config = tokenizer_config()

    model = config.model
    model.architecture = "vit"
    model.resolution = 256
    model.logit_laplace = True
    model.remat = True  # else each network of BB keeps 46 GiB for 32 images, in bfloat16
    model.vit.patch = 8
    model.vit.encoder.update(SIZES[argument.size[0]])
    model.vit.decoder.update(SIZES[argument.size[1]])
    model.quantizer.codebook_size = 8192
    model.quantizer.code_dim = 32
    model.quantizer.l2_normalize = True

    config.loss.l1 = 0.0
    config.loss.l2 = 1.0
    config.loss.logit_laplace = 0.1
    config.loss.perceptual = 0.1
    config.loss.codebook = 1.0
    config.loss.commitment = 0.25
    config.loss.legacy_codebook = False
    config.discriminator.kind = "stylegan"
    config.discriminator.loss = "non_saturating"
    config.discriminator.weight = 0.1
    config.discriminator.adaptive_weight = False
    config.discriminator.start = 0
    config.discriminator.r1 = 10.0

    config.optimizer.learning_rate = 1e-4
    config.optimizer.b1, config.optimizer.b2 = 0.9, 0.99
    config.optimizer.weight_decay = 1e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 50_000
    config.optimizer.end_factor = 0.5

    config.data.name = argument.data
    config.training.batch_size = 256
    config.training.num_steps = 500_000
    return config
