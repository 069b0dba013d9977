"""Stage 2 of "Vector-quantized Image Modeling with Improved VQGAN" (Yu et al. 2022): VIM.

    python -m vqgan_jax.train --config=configs/vim.py:base
    python -m vqgan_jax.train --config=configs/vim.py:large,classes=0
    python -m vqgan_jax.train --config=configs/vim.py:earth,codes=runs/vit_earth_codes --workdir=runs/vim_earth
    python -m vqgan_jax.probe --checkpoint=runs/vim --output=probe

Sizes `base` and `large` over 32x32 codes of 8,192: 679 and 1,812 million parameters in the matrices
of their blocks, by the paper's count of everything 650 and 1,697 million. Positions are learned for
rows and columns, the class stands in front (`classes=0`: a start token, as the paper's models for
recognition have it), and images are cropped and flipped before they are tokenised. Batches of
1,024, 450,000 steps, warm-up over 5,000 to 4.5e-4 and from step 80,000 on exponential decay to
1e-5; samples are drawn at temperature 1 from all codes. The paper keeps Adam's moments factored and
in few bits; here the first one is in bfloat16. The paper reports FIDs of 8.81 (base) and 4.17 (large,
3.04 with rejection at an acceptance of 0.5) on ImageNet at 256 pixels, and by a linear classifier
accuracies of 65.1 % behind block 10 of base and 73.2 % behind block 15 of large. This project has
not trained them.

`earth` is a small one for two CPU cores, over the codes of `configs/vit_earth.py`; the others' are
of `configs/vit_vqgan.py`. On an AMD EPYC server its 600 steps take 13 minutes and end at 5.70 bits a
code on unseen tiles, where the codes' own frequencies cost 8.61 and a model that sees the left
neighbour 6.38.
"""  # noqa: E501

from vqgan_jax.configuration import ConfigError, parse_argument, transformer_config

VARIANTS = ("", "large", "base,dataset=imagenet2012,classes=0", "earth")
SIZES = {"base": (24, 16, 1536), "large": (36, 32, 2048)}  # blocks, heads, width
PEAK, END = 4.5e-4, 1e-5


def get_config(arg: str = ""):
    """`arg` is a size, and `tokenizer=PATH`, `codes=PATH`, `dataset=NAME`, `classes=0`."""
    argument = parse_argument(arg, data="base", tokenizer="", codes="", dataset="", classes=1)
    if argument.data not in (*SIZES, "earth"):
        raise ConfigError(f"{argument.data!r} must be one of {', '.join(SIZES)}, earth.")
    config = transformer_config()
    config.data.codes = argument.codes
    config.condition.kinds = ("class",) if argument.classes else ()
    model = config.model
    model.positions = "learned_2d"
    model.embedding_dropout = model.dropout = model.attention_dropout = 0.1
    config.optimizer.schedule = "exponential"
    if argument.data == "earth":
        config.tokenizer.path = argument.tokenizer or "runs/vit_earth"
        config.data.name = argument.dataset or "earth"
        return earth(config)

    config.tokenizer.path = argument.tokenizer or "runs/vit_vqgan"
    config.data.name = argument.dataset or "imagenet2012"
    model.num_layers, model.num_heads, model.width = SIZES[argument.data]
    model.remat = True
    config.optimizer.learning_rate = PEAK
    config.optimizer.end_factor = END / PEAK
    config.optimizer.warmup_steps = 5_000
    config.optimizer.decay_start = 80_000
    config.optimizer.b1, config.optimizer.b2 = 0.9, 0.96
    config.optimizer.first_moment = "bfloat16"
    config.optimizer.weight_decay = 1e-4
    config.training.batch_size = 1024
    config.training.num_steps = 450_000
    return config


def earth(config):
    """A small one, with the same schedule in small."""
    config.condition.dropout = 0.1 if config.condition.kinds else 0.0  # the probe sees no class

    model = config.model
    model.num_layers = 6
    model.num_heads = 4
    model.width = 192
    model.unroll = 6
    config.optimizer.learning_rate = 1e-3
    config.optimizer.end_factor = END / PEAK
    config.optimizer.warmup_steps = 50
    config.optimizer.decay_start = 200
    config.optimizer.clip_norm = 1.0
    config.optimizer.weight_decay = 0.05
    config.optimizer.ema_decay = 0.99
    config.training.batch_size = 16
    config.training.num_steps = 600
    config.training.evaluate_every = 150
    config.training.checkpoint_every = 150
    config.training.log_every = 25
    config.training.grid_images = 16
    return config
