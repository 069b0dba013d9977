"""Class-conditional transformers of the form of LlamaGen (Sun et al. 2024, arXiv:2406.06525).

    python -m vqgan_jax.tokenize --checkpoint=runs/vqgan_f16 --dataset=imagenet2012 --split=train,validation --output=codes/imagenet --augment=flip,ten_crop
    python -m vqgan_jax.train --config=configs/transformer_modern.py:codes/imagenet,size=L

RMSNorm, SwiGLU, rotary positions in two dimensions, a class table with a token for no class, and
guidance. Sizes B, L, XL and XXL have 111, 343, 775 and 1,411 million parameters with 16,384 codes;
the paper trains them for 300 epochs at batch size 256 with a constant learning rate, where this has
warm-up and a cosine, and reports FIDs of 5.46, 3.80, 3.39 and 3.09
on ImageNet at 256 pixels, with its own tokenizer. This project has not trained them to the end.
"""  # noqa: E501

from vqgan_jax.configuration import ConfigError, parse_argument, transformer_config

VARIANTS = ("", "codes/imagenet,size=L", "codes/imagenet,size=XL", "codes/imagenet,size=XXL")
SIZES = {  # layers, heads, width, guidance scale
    "B": (12, 12, 768, 2.0),
    "L": (24, 16, 1024, 2.0),
    "XL": (36, 20, 1280, 1.75),
    "XXL": (48, 24, 1536, 1.75),
}


def get_config(arg: str = ""):
    """A model of one size; `arg` is a directory of codes, `tokenizer=PATH` and `size=B`."""
    argument = parse_argument(arg, data="codes/imagenet", tokenizer="runs/vqgan_f16", size="B")
    if argument.size not in SIZES:
        raise ConfigError(f"size is {argument.size!r}; it must be one of {', '.join(SIZES)}.")
    config = transformer_config()
    config.data.codes = argument.data
    config.tokenizer.path = argument.tokenizer
    config.condition.kinds = ("class",)
    config.condition.dropout = 0.1

    model = config.model
    layers, heads, width, scale = SIZES[argument.size]
    model.num_layers, model.num_heads, model.width = layers, heads, width
    model.norm = "rms"
    model.feed_forward = "swiglu"
    model.positions = "rotary"
    model.use_bias = False
    model.embedding_dropout = model.dropout = model.attention_dropout = 0.1

    config.optimizer.learning_rate = 1e-4
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip_norm = 1.0
    config.optimizer.warmup_steps = 5_000
    config.optimizer.schedule = "cosine"
    config.optimizer.end_factor = 0.1
    config.training.batch_size = 256
    config.training.num_steps = 1_500_000  # about 300 epochs
    config.sampling.guidance_scale = scale
    return config
