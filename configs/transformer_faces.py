"""The unconditional transformers of faces of "Taming Transformers" (Esser et al. 2021), 802 million.

    python -m vqgan_jax.tokenize --checkpoint=runs/vqgan_faceshq --dataset=folder:PATH --split=train,validation --output=codes/faces
    python -m vqgan_jax.train --config=configs/transformer_faces.py:codes/faces,tokenizer=runs/vqgan_faceshq

The paper has two models of this shape, of CelebA-HQ (FID 10.2 with top-k 400) and of FFHQ (9.6 with
top-k 300; table 3): the second is the variant `images=ffhq`. The tokenizer is
`configs/vqgan_faceshq.py`. This project has not trained the models to the end.
"""  # noqa: E501

from vqgan_jax.configuration import ConfigError, parse_argument, transformer_config

VARIANTS = ("", "codes/faces,images=ffhq")
TOP_K = {"celebahq": 400, "ffhq": 300}


def get_config(arg: str = ""):
    """The paper's model; `arg` is a directory of codes, `tokenizer=PATH` and `images=ffhq`."""
    argument = parse_argument(
        arg, data="codes/faces", tokenizer="runs/vqgan_faceshq", images="celebahq"
    )
    if argument.images not in TOP_K:
        raise ConfigError(f"images is {argument.images!r}; it must be one of {', '.join(TOP_K)}.")
    config = transformer_config()
    config.data.codes = argument.data
    config.tokenizer.path = argument.tokenizer
    config.condition.own_table = False

    config.model.num_layers = 24
    config.model.num_heads = 16
    config.model.width = 1664
    config.training.batch_size = 16
    config.sampling.top_k = TOP_K[argument.images]
    return config
