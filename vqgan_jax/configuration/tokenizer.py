"""The keys of a tokenizer's config, stage 1, with their defaults and their checks."""

from ml_collections import ConfigDict

from vqgan_jax.configuration.common import base_config, one_of, positive, require, validate_base


def tokenizer_config() -> ConfigDict:
    """The VQGAN f16 of "Taming Transformers" (Esser et al. 2021), without a data set's choices."""
    config = base_config("tokenizer")
    config.optimizer.discriminator_learning_rate = 0.0  # 0 = the generator's

    config.model = ConfigDict(
        dict(
            dtype="auto",  # of the computation: "float32", "bfloat16", "float64"; auto = by backend
            resolution=256,  # nominal; attention_resolutions refer to it, other sizes work too
            in_channels=3,
            out_channels=3,
            channels=128,
            channel_multipliers=(1, 1, 2, 2, 4),  # one level each; factor = 2^(levels - 1)
            num_res_blocks=2,  # a level of the encoder; the decoder has one more
            attention_resolutions=(16,),
            latent_channels=256,
            middle_attention=True,  # at the lowest resolution, of all positions to all
            norm="group",  # over the whole image, as in the paper; "layer" = at each position alone
            num_groups=32,  # of "group"; below 128 channels fewer keep colours better
            dropout=0.0,
            remat=False,  # recompute residual blocks in the backward pass: less memory, more time
        )
    )
    config.model.quantizer = ConfigDict(
        dict(
            kind="nearest",  # "nearest", "ema" or "gumbel"
            codebook_size=1024,
            code_dim=256,  # below latent_channels: low-dimensional projection by the 1x1 convs
            l2_normalize=False,  # cosine distance (ViT-VQGAN); for "nearest" and "ema"
            kmeans_init=False,  # start the codebook at the k-means centres of the first batch
            ema_decay=0.99,  # "ema" only
            restart_below=0.0,  # "ema" only: a code used less per batch (EMA) starts again; 0 = off
        )
    )

    config.loss = ConfigDict(
        dict(
            l1=1.0,
            l2=0.0,
            perceptual=1.0,
            binary_cross_entropy=0.0,  # for label maps; instead of all of the above
            codebook=1.0,  # weight of the whole quantisation loss
            commitment=0.25,  # beta, equation 4 of the paper
            legacy_codebook=True,  # the reference's form: beta on the codebook term instead
            kl=1e-8,  # "gumbel" only: weight of the divergence from uniform code use
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
            channels=64,
            num_layers=3,
            norm="batch",  # "batch", "act" or "group"
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
            refresh_reconstruction=False,  # the reference's order: one more forward pass
        )
    )

    return config.lock()


def downsampling_factor(model: ConfigDict) -> int:
    """Pixels a code in each direction: f in "f16"."""
    return 2 ** (len(model.channel_multipliers) - 1)


def validate_tokenizer(config: ConfigDict) -> None:
    """Raises `ConfigError` for values that cannot work, before anything compiles."""
    validate_base(config)
    one_of(config, "model.norm", "group", "layer")
    one_of(config, "model.quantizer.kind", "nearest", "ema", "gumbel")
    one_of(config, "discriminator.norm", "batch", "act", "group")
    one_of(config, "discriminator.loss", "hinge", "vanilla", "non_saturating")
    one_of(config, "loss.perceptual_network.backbone", "vgg16", "alexnet")
    names = ("resolution", "channels", "latent_channels", "num_groups")
    names += ("quantizer.codebook_size", "quantizer.code_dim")
    positive(config, *(f"model.{name}" for name in names))

    model = config.model
    factor = downsampling_factor(model)
    require(
        model.resolution % factor == 0,
        f"config.model.resolution is {model.resolution}, which the model's factor {factor} does "
        f"not divide; take {max(1, model.resolution // factor) * factor}.",
    )
    for multiplier in model.channel_multipliers:
        require(
            model.norm == "layer" or model.channels * multiplier % model.num_groups == 0,
            f"config.model.channels x channel_multipliers gives {model.channels * multiplier} "
            f"channels, which config.model.num_groups {model.num_groups} does not divide.",
        )
    require(
        config.loss.binary_cross_entropy == 0 or config.data.num_labels > 0,
        "config.loss.binary_cross_entropy needs a label map: set config.data.num_labels.",
    )
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
