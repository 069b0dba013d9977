"""Transformers with an image or a layout in front ("Taming Transformers", Esser et al. 2021).

    python -m vqgan_jax.train --config=configs/transformer_conditional.py:sflckr,images=folder:PATH,tokenizer=runs/vqgan,condition=runs/labels

| variant | what stands in front | shape |
|---|---|---|
| `sflckr` | label maps of 182 classes | 24 layers of 1,024 |
| `ade20k` | label maps of 151 classes | 28 layers of 1,024, dropout 0.1 |
| `coco_stuff` | label maps of 183 classes | 32 layers of 1,280 |
| `drin` | depth, of the animals of ImageNet | 24 layers of 1,024 |
| `deepfashion` | skeletons of people | 18 layers of 768 |
| `edges` | Canny edges of the image | 24 layers of 1,024 |
| `drawings` | line drawings | 24 layers of 1,024 |
| `super_resolution` | the image at a quarter of its size | 12 layers of 1,024 |
| `faceshq` | the coordinates of the crop | 24 layers of 1,024 |
| `coco_scenes` | boxes of up to 30 objects, 92 tokens | 40 layers of 1,408, dropout 0.1 |
| `open_images_scenes` | the same | 36 layers of 1,536, dropout 0.1 |

Sizes are those of the paper's table 8 and of the reference's configs; for ADE20K the table lists
405 million parameters, where this shape has fewer, and drawings are not in it. `images` holds PNG
or JPEG files in `PATH/train` and `PATH/validation`, and what the condition is made of under the
same names in `PATH/segmentation/train` and so on: label maps as grey PNG whose values are the
classes, depth as grey PNG or TIFF, of 16 or 32 bits in any unit (each picture is scaled by itself,
its smallest value to -1 and its largest to 1, in 256 levels), drawings in `PATH/drawing/train`, and
in `PATH/skeleton/train` keypoints as JSON files of COCO's 17 or OpenPose's 18 points
(`conditions.keypoint_files`). Edges and low resolution are made from the images. A tokenizer of one
channel reads every picture as grey. With `places=centers` a scene has the centres of its objects
instead of their boxes.

Scenes are read from tensorflow-datasets, `coco/2017` (80 classes of objects) and `open_images_v4`
(601), or from folders, `images=folder:PATH` with JSON files in `PATH/layout/train` and the names of
the classes in `PATH/layout/classes.txt` (`conditions.layout_files`, `data.folders`). The reference
has 171 classes of COCO, with kinds of "stuff" that only a folder can have here, and a selection of
those of Open Images. It crops the latter at random sizes; here all crops are as large as the
shorter side. Conditions and codes share one table, which needs a tokenizer of 8,192 codes.

With `codes=PATH`, written by `vqgan_jax.tokenize --conditions=...`, images are not needed; of
scenes that is `--conditions=layout=configs/transformer_conditional.py:coco_scenes`. This project
has not trained the models to the end.
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
    "deepfashion": (18, 768, {"name": "skeleton", "derive": "skeleton"}),
    "edges": (24, 1024, {"name": "edges", "derive": "edges"}),
    "drawings": (24, 1024, {"name": "drawing"}),
    "super_resolution": (12, 1024, {"name": "low_resolution", "derive": "low_resolution"}),
    "faceshq": (24, 1024, None),
}
# Layers, width, data, and the smallest object as a share of its image.
SCENES = {
    "coco_scenes": (40, 1408, "coco/2017", 1e-5),
    "open_images_scenes": (36, 1536, "open_images_v4", 1e-4),
}
VARIANTS = (*MODELS, *SCENES)


def get_config(arg: str = ""):
    """`arg` is a model, then keys.

    `images=`, `tokenizer=`, `condition=` (its tokenizer), `codes=`; of scenes `places=`.
    """
    argument = parse_argument(
        arg,
        data="sflckr",
        images="",
        tokenizer="runs/vqgan",
        condition="runs/condition_vqgan",
        codes="",
        places="boxes",
    )
    if argument.data not in VARIANTS:
        raise ConfigError(f"{argument.data!r} must be one of {', '.join(VARIANTS)}.")
    config = transformer_config()
    config.tokenizer.path = argument.tokenizer
    config.data.name = argument.images or "folder:data/images"
    config.data.codes = argument.codes
    config.condition.own_table = False
    if argument.data in SCENES:
        layers, width, images, min_area = SCENES[argument.data]
        config.data.name = argument.images or images
        config.condition.kinds = ("layout",)
        config.condition.layout.attributes = ("group",)
        config.condition.layout.min_area = min_area
        config.condition.layout.places = argument.places
    else:
        layers, width, image = MODELS[argument.data]
        if image is None:
            config.condition.kinds = ("coordinates",)
            config.condition.own_table = True  # one token more than there are codes
            config.data.random_flip = False  # coordinates would be mirrored too
        else:
            add_condition_image(config, tokenizer=argument.condition, **image)
    config.model.num_layers, config.model.num_heads, config.model.width = layers, 16, width
    if argument.data == "ade20k" or argument.data in SCENES:
        for part in ("embedding_dropout", "dropout", "attention_dropout"):
            config.model[part] = 0.1
    config.training.batch_size = 16
    config.sampling.top_k = 100
    return config
