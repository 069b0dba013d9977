"""The keys of a transformer's config, stage 2, with their defaults and their checks."""

import math
from typing import Any

from ml_collections import ConfigDict

from vqgan_jax.conditions.derived import DERIVED
from vqgan_jax.configuration.common import (
    DTYPES,
    MOST_CHANNELS,
    MOST_PIXELS,
    base_sections,
    check_paths,
    check_ranges,
    make_config,
    one_of,
    require,
    shortened,
    validate_base,
    value_at,
)
from vqgan_jax.configuration.quantizer import MOST_CODES
from vqgan_jax.configuration.ranges import defaults, number, numbers, ranges, share
from vqgan_jax.models.orders import ORDERS, ROW_MAJOR


def transformer_config() -> ConfigDict:
    """The reference's GPT of 305 million parameters over 16x16 codes of a VQGAN f16."""
    return make_config(transformer_sections())


def transformer_sections() -> dict[str, Any]:
    """The same with the ranges of its numbers."""
    sections = base_sections("transformer")
    optimizer, training = sections["optimizer"], sections["training"]
    optimizer |= dict(b1=share(0.9, below=True), b2=share(0.95, below=True))
    # Of matrices, the head's too; not of embeddings.
    optimizer["weight_decay"] = number(0.01, 0, 1e3)
    training["best_metric"] = "bits_per_code"
    training["pkeep"] = share(1.0)  # of input codes that stay; others become random ones
    # What `tokenize` wrote; empty = images go through the tokenizer.
    sections["data"]["codes"] = ""
    return sections | dict(
        model=dict(
            # Of the computation: "float32", "bfloat16", "float64"; auto = by backend
            dtype="auto",
            codebook_size=number(0, 0, MOST_CODES),  # 0 = the tokenizer's
            # Rows and columns of codes; empty = the data's
            grid=numbers((), 1, 2**16, length=(0, 2)),
            # In which they are predicted: "row_major", or "alternate", "subsample", "z_curve",
            # "spiral_out", "spiral_in", "random"; images larger than the grid need "row_major".
            order=ROW_MAJOR,
            num_layers=number(24, 1, 1000),
            num_heads=number(16, 1, 4096),
            # Of keys and values; 0 = num_heads, fewer make decoding faster
            num_kv_heads=number(0, 0, 4096),
            width=number(1024, 1, MOST_CHANNELS),
            # Of the feed-forward; 0 = 4 x width, or 8/3 x width to 256 for "swiglu"
            hidden=number(0, 0, 2**20),
            max_length=number(0, 0, 2**24),  # of learned positions; 0 = what the sequence needs
            norm="layer",  # "layer" or "rms"
            feed_forward="gelu",  # "gelu" or "swiglu"
            # "learned" in the sequence; "learned_2d", of rows and columns; "rotary", of both.
            positions="learned",
            qk_norm=False,
            use_bias=True,
            # So many first tokens see each other in both directions
            num_unmasked=number(0, 0, 2**24),
            embedding_dropout=share(0.0, below=True),
            dropout=share(0.0, below=True),
            attention_dropout=share(0.0, below=True),
            # Layers compiled one after the other; more: faster steps, longer compilation
            unroll=number(1, 1, 1024),
            remat=False,  # recompute blocks in the backward pass: less memory, more time
            remat_keeps="nothing",  # or "products": what they give stays in memory
        ),
        condition=dict(
            # In the order of their tokens: of "class", "coordinates", "layout" and the names of
            # `images`; empty = a start token.
            kinds=(),
            own_table=True,  # False: tokens of the codes' table, as in the reference
            start_token=number(0, 0, MOST_CODES),  # without kinds and without an own table
            # How often conditions are left out in training, for guidance
            dropout=share(0.0, below=True),
            num_classes=number(0, 0, 2**24),  # of "class"; 0 = the data's
            class_names=(),  # of "class"; empty = the data's
            images={},  # images of another kind, by `add_condition_image`
            # Of [0, 1], which the image's pixels run through
            coordinates=dict(intervals=number(1024, 1, 2**24)),
            layout=dict(
                num_classes=number(0, 0, 2**24),  # of objects; 0 = the data's
                class_names=(),  # of objects; empty = the data's
                # Of an object, as a share of its image: smaller ones are left out
                min_area=share(0.0),
                places="boxes",  # "boxes": two corners an object; "centers": one point
                # Classes, places on a grid of as many points, and padding
                num_tokens=number(8192, 1, 2**24),
                max_objects=number(30, 1, 2**16),
                attributes=(),  # of objects: "group", "occluded", "depiction", "inside"
                with_crop=True,  # two tokens say which part of the scene the image is
            ),
        ),
        tokenizer=dict(
            path="",  # the tokenizer's run, checkpoint or export
            # Of images; 0 = what the tokenizer was trained at
            resolution=number(0, 0, MOST_PIXELS),
        ),
        sampling=dict(  # of the samples at evaluations, and the defaults of `sample`
            temperature=number(1.0, 0, 1e6),
            top_k=number(0, 0, 2**31 - 1),  # 0 = all
            top_p=number(1.0, 0, 1, above=True),
            guidance_scale=number(1.0, 0, 1e6),  # 1 = none
            guidance_schedule="constant",  # "constant", "linear" or "cosine"
        ),
    )


def condition_image_section() -> dict[str, Any]:
    """A value of `config.condition.images`; see `add_condition_image`."""
    return dict(
        tokenizer="",
        image_key="",
        derive="",
        scale=number(4, 1, 1024),
        # What follows is the tokenizer's, found at a start
        codebook_size=number(0, 0, MOST_CODES),
        grid=numbers((), 1, 2**16, length=(0, 2)),
        num_labels=number(0, 0, 2**16),
    )


RANGES = dict(ranges(transformer_sections()))
IMAGE_RANGES = dict(ranges(condition_image_section()))


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
    image = defaults(condition_image_section()) | dict(tokenizer=tokenizer, image_key=name)
    unknown = sorted(values.keys() - image.keys())
    require(not unknown, f"A condition image has no {', '.join(unknown)}.")
    with config.unlocked():
        config.condition.images[name] = ConfigDict(image | values)
    config.condition.kinds = (*config.condition.kinds, name)


def validate_transformer_model(config: ConfigDict) -> None:
    """Checks of the network and its conditions, as a transformer that was trained is read with."""
    of_model = ("model.", "condition.", "data.", "sampling.")
    own = {path: known for path, known in RANGES.items() if path.startswith(of_model)}
    check_ranges(config, own)
    for name in config.condition.images:
        own = {f"condition.images.{name}.{key}": known for key, known in IMAGE_RANGES.items()}
        check_ranges(config, own)
    one_of(config, "model.dtype", *DTYPES)
    one_of(config, "model.norm", "layer", "rms")
    one_of(config, "model.feed_forward", "gelu", "swiglu")
    one_of(config, "model.positions", "learned", "learned_2d", "rotary")
    one_of(config, "model.order", *ORDERS)
    one_of(config, "sampling.guidance_schedule", "constant", "linear", "cosine")

    model = config.model
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
    require(
        math.prod(model.grid) <= MOST_CODES,
        f"config.model.grid is {model.grid}; at most {MOST_CODES} codes are one image.",
    )
    known = ("class", "coordinates", "layout", *config.condition.images)
    for kind in config.condition.kinds:
        require(
            kind in known,
            f"config.condition.kinds has {shortened(kind)}; there are {', '.join(known)}.",
        )
    kinds = config.condition.kinds
    require(
        len(set(kinds)) == len(kinds),
        f"config.condition.kinds has a kind twice: {', '.join(kinds)}.",
    )
    for path in ("condition.class_names", "condition.layout.class_names"):
        require(
            all(isinstance(name, str) for name in value_at(config, path)),
            f"config.{path} has {shortened(value_at(config, path))}; names are texts.",
        )
    for section in (config.condition, config.condition.layout):
        require(
            not section.class_names or section.num_classes in (0, len(section.class_names)),
            f"There are {len(section.class_names)} names of {section.num_classes} classes in "
            "config.condition.",
        )


def validate_transformer(config: ConfigDict) -> None:
    """Raises `ConfigError` for values that cannot work, before anything compiles."""
    check_ranges(config, RANGES)
    validate_transformer_model(config)
    for name in config.condition.images:
        check_paths(config, f"condition.images.{name}.tokenizer")
    check_paths(config, "tokenizer.path", "data.codes")
    validate_base(config)
    require(
        config.mesh.spatial == 1,
        f"config.mesh.spatial is {config.mesh.spatial}; only tokenizers have rows of pixels.",
    )
    one_of(config, "training.best_metric", "bits_per_code", "cross_entropy", "perplexity")
    condition = config.condition
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
        config.sampling.guidance_scale == 1.0 or condition.dropout > 0.0,
        "config.sampling.guidance_scale needs a model that was trained without conditions too: set "
        "config.condition.dropout=0.1.",
    )
    require(
        bool(config.tokenizer.path or config.data.codes),
        "config.tokenizer.path is empty; it must name the run or export of a tokenizer.",
    )
