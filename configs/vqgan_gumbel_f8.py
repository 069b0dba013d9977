"""The VQGAN f8 with 8,192 Gumbel-softmax codes of "Taming Transformers" (Esser et al. 2021, v3).

    python -m vqgan_jax.train --config=configs/vqgan_gumbel_f8.py:folder=PATH

The published model was trained on Open Images (PATH: its images, in sub-folders `train` and
`validation`) and describes the network and the temperature; its description leaves out the loss,
so the image loss here is that of the f16 model. Its reconstruction FID on ImageNet is 1.49 (the
paper's table 5). This project has not trained the model to the end.
"""

from vqgan_jax.configuration import parse_argument, tokenizer_config

VARIANTS = ("", "imagenet2012", "folder=images")


def get_config(arg: str = ""):
    """The paper's Open Images model; `arg` is a data set."""
    argument = parse_argument(arg, data="folder:data/open_images")
    config = tokenizer_config()
    config.data.name = argument.data
    config.model.channel_multipliers = (1, 1, 2, 4)
    config.model.attention_resolutions = (32,)
    config.model.quantizer.kind = "gumbel"
    config.model.quantizer.codebook_size = 8192
    config.loss.kl = 1e-8
    return config
