"""Reconstructs images with a tokenizer and measures the reconstructions.

    python -m vqgan_jax.reconstruct --checkpoint=runs/quickstart --dataset=photos --output=seen
    python -m vqgan_jax.reconstruct --checkpoint=runs/quickstart --dataset=validation --output=seen

The output holds a PNG for each image, the input on the left and its reconstruction on the right;
the overview `grid.png`; and `metrics.json` with PSNR, SSIM and LPIPS of each image, their means,
and how much of the codebook the images use. Images may have any size; see --resize.
"""

from absl import flags

from vqgan_jax import command_line
from vqgan_jax.command_line.help import group, require


def define_flags() -> None:
    """The flags of this command."""
    with group("Input and output"):
        flags.DEFINE_string("checkpoint", None, "The tokenizer: a run, a checkpoint or an export.")
        flags.DEFINE_list(
            "dataset",
            None,
            "Images: files, folders, the name of a data set, of which the validation or test "
            "split is taken, or the word validation for that of the tokenizer's own training.",
        )
        flags.DEFINE_string("output", None, "A new directory.")
        flags.DEFINE_integer(
            "num_images", 16, "How many images of the validation split.", lower_bound=1
        )
        flags.DEFINE_string(
            "data_dir", "", "Where data sets and LPIPS weights are; by default as in training."
        )
    with group("How"):
        flags.DEFINE_integer(
            "resize",
            None,
            "Scales the shorter side to so many pixels first; by default images keep their size. "
            "Then the largest centre that the tokenizer's downsampling factor divides is taken.",
            lower_bound=1,
        )
        flags.DEFINE_integer(
            "batch_size", 8, "Images of one size that are processed together.", lower_bound=1
        )
    require("checkpoint", "dataset", "output")


def main() -> None:
    """Reconstructs what the flags say."""
    from vqgan_jax.inference.reconstruct import reconstruct

    options = flags.FLAGS
    reconstruct(
        options.checkpoint,
        options.dataset,
        options.output,
        options.batch_size,
        options.resize,
        options.num_images,
        options.data_dir,
    )


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
