"""The paper's transformers with an image in front ("Taming Transformers", Esser et al. 2021).

    python -m vqgan_jax.train --config=configs/transformer_conditional.py:sflckr,images=folder:PATH,tokenizer=runs/vqgan,condition=runs/labels

| variant | what stands in front | shape |
|---|---|---|
| `sflckr` | label maps of 182 classes | 24 layers of 1,024 |
| `ade20k` | label maps of 151 classes | 28 layers of 1,024, dropout 0.1 |
| `coco_stuff` | label maps of 183 classes | 32 layers of 1,280 |
| `drin` | depth, of the animals of ImageNet | 24 layers of 1,024 |
| `deepfashion` | skeletons of people | 18 layers of 768 |
| `edges` | Canny edges of the image | 24 layers of 1,024 |
| `super_resolution` | the image at a quarter of its size | 12 layers of 1,024 |
| `faceshq` | the coordinates of the crop | 24 layers of 1,024 |

Sizes are those of the paper's table 8 and of the reference's configs; for ADE20K the table lists 405
million parameters, where this shape has fewer. `images` holds PNG or JPEG files in
`PATH/train` and `PATH/validation`, and pictures of the condition under the same names in
`PATH/segmentation/train` and so on: label maps as grey PNG whose values are the classes, depth and
skeletons as pictures (`vqgan_jax.conditions.derived.depth_picture`, `skeletons.draw_skeleton`).
Edges and low resolution are made from the images. With `codes=PATH`, written by
`vqgan_jax.tokenize --conditions=...`, images are not needed. This project has not trained the
models to the end.
"""  # noqa: E501

from vqgan_jax.configuration import (
    ConfigError,
    add_condition_image,
    parse_argument,
    transformer_config,
)

# Layers, width, and the condition: the feature that holds it, or how it is made.
MODELS = {
    "sflckr": (24, 1024, {"name": "segmentation"}),
    "ade20k": (28, 1024, {"name": "segmentation"}),
    "coco_stuff": (32, 1280, {"name": "segmentation"}),
    "drin": (24, 1024, {"name": "depth"}),
    "deepfashion": (18, 768, {"name": "skeleton"}),
    "edges": (24, 1024, {"name": "edges", "derive": "edges"}),
    "super_resolution": (12, 1024, {"name": "low_resolution", "derive": "low_resolution"}),
    "faceshq": (24, 1024, None),
}
VARIANTS = tuple(MODELS)


def get_config(arg: str = ""):
    """`arg` is a model, then `images=`, `tokenizer=`, `condition=` (its tokenizer), `codes=`."""
    argument = parse_argument(
        arg,
        data="sflckr",
        images="folder:data/images",
        tokenizer="runs/vqgan",
        condition="runs/condition_vqgan",
        codes="",
    )
    if argument.data not in MODELS:
        raise ConfigError(f"{argument.data!r} must be one of {', '.join(MODELS)}.")
    layers, width, image = MODELS[argument.data]
    config = transformer_config()
    config.model.num_layers, config.model.num_heads, config.model.width = layers, 16, width
    config.tokenizer.path = argument.tokenizer
    config.data.name = argument.images
    config.data.codes = argument.codes
    config.condition.own_table = False
    if image is None:
        config.condition.kinds = ("coordinates",)
        config.condition.own_table = True  # one token more than there are codes
        config.data.random_flip = False  # coordinates would be mirrored too
    else:
        add_condition_image(config, tokenizer=argument.condition, **image)
    if argument.data == "ade20k":
        for part in ("embedding_dropout", "dropout", "attention_dropout"):
            config.model[part] = 0.1
    config.training.batch_size = 16
    config.sampling.top_k = 100
    return config
