"""The class-conditional transformer of "Taming Transformers" (Esser et al. 2021), 1,411 million.

    python -m vqgan_jax.tokenize --checkpoint=runs/vqgan_f16 --dataset=imagenet2012 --split=train,validation --output=codes/imagenet
    python -m vqgan_jax.train --config=configs/transformer_imagenet.py:codes/imagenet,tokenizer=runs/vqgan_f16

The tokenizer is `configs/vqgan_f16.py:imagenet2012,codes=16384`. The paper trained at batch size 16
with 8 micro-batches an update for 2.4 million steps, 45.8 days on one A100; its FID is 15.98 with
top-k 250 (table 4). Class k shares its row of the embedding table with code k, as there. This
project has not trained the model to the end.
"""  # noqa: E501

from vqgan_jax.configuration import parse_argument, transformer_config

VARIANTS = ("", "codes/imagenet,tokenizer=runs/mine")


def get_config(arg: str = ""):
    """The paper's model; `arg` is a directory of codes and `tokenizer=PATH`."""
    argument = parse_argument(arg, data="codes/imagenet", tokenizer="runs/vqgan_f16")
    config = transformer_config()
    config.data.codes = argument.data
    config.tokenizer.path = argument.tokenizer
    config.condition.kinds = ("class",)
    config.condition.own_table = False

    config.model.num_layers = 48
    config.model.num_heads = 24  # of the published file; the paper's table says 16
    config.model.width = 1536
    config.training.batch_size = 128
    config.optimizer.accumulate = 8
    config.training.num_steps = 300_000  # updates: 2.4 million batches of 16
    config.sampling.top_k = 250
    return config
