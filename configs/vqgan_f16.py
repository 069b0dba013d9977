"""The VQGAN f16 of "Taming Transformers" (Esser et al. 2021, arXiv:2012.09841): 256 codes an image.

    python -m vqgan_jax.train --config=configs/vqgan_f16.py:imagenet2012
    python -m vqgan_jax.train --config=configs/vqgan_f16.py:imagenet2012,codes=16384
    python -m vqgan_jax.train --config=configs/vqgan_f16.py:folder=PATH
    python -m vqgan_jax.train --config=configs/vqgan_f16.py:earth

Any tensorflow-datasets name with an `image` feature works in the place of imagenet2012. The paper
trained at batch size 12 on one 40 GB GPU; the learning rate grows with the batch size (4.5e-6 times
it). Its reconstruction FID on ImageNet's validation images is 7.94 with 1,024 codes and 4.98 with
16,384 (the paper's table 5). This project has not trained the model to the end.
"""

from vqgan_jax.configuration import parse_argument, tokenizer_config

VARIANTS = ("", "imagenet2012,codes=16384", "earth", "folder=images")


def get_config(arg: str = ""):
    """The paper's ImageNet model; `arg` is a data set and `codes=N`."""
    argument = parse_argument(arg, data="imagenet2012", codes=1024)
    config = tokenizer_config()
    config.data.name = argument.data
    config.model.quantizer.codebook_size = argument.codes
    if argument.codes == 16_384:  # the published model was trained with another discriminator
        config.discriminator.num_layers = 2
        config.discriminator.weight = 0.75
        config.discriminator.start = 0
    return config
