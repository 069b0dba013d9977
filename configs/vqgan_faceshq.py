"""The VQGAN f16 on faces, CelebA-HQ and FFHQ, of "Taming Transformers" (Esser et al. 2021).

    python -m vqgan_jax.train --config=configs/vqgan_faceshq.py:folder=PATH

PATH holds the images of both data sets, with the sub-folders `train/celebahq`, `train/ffhq`,
`validation/celebahq` and `validation/ffhq`. The paper trained at batch size 3 on one GPU. This
project has not trained the model to the end.
"""

from vqgan_jax.configuration import parse_argument, tokenizer_config

VARIANTS = ("", "folder=images")


def get_config(arg: str = ""):
    """The paper's FacesHQ model; `arg` is a data set."""
    argument = parse_argument(arg, data="folder:data/faceshq")
    config = tokenizer_config()
    config.data.name = argument.data
    config.discriminator.start = 30_001
    config.training.batch_size = 3
    return config
