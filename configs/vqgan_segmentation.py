"""The label-map tokenizer of "Taming Transformers" (Esser et al. 2021): condition codes at f16.

    python -m vqgan_jax.train --config=configs/vqgan_segmentation.py:earth
    python -m vqgan_jax.train --config=configs/vqgan_segmentation.py:folder=PATH,labels=183

Binary cross-entropy over one-hot maps and no discriminator. `earth` has the 17 classes of its land
cover. A folder holds PNG files whose pixels are class numbers; 183 labels are COCO-Stuff's (182 and
"unlabelled"), 182 those of the paper's landscapes. The paper trained at batch size 12. This project
has not trained the model to the end.
"""

from vqgan_jax.configuration import parse_argument, tokenizer_config

VARIANTS = ("", "earth", "folder=maps,labels=182")


def get_config(arg: str = ""):
    """The paper's COCO-Stuff model; `arg` is a data set and `labels=N`."""
    argument = parse_argument(arg, data="folder:data/coco_stuff_maps", labels=183)
    labels = 17 if argument.data.startswith("earth") else argument.labels
    config = tokenizer_config()
    config.data.name = argument.data
    config.data.image_key = "segmentation"
    config.data.num_labels = labels
    config.model.in_channels = config.model.out_channels = labels
    config.loss.l1 = config.loss.perceptual = 0.0
    config.loss.binary_cross_entropy = 1.0
    config.discriminator.enabled = False
    return config
