"""The keys of a tokenizer's config, stage 1, with their defaults and their checks."""

from ml_collections import ConfigDict

from vqgan_jax.configuration.common import base_config, one_of, positive, require, validate_base
from vqgan_jax.configuration.quantizer import quantizer_config, validate_quantizer


def tokenizer_config() -> ConfigDict:
    """The VQGAN f16 of "Taming Transformers" (Esser et al. 2021), without a data set's choices."""
    config = base_config("tokenizer")
    config.optimizer.discriminator_learning_rate = 0.0  # 0 = the generator's
    # Of "encoder" and "quantizer", those that stay as in `initialize_from`. With both, codes stay
    # as they are, and the decoder may have another size than there.
    config.training.freeze = ()

    config.model = ConfigDict(
        dict(
            dtype="auto",  # of the computation: "float32", "bfloat16", "float64"; auto = by backend
            architecture="conv",  # "conv", or "vit": vision transformers, whose sizes are in `vit`
            resolution=256,  # nominal: other sizes work too; "vit" learns its positions for it
            in_channels=3,
            out_channels=3,
            logit_laplace=False,  # the decoder predicts a distribution, for the loss of that name
            dropout=0.0,
            remat=False,  # recompute blocks in the backward pass: less memory, more time
            remat_keeps="nothing",  # or "products": what they give stays in memory
            # Of "conv" alone.
            channels=128,
            channel_multipliers=(1, 1, 2, 2, 4),  # one level each; factor = 2^(levels - 1)
            num_res_blocks=2,  # a level of the encoder; the decoder has one more
            attention_resolutions=(16,),
            latent_channels=256,
            middle_attention=True,  # at the lowest resolution, of all positions to all
            norm="group",  # over the whole image, as in the paper; "layer" = at each position alone
            num_groups=32,  # of "group"; below 128 channels fewer keep colours better
        )
    )
    config.model.vit = ConfigDict(  # of "vit" alone; as it stands, ViT-VQGAN Base
        dict(
            patch=8,  # pixels a side = factor
            unroll=1,  # blocks that are compiled one after the other; more compile longer
            encoder=dict(layers=12, heads=12, width=768),
            decoder=dict(layers=12, heads=12, width=768),
        )
    )
    config.model.quantizer = quantizer_config()

    config.loss = ConfigDict(
        dict(
            l1=1.0,
            l2=0.0,
            perceptual=1.0,  # 0 = its network is never loaded: no supervised features in training
            logit_laplace=0.0,  # ViT-VQGAN's likelihood; needs config.model.logit_laplace too
            binary_cross_entropy=0.0,  # for label maps; instead of all of the above
            codebook=1.0,  # weight of the whole quantisation loss
            commitment=0.25,  # beta, equation 4 of the paper; none for "fsq"
            legacy_codebook=True,  # the reference's form: beta on the codebook term instead
            kl=1e-8,  # "gumbel" only: weight of the divergence from uniform code use
            entropy=0.0,  # E[H(p(k|z))] - H(E[p]): all codes in use; "nearest", "simvq", "lfq"
            entropy_temperature=0.01,  # T of p(k|z) = softmax(-distance^2 / T)
            entropy_bits=18,  # "lfq": bits taken together in H(E[p]); more go in groups of so many
        )
    )
    config.loss.perceptual_network = ConfigDict(
        dict(
            backbone="vgg16",  # "vgg16" or "alexnet"
            path="",  # a weights file of your own; empty = the published LPIPS v0.1 weights
            sha256="",  # of the file at `path`; required with it
            dropout=False,  # the reference trains with the heads' dropout active, by accident
        )
    )
    config.temperature = ConfigDict(  # of the Gumbel-softmax; linear warm-up, then cosine
        dict(warmup_steps=0, decay_steps=1_000_001, start=0.9, peak=0.9, end=1e-6)
    )

    config.discriminator = ConfigDict(
        dict(
            enabled=True,
            kind="patch",  # "patch", or "stylegan": that of StyleGAN2 and ViT-VQGAN
            channels=64,  # "patch" only, as the next two
            num_layers=3,
            norm="batch",  # "batch", "act" or "group"
            base_channels=32_768,  # "stylegan" only: a map of side s has min(base / s, max) of them
            max_channels=512,
            group_size=4,  # "stylegan" only: images whose deviation each sees; 1 = it sees none
            loss="hinge",  # "hinge", "vanilla" or "non_saturating"
            weight=0.8,  # of the generator's term, times the adaptive weight
            factor=1.0,  # of both players' terms
            start=250_001,  # generator steps before the adversarial game begins
            warmup_steps=0,  # linear ramp of the terms after `start`
            adaptive_weight=True,
            adaptive_delta=1e-4,  # the reference's; the paper writes 1e-6
            adaptive_max=1e4,
            lecam=0.0,  # weight of the LeCam regularisation
            lecam_decay=0.999,
            r1=0.0,  # gamma: gamma / 2 is the weight of the R1 regularisation
            r1_interval=16,  # every so manyth update has the R1 term, so many times as much
            refresh_reconstruction=False,  # the reference's order: one more forward pass
        )
    )

    return config.lock()


def downsampling_factor(model: ConfigDict) -> int:
    """Pixels a code in each direction: f in "f16"."""
    if model.architecture == "vit":
        return model.vit.patch
    return 2 ** (len(model.channel_multipliers) - 1)


def validate_tokenizer(config: ConfigDict) -> None:
    """Raises `ConfigError` for values that cannot work, before anything compiles."""
    validate_base(config)
    validate_quantizer(config)
    one_of(config, "discriminator.kind", "patch", "stylegan")
    one_of(config, "model.norm", "group", "layer")
    one_of(config, "discriminator.norm", "batch", "act", "group")
    one_of(config, "discriminator.loss", "hinge", "vanilla", "non_saturating")
    one_of(config, "loss.perceptual_network.backbone", "vgg16", "alexnet")
    one_of(config, "model.architecture", "conv", "vit")
    sizes = ("channels", "base_channels", "max_channels", "group_size", "r1_interval")
    positive(config, *(f"discriminator.{name}" for name in sizes))
    positive(config, "model.resolution")
    require(
        config.discriminator.r1 >= 0,
        f"config.discriminator.r1 is {config.discriminator.r1}; it must not be negative.",
    )
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
    if model.architecture == "vit":
        _validate_vision_transformers(config)
    else:
        _validate_convolutional(config)
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
    positive(config, *(f"model.{name}" for name in ("channels", "latent_channels", "num_groups")))
    model = config.model
    for multiplier in model.channel_multipliers:
        require(
            model.norm == "layer" or model.channels * multiplier % model.num_groups == 0,
            f"config.model.channels x channel_multipliers gives {model.channels * multiplier} "
            f"channels, which config.model.num_groups {model.num_groups} does not divide.",
        )


def _validate_vision_transformers(config: ConfigDict) -> None:
    require(
        config.model.norm == "group",
        "config.model.norm is for the convolutional architecture; vision transformers have layer "
        "norms.",
    )
    positive(config, "model.vit.patch", "model.vit.unroll")
    for name in ("encoder", "decoder"):
        network, path = config.model.vit[name], f"model.vit.{name}"
        positive(config, *(f"{path}.{key}" for key in network))
        require(
            network.width % network.heads == 0,
            f"config.{path}.width {network.width} is not divisible by config.{path}.heads "
            f"{network.heads}.",
        )
