"""The keys of a tokenizer's config, stage 1, with their defaults and their checks."""

from typing import Any

from ml_collections import ConfigDict

from vqgan_jax.configuration.common import (
    DTYPES,
    MOST_CHANNELS,
    MOST_PIXELS,
    MOST_STEPS,
    base_sections,
    check_paths,
    check_ranges,
    make_config,
    one_of,
    require,
    validate_base,
)
from vqgan_jax.configuration.quantizer import quantizer_section, validate_quantizer
from vqgan_jax.configuration.ranges import number, numbers, ranges, share

BEST_METRICS = (  # figures of an evaluation that are better when lower
    "lpips",
    "reconstruction_loss",
    "l1",
    "l2",
    "logit_laplace",
    "binary_cross_entropy",
)


def tokenizer_config() -> ConfigDict:
    """The VQGAN f16 of "Taming Transformers" (Esser et al. 2021), without a data set's choices."""
    return make_config(tokenizer_sections())


def tokenizer_sections() -> dict[str, Any]:
    """The same with the ranges of its numbers."""
    sections = base_sections("tokenizer")
    # 0 = the generator's
    sections["optimizer"]["discriminator_learning_rate"] = number(0.0, 0, 1e3)
    # Of "encoder" and "quantizer", those that stay as in `initialize_from`. With both, codes stay
    # as they are, and the decoder may have another size than there.
    sections["training"]["freeze"] = ()
    return sections | dict(
        model=dict(
            # Of the computation: "float32", "bfloat16", "float64"; auto = by backend
            dtype="auto",
            # "conv", or "vit": vision transformers, whose sizes are in `vit`
            architecture="conv",
            # Nominal: other sizes work too; "vit" learns its positions for it
            resolution=number(256, 1, MOST_PIXELS),
            in_channels=number(3, 1, 2**16),
            out_channels=number(3, 1, 2**16),
            # The decoder predicts a distribution, for the loss of that name
            logit_laplace=False,
            dropout=share(0.0, below=True),
            remat=False,  # recompute blocks in the backward pass: less memory, more time
            remat_keeps="nothing",  # or "products": what they give stays in memory
            # Of "conv" alone.
            channels=number(128, 1, MOST_CHANNELS),
            # One level each; factor = 2^(levels - 1)
            channel_multipliers=numbers((1, 1, 2, 2, 4), 1, 256, length=(1, 12)),
            num_res_blocks=number(2, 0, 64),  # a level of the encoder; the decoder has one more
            attention_resolutions=numbers((16,), 1, MOST_PIXELS, length=(0, 12)),
            latent_channels=number(256, 1, MOST_CHANNELS),
            middle_attention=True,  # at the lowest resolution, of all positions to all
            # Over the whole image, as in the paper; "layer" = at each position alone
            norm="group",
            # Of "group"; below 128 channels fewer keep colours better
            num_groups=number(32, 1, MOST_CHANNELS),
            vit=dict(  # of "vit" alone; as it stands, ViT-VQGAN Base
                patch=number(8, 1, 1024),  # pixels a side = factor
                # Blocks that are compiled one after the other; more compile longer
                unroll=number(1, 1, 1024),
                encoder=dict(
                    layers=number(12, 1, 1000),
                    heads=number(12, 1, 4096),
                    width=number(768, 1, MOST_CHANNELS),
                ),
                decoder=dict(
                    layers=number(12, 1, 1000),
                    heads=number(12, 1, 4096),
                    width=number(768, 1, MOST_CHANNELS),
                ),
            ),
            quantizer=quantizer_section(),
        ),
        loss=dict(
            l1=number(1.0, 0, 1e9),
            l2=number(0.0, 0, 1e9),
            # 0 = its network is never loaded: no supervised features in training
            perceptual=number(1.0, 0, 1e9),
            # ViT-VQGAN's likelihood; needs config.model.logit_laplace too
            logit_laplace=number(0.0, 0, 1e9),
            # For label maps; instead of all of the above
            binary_cross_entropy=number(0.0, 0, 1e9),
            codebook=number(1.0, 0, 1e9),  # weight of the whole quantisation loss
            commitment=number(0.25, 0, 1e9),  # beta, equation 4 of the paper; none for "fsq"
            legacy_codebook=True,  # the reference's form: beta on the codebook term instead
            # "gumbel" only: weight of the divergence from uniform code use
            kl=number(1e-8, 0, 1e9),
            # E[H(p(k|z))] - H(E[p]): all codes in use; "nearest", "simvq", "lfq"
            entropy=number(0.0, 0, 1e9),
            # T of p(k|z) = softmax(-distance^2 / T)
            entropy_temperature=number(0.01, 0, 1e9, above=True),
            # "lfq": bits taken together in H(E[p]); more go in groups of so many
            entropy_bits=number(18, 1, 24),
            perceptual_network=dict(
                backbone="vgg16",  # "vgg16" or "alexnet"
                path="",  # a weights file of your own; empty = the published LPIPS v0.1 weights
                sha256="",  # of the file at `path`; required with it
                dropout=False,  # the reference trains with the heads' dropout active, by accident
            ),
        ),
        temperature=dict(  # of the Gumbel-softmax; linear warm-up, then cosine
            warmup_steps=number(0, 0, MOST_STEPS),
            decay_steps=number(1_000_001, 1, MOST_STEPS),
            start=number(0.9, 0, 1e3, above=True),
            peak=number(0.9, 0, 1e3, above=True),
            end=number(1e-6, 0, 1e3, above=True),
        ),
        discriminator=dict(
            enabled=True,
            kind="patch",  # "patch", or "stylegan": that of StyleGAN2 and ViT-VQGAN
            channels=number(64, 1, MOST_CHANNELS),  # "patch" only, as the next two
            num_layers=number(3, 1, 16),
            norm="batch",  # "batch", "act" or "group"
            # "stylegan" only: a map of side s has min(base / s, max) of them
            base_channels=number(32_768, 1, 2**24),
            max_channels=number(512, 1, MOST_CHANNELS),
            # "stylegan" only: images whose deviation each sees; 1 = it sees none
            group_size=number(4, 1, 2**16),
            loss="hinge",  # "hinge", "vanilla" or "non_saturating"
            weight=number(0.8, 0, 1e9),  # of the generator's term, times the adaptive weight
            factor=number(1.0, 0, 1e9),  # of both players' terms
            # Generator steps before the adversarial game begins
            start=number(250_001, 0, MOST_STEPS),
            warmup_steps=number(0, 0, MOST_STEPS),  # linear ramp of the terms after `start`
            adaptive_weight=True,
            adaptive_delta=number(1e-4, 0, 1),  # the reference's; the paper writes 1e-6
            adaptive_max=number(1e4, 0, 1e12),
            lecam=number(0.0, 0, 1e9),  # weight of the LeCam regularisation
            lecam_decay=share(0.999, below=True),
            r1=number(0.0, 0, 1e9),  # gamma: gamma / 2 is the weight of the R1 regularisation
            # Every so manyth update has the R1 term, so many times as much
            r1_interval=number(16, 1, 10**6),
            refresh_reconstruction=False,  # the reference's order: one more forward pass
        ),
    )


RANGES = dict(ranges(tokenizer_sections()))


def downsampling_factor(model: ConfigDict) -> int:
    """Pixels a code in each direction: f in "f16"."""
    if model.architecture == "vit":
        return model.vit.patch
    return 2 ** (len(model.channel_multipliers) - 1)


def validate_tokenizer_model(config: ConfigDict) -> None:
    """Checks of the network and its images, as a tokenizer that was trained is read with."""
    of_model = ("model.", "data.")
    own = {path: known for path, known in RANGES.items() if path.startswith(of_model)}
    check_ranges(config, own)
    validate_quantizer(config)
    one_of(config, "model.dtype", *DTYPES)
    one_of(config, "model.norm", "group", "layer")
    one_of(config, "model.architecture", "conv", "vit")
    if config.model.architecture == "vit":
        _validate_vision_transformers(config)
    else:
        _validate_convolutional(config)
    require(
        config.data.num_labels in (0, config.model.in_channels),
        f"config.data.num_labels is {config.data.num_labels}, and config.model.in_channels "
        f"{config.model.in_channels}; label maps have a channel for each label.",
    )


def validate_tokenizer(config: ConfigDict) -> None:
    """Raises `ConfigError` for values that cannot work, before anything compiles."""
    check_ranges(config, RANGES)
    check_paths(config, "loss.perceptual_network.path")
    validate_base(config)
    validate_tokenizer_model(config)
    one_of(config, "discriminator.kind", "patch", "stylegan")
    one_of(config, "discriminator.norm", "batch", "act", "group")
    one_of(config, "discriminator.loss", "hinge", "vanilla", "non_saturating")
    one_of(config, "loss.perceptual_network.backbone", "vgg16", "alexnet")
    one_of(config, "training.best_metric", *BEST_METRICS)
    training = config.training
    for part in training.freeze:
        require(
            part in ("encoder", "quantizer"),
            f"config.training.freeze has {part!r}; it takes encoder and quantizer.",
        )
    require(
        not training.freeze or bool(training.initialize_from),
        "config.training.freeze keeps parts of another tokenizer: set "
        "config.training.initialize_from.",
    )

    model = config.model
    factor = downsampling_factor(model)
    require(
        config.mesh.spatial > 0 and model.resolution // factor % config.mesh.spatial == 0,
        f"config.mesh.spatial is {config.mesh.spatial}; take a number of devices that divides the "
        f"{model.resolution // factor} rows of codes of an image.",
    )
    require(
        model.resolution % factor == 0,
        f"config.model.resolution is {model.resolution}, which the model's factor {factor} does "
        f"not divide; take {max(1, model.resolution // factor) * factor}.",
    )
    require(
        config.loss.binary_cross_entropy == 0 or config.data.num_labels > 0,
        "config.loss.binary_cross_entropy needs a label map: set config.data.num_labels.",
    )
    require(
        config.loss.logit_laplace == 0 or model.logit_laplace,
        "config.loss.logit_laplace needs a decoder that predicts a distribution: set "
        "config.model.logit_laplace.",
    )
    require(
        config.loss.binary_cross_entropy == 0 or not model.logit_laplace,
        "config.model.logit_laplace is for images; config.loss.binary_cross_entropy is for label "
        "maps.",
    )
    require(
        config.discriminator.kind != "stylegan" or model.resolution >= 4,
        f"config.model.resolution is {model.resolution}; the stylegan discriminator needs at least "
        "4.",
    )
    if config.discriminator.enabled and config.discriminator.kind == "stylegan":
        _validate_halving(model.resolution)
    require(
        config.loss.binary_cross_entropy > 0 or config.data.num_labels == 0,
        "config.data.num_labels makes a label-map tokenizer, whose loss is "
        "config.loss.binary_cross_entropy: set it to 1.",
    )
    channels = config.data.num_labels or model.in_channels
    require(
        model.in_channels == channels == model.out_channels,
        f"config.model.in_channels and out_channels are {model.in_channels} and "
        f"{model.out_channels}, and the data has {channels} channels.",
    )
    if model.architecture == "conv":
        _validate_attention(model)


def _validate_halving(resolution: int) -> None:
    """StyleGAN2's discriminator halves an image while that is whole, and then has a dense layer."""
    side = resolution
    while side % 2 == 0 and side > 16:
        side //= 2
    require(
        side <= 16,
        f"config.model.resolution is {resolution}, of which the stylegan discriminator makes "
        f"{side} x {side} by halving, too many for its dense layer; take a multiple of a power of "
        "two, as 256.",
    )


def _validate_convolutional(config: ConfigDict) -> None:
    model = config.model
    for multiplier in model.channel_multipliers:
        require(
            model.norm == "layer" or model.channels * multiplier % model.num_groups == 0,
            f"config.model.channels x channel_multipliers gives {model.channels * multiplier} "
            f"channels, which config.model.num_groups {model.num_groups} does not divide.",
        )


def _validate_attention(model: ConfigDict) -> None:
    levels = [model.resolution >> level for level in range(len(model.channel_multipliers))]
    for resolution in model.attention_resolutions:
        require(
            resolution in levels,
            f"config.model.attention_resolutions has {resolution}; the levels of this model have "
            f"{', '.join(map(str, levels))}.",
        )


def _validate_vision_transformers(config: ConfigDict) -> None:
    require(
        config.model.norm == "group",
        "config.model.norm is for the convolutional architecture; vision transformers have layer "
        "norms.",
    )
    for name in ("encoder", "decoder"):
        network, path = config.model.vit[name], f"model.vit.{name}"
        require(
            network.width % network.heads == 0,
            f"config.{path}.width {network.width} is not divisible by config.{path}.heads "
            f"{network.heads}.",
        )
