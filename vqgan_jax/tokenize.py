"""Encodes a data set with a tokenizer and stores the codes that transformers train on.

    python -m vqgan_jax.tokenize --checkpoint=runs/quickstart --dataset=earth --output=codes
    python -m vqgan_jax.tokenize --verify=codes

Each split gets a directory of `.npy` files with the codes and `manifest.json`, with the SHA-256 of
every file. The same command continues a pass that was stopped. Several processes, joined as in
training, share the work; the output must be a directory that all of them see. The files do not
depend on how many processes and devices made them.
"""

from absl import flags

from vqgan_jax import command_line, distributed
from vqgan_jax.command_line.help import SEVERAL_PROCESSES, group
from vqgan_jax.errors import DataError


def define_flags() -> None:
    """The flags of this command."""
    with group("Input and output (all three are required, or --verify)"):
        flags.DEFINE_string("checkpoint", "", "The tokenizer: a run, a checkpoint or an export.")
        flags.DEFINE_string(
            "dataset", "", "The data set; by default the one that the tokenizer was trained on."
        )
        flags.DEFINE_string("output", "", "A directory; each split gets one of its own in it.")
        flags.DEFINE_string("verify", "", "Checks a directory of codes, and does nothing else.")
    with group("Images"):
        flags.DEFINE_list("split", ["train", "validation"], "Splits of the data set.")
        flags.DEFINE_list(
            "augment", [], "Views beside the centre crop: flip, ten_crop or both. Default: none."
        )
        flags.DEFINE_integer(
            "resolution",
            None,
            "Side of the images in pixels; by default as in training.",
            lower_bound=1,
        )
        flags.DEFINE_integer(
            "resize",
            None,
            "Shorter side in pixels before the crop; 0 is the resolution, -1 leaves it as it is; "
            "by default as in training.",
            lower_bound=-1,
        )
        flags.DEFINE_string(
            "image_key", "", "The feature of the data set that holds the images, if not `image`."
        )
        flags.DEFINE_string("data_dir", "", "Where data sets are; by default as in training.")
        flags.DEFINE_list(
            "conditions",
            [],
            "Conditions whose tokens are stored too, each NAME=TOKENIZER, such as "
            "segmentation=PATH, edges=PATH or low_resolution:4=PATH, or coordinates=INTERVALS, or "
            "layout=CONFIG.",
        )
    with group("How"):
        flags.DEFINE_integer(
            "batch_size", 32, "Images that are processed together on each device.", lower_bound=1
        )
        flags.DEFINE_integer("images_per_shard", 4096, "Images in a file of codes.", lower_bound=1)
    with group(SEVERAL_PROCESSES):
        distributed.define_flags()


def main() -> None:
    """Does what the flags say."""
    options = flags.FLAGS
    if options.verify and (options.checkpoint or options.output):
        raise DataError(
            "--verify checks codes that are there; leave out --checkpoint and --output."
        )
    if options.verify:
        from vqgan_jax.data.code_report import verify

        verify(options.verify)
        return
    if not (options.checkpoint and options.output and options.split):
        raise DataError("--checkpoint, --output and --split are needed, or --verify.")
    distributed.join()
    from vqgan_jax.inference.tokenize import tokenize

    tokenize(
        options.checkpoint,
        options.output,
        options.dataset,
        options.split,
        options.augment,
        options.resolution,
        options.resize,
        options.image_key,
        options.data_dir,
        options.batch_size,
        options.images_per_shard,
        options.conditions,
    )


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
