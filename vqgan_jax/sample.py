"""Samples images from a transformer.

    python -m vqgan_jax.sample --checkpoint=runs/quickstart_transformer --output=samples
    python -m vqgan_jax.sample --checkpoint=runs/imagenet --class=goldfish,tench --output=samples

The output holds PNGs, the overview `grid.png`, an archive `samples.npz` where it is asked for, and
`settings.json`. The same command continues where it was stopped; it makes the same images on any
number of devices and processes.
"""

from collections.abc import Sequence

from absl import flags

from vqgan_jax import command_line, distributed
from vqgan_jax.command_line.help import SEVERAL_PROCESSES, group, require
from vqgan_jax.errors import DataError

_DISTRIBUTION = ("temperature", "top_k", "top_p", "guidance_scale", "guidance_schedule")


def define_flags() -> None:
    """The flags of this command."""
    with group("Input and output"):
        flags.DEFINE_string("checkpoint", None, "A transformer: a run, a checkpoint or an export.")
        flags.DEFINE_string("output", None, "A new directory, or one of the same samples.")
        flags.DEFINE_string(
            "tokenizer", "", "Another tokenizer of the same codes, as one with a larger decoder."
        )
        flags.DEFINE_list("format", ["png", "grid"], "What is written, of png, grid and npz.")
        flags.DEFINE_bool("animate", False, "Also writes an animated GIF of the first image.")
    with group("Which samples"):
        flags.DEFINE_integer("num_samples", 64, "How many images are sampled.", lower_bound=1)
        flags.DEFINE_list(
            "class",
            [],
            "Their classes in turn, by name, or as #PLACE in the list of classes, from 0; by "
            "default all. A name with a comma is quoted within: --class='\"a, b\",c'.",
        )
        flags.DEFINE_multi_string(
            "condition",
            [],
            "KIND=PATH of a file or folder: images, maps, layouts. Once for each kind.",
        )
        flags.DEFINE_string(
            "complete",
            "",
            "An image of which a part is kept: what is not transparent, or the half of --keep.",
        )
        flags.DEFINE_enum(
            "keep", "top", ("top", "bottom", "left", "right"), "The half of --complete to keep."
        )
        flags.DEFINE_integer("height", None, "In pixels; by default as in training.", lower_bound=1)
        flags.DEFINE_integer("width", None, "In pixels; by default as in training.", lower_bound=1)
        flags.DEFINE_integer("seed", 0, "The seed of the random numbers.")
    with group("The distribution (by default as the run's config says)"):
        flags.DEFINE_float(
            "temperature", None, "Below 1 likelier codes are preferred; 0 takes the likeliest."
        )
        flags.DEFINE_integer("top_k", None, "Samples from so many likeliest codes; 0 for all.")
        flags.DEFINE_float(
            "top_p", None, "Samples from the likeliest codes that reach this probability."
        )
        flags.DEFINE_float("guidance_scale", None, "Classifier-free guidance; 1 is none.")
        flags.DEFINE_string("guidance_schedule", None, "constant, linear or cosine.")
    with group("Rejection by a classifier"):
        flags.DEFINE_string(
            "classifier",
            "",
            "MODULE:FUNCTION that gives class probabilities, by which samples are chosen.",
        )
        flags.DEFINE_float(
            "acceptance", None, "The share of samples that --classifier accepts; by default 0.5."
        )
    with group("How"):
        flags.DEFINE_integer(
            "batch_size",
            None,
            "Samples that are processed together on each device; by default 16, and fewer of large "
            "images.",
        )
    with group(SEVERAL_PROCESSES):
        distributed.define_flags()
    require("checkpoint", "output")


def main() -> None:
    """Samples what the flags say."""
    distributed.join()
    from vqgan_jax.inference.sample import sample

    options = flags.FLAGS
    sample(
        options.checkpoint,
        options.output,
        options.num_samples,
        options["class"].value,
        options.format,
        options.batch_size,
        options.seed,
        options.height,
        options.width,
        split_conditions(options.condition),
        options.complete,
        options.keep,
        options.animate,
        options.classifier,
        options.acceptance,
        options.tokenizer,
        **{name: options[name].value for name in _DISTRIBUTION},
    )


def split_conditions(given: Sequence[str]) -> dict[str, str]:
    """KIND=PATH, several of them, to a mapping.

    Raises:
        DataError: one is not of that form, or of a kind that there was already.
    """
    found = {}
    for text in given:
        kind, equals, path = text.partition("=")
        if not equals:
            raise DataError(f"--condition={text}: it must be KIND=PATH.")
        if kind in found:
            raise DataError(
                f"--condition={kind}=... is given twice; for several samples, give a folder."
            )
        found[kind] = path
    return found


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
