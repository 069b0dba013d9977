"""The keys of a transformer's config, stage 2, with their defaults and their checks."""

from ml_collections import ConfigDict

from vqgan_jax.conditions.derived import DERIVED
from vqgan_jax.configuration.common import base_config, one_of, positive, require, validate_base
from vqgan_jax.models.orders import ORDERS, ROW_MAJOR


def transformer_config() -> ConfigDict:
    """The reference's GPT of 305 million parameters over 16x16 codes of a VQGAN f16."""
    config = base_config("transformer")
    config.optimizer.b1, config.optimizer.b2 = 0.9, 0.95
    config.optimizer.weight_decay = 0.01  # of matrices, the head's too; not of embeddings
    config.training.best_metric = "bits_per_code"

    config.model = ConfigDict(
        dict(
            dtype="auto",  # of the computation: "float32", "bfloat16", "float64"; auto = by backend
            codebook_size=0,  # 0 = the tokenizer's
            grid=(),  # rows and columns of codes; empty = the data's
            # In which they are predicted: "row_major", or "alternate", "subsample", "z_curve",
            # "spiral_out", "spiral_in", "random"; images larger than the grid need "row_major".
            order=ROW_MAJOR,
            num_layers=24,
            num_heads=16,
            num_kv_heads=0,  # of keys and values; 0 = num_heads, fewer make decoding faster
            width=1024,
            hidden=0,  # of the feed-forward; 0 = 4 x width, or 8/3 x width to 256 for "swiglu"
            max_length=0,  # of learned positions; 0 = what the sequence needs
            norm="layer",  # "layer" or "rms"
            feed_forward="gelu",  # "gelu" or "swiglu"
            # "learned" in the sequence; "learned_2d", of rows and columns; "rotary", of both.
            positions="learned",
            qk_norm=False,
            use_bias=True,
            num_unmasked=0,  # so many first tokens see each other in both directions
            embedding_dropout=0.0,
            dropout=0.0,
            attention_dropout=0.0,
            unroll=1,  # layers compiled one after the other; more: faster steps, longer compilation
            remat=False,  # recompute blocks in the backward pass: less memory, more time
            remat_keeps="nothing",  # or "products": what they give stays in memory
        )
    )
    config.condition = ConfigDict(
        dict(
            # In the order of their tokens: of "class", "coordinates", "layout" and the names of
            # `images`; empty = a start token.
            kinds=(),
            own_table=True,  # False: tokens of the codes' table, as in the reference
            start_token=0,  # without kinds and without an own table
            dropout=0.0,  # how often conditions are left out in training, for guidance
            num_classes=0,  # of "class"; 0 = the data's
            class_names=(),  # of "class"; empty = the data's
            images={},  # images of another kind, by `add_condition_image`
            coordinates=dict(intervals=1024),  # of [0, 1], which the image's pixels run through
            layout=dict(
                num_classes=0,  # of objects; 0 = the data's
                class_names=(),  # of objects; empty = the data's
                min_area=0.0,  # of an object, as a share of its image: smaller ones are left out
                places="boxes",  # "boxes": two corners an object; "centers": one point
                num_tokens=8192,  # classes, places on a grid of as many points, and padding
                max_objects=30,
                attributes=(),  # of objects: "group", "occluded", "depiction", "inside"
                with_crop=True,  # two tokens say which part of the scene the image is
            ),
        )
    )
    config.tokenizer = ConfigDict(
        dict(
            path="",  # the tokenizer's run, checkpoint or export
            resolution=0,  # of images; 0 = what the tokenizer was trained at
        )
    )
    config.data.codes = ""  # what `tokenize` wrote; empty = images go through the tokenizer
    config.training.pkeep = 1.0  # the share of input codes that stay; others become random ones
    config.sampling = ConfigDict(  # of the samples at evaluations, and the defaults of `sample`
        dict(
            temperature=1.0,
            top_k=0,  # 0 = all
            top_p=1.0,
            guidance_scale=1.0,  # 1 = none
            guidance_schedule="constant",  # "constant", "linear" or "cosine"
        )
    )
    return config.lock()


def add_condition_image(config: ConfigDict, name: str, tokenizer: str, **values) -> None:
    """Adds an image of another kind, whose codes stand in front, as the last kind so far.

    Args:
        config: of `transformer_config`.
        name: of the kind; files and flags have it too.
        tokenizer: its run, checkpoint or export.
        **values: `image_key`, the feature of the data set that holds it, by default `name`; or
            `derive`: "edges" or "low_resolution" of the image itself, the latter `scale` times
            smaller; or "skeleton", drawn of the keypoints that the feature `image_key` has.
    """
    image = dict(
        tokenizer=tokenizer,
        image_key=name,
        derive="",
        scale=4,
        codebook_size=0,  # what follows is the tokenizer's, found when a run begins
        grid=(),
        num_labels=0,
    )
    unknown = sorted(values.keys() - image.keys())
    require(not unknown, f"A condition image has no {', '.join(unknown)}.")
    with config.unlocked():
        config.condition.images[name] = ConfigDict(image | values)
    config.condition.kinds = (*config.condition.kinds, name)


def validate_transformer(config: ConfigDict) -> None:
    """Raises `ConfigError` for values that cannot work, before anything compiles."""
    validate_base(config)
    require(
        config.mesh.spatial == 1,
        f"config.mesh.spatial is {config.mesh.spatial}; only tokenizers have rows of pixels.",
    )
    one_of(config, "model.norm", "layer", "rms")
    one_of(config, "model.feed_forward", "gelu", "swiglu")
    one_of(config, "model.positions", "learned", "learned_2d", "rotary")
    one_of(config, "model.order", *ORDERS)
    one_of(config, "sampling.guidance_schedule", "constant", "linear", "cosine")
    positive(config, "model.num_layers", "model.num_heads", "model.width")

    model, condition = config.model, config.condition
    require(
        model.width % model.num_heads == 0,
        f"config.model.width {model.width} is not divisible by config.model.num_heads "
        f"{model.num_heads}.",
    )
    require(
        model.num_kv_heads == 0 or model.num_heads % model.num_kv_heads == 0,
        f"config.model.num_heads {model.num_heads} is not divisible by config.model.num_kv_heads "
        f"{model.num_kv_heads}.",
    )
    require(
        model.positions != "rotary" or model.width // model.num_heads % 4 == 0,
        "config.model.positions is rotary, which needs heads of a multiple of 4 channels; "
        f"width / num_heads is {model.width // model.num_heads}.",
    )
    known = ("class", "coordinates", "layout", *condition.images)
    for kind in condition.kinds:
        require(
            kind in known,
            f"config.condition.kinds has {kind!r}; there are {', '.join(known)}.",
        )
    require(
        len(set(condition.kinds)) == len(condition.kinds),
        f"config.condition.kinds has a kind twice: {', '.join(condition.kinds)}.",
    )
    for name, image in condition.images.items():
        require(
            image.derive in ("", *DERIVED),
            f"config.condition.images.{name}.derive is {image.derive!r}; it must be empty or one "
            f"of {', '.join(DERIVED)}.",
        )
        require(
            bool(image.tokenizer) and image.scale >= 1,
            f"config.condition.images.{name} needs the path of its tokenizer, and a scale of at "
            "least 1.",
        )
    require(
        condition.dropout == 0 or bool(condition.kinds),
        "config.condition.dropout leaves out conditions: set config.condition.kinds=class, or "
        "other kinds.",
    )
    require(
        0.0 <= condition.dropout < 1.0 and 0.0 <= config.training.pkeep <= 1.0,
        "config.condition.dropout must be in [0, 1) and config.training.pkeep in [0, 1].",
    )
    require(
        config.sampling.guidance_scale == 1.0 or condition.dropout > 0.0,
        "config.sampling.guidance_scale needs a model that was trained without conditions too: set "
        "config.condition.dropout=0.1.",
    )
    sampling = config.sampling
    require(
        sampling.temperature >= 0.0 and sampling.top_k >= 0 and 0.0 < sampling.top_p <= 1.0,
        "config.sampling: temperature and top_k must not be negative, top_p must be in (0, 1].",
    )
    require(
        bool(config.tokenizer.path),
        "config.tokenizer.path is empty; it must name the run or export of a tokenizer.",
    )
