"""Pictures of the Earth from maps of it, for two CPU cores: transformers with an image in front.

    python -m vqgan_jax.train --config=configs/earth_conditional.py:segmentation --workdir=runs/earth_from_segmentation
    python -m vqgan_jax.data.earth_maps --output=maps --west=2 --north=55 --height=256 --width=512
    python -m vqgan_jax.sample --checkpoint=runs/earth_from_segmentation --output=samples --num_samples=1 --height=256 --width=512 --condition=segmentation=maps/segmentation.png

Of land cover (`:segmentation`), of shaded relief (`:relief`) or of the picture itself at a quarter
of its size (`:super_resolution`). The tokenizers are those of `configs/earth_f8.py`, and images and
maps go through them as they are trained on, at crops of their own each time; `codes=PATH` takes what
`vqgan_jax.tokenize --resolution=128 --conditions=segmentation=runs/earth_f8_segmentation` stored
(with `relief=...`, with `low_resolution:4=runs/earth_f8`). A window of 16x16 codes is 128 pixels.

The first command took 36 minutes on two cores that had other work and ended with 6.46 bits a code on
unseen tiles; `:super_resolution` has 5.61 after half of its steps, `:relief` was not trained to its
end. docs/conditional.md has pictures.
"""  # noqa: E501

from vqgan_jax.configuration import (
    ConfigError,
    add_condition_image,
    parse_argument,
    transformer_config,
)

VARIANTS = ("segmentation", "relief", "super_resolution")
CONDITIONS = {
    "segmentation": ("segmentation", "runs/earth_f8_segmentation", {}),
    "relief": ("relief", "runs/earth_f8_relief", {}),
    "super_resolution": (
        "low_resolution",
        "runs/earth_f8",
        {"derive": "low_resolution", "scale": 4},
    ),
}


def get_config(arg: str = ""):
    """`arg` is one of `VARIANTS`, `codes=PATH`, and `condition=PATH`, which is its tokenizer."""
    argument = parse_argument(
        arg, data="segmentation", tokenizer="runs/earth_f8", codes="", condition=""
    )
    if argument.data not in CONDITIONS:
        raise ConfigError(f"{argument.data!r} must be one of {', '.join(CONDITIONS)}.")
    name, tokenizer, values = CONDITIONS[argument.data]
    config = transformer_config()

    model = config.model
    model.num_layers = 6
    model.num_heads = 4
    model.width = 256
    model.norm = "rms"
    model.feed_forward = "swiglu"
    model.positions = "rotary"
    model.qk_norm = True
    model.use_bias = False
    model.dropout = 0.1
    model.unroll = 6

    add_condition_image(config, name, argument.condition or tokenizer, **values)
    config.condition.dropout = 0.1
    config.tokenizer.path = argument.tokenizer
    config.tokenizer.resolution = 128
    config.data.name = "earth/128"
    config.data.codes = argument.codes

    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 50
    config.optimizer.end_factor = 0.05
    config.optimizer.clip_norm = 1.0
    config.optimizer.weight_decay = 0.05
    config.optimizer.ema_decay = 0.99

    config.training.batch_size = 8
    config.training.num_steps = 1000
    config.training.evaluate_every = 250
    config.training.checkpoint_every = 125
    config.training.log_every = 25
    config.training.grid_images = 8
    config.sampling.top_p = 0.95
    config.sampling.guidance_scale = 1.5
    return config
