"""Fits linear classifiers to a model's features: how well they tell classes apart.

    python -m vqgan_jax.probe --checkpoint=runs/vim --dataset=imagenet2012 --output=probe

A transformer is probed at each block, a tokenizer at its latents and codes. The output holds
`probe.json`, the chart `probe.png` of accuracy by block and the best classifier. With --finetune,
the transformer up to --block is trained further with the classifier.
"""

from absl import flags

from vqgan_jax import command_line
from vqgan_jax.command_line.help import group, require


def define_flags() -> None:
    """The flags of this command."""
    with group("Input and output"):
        flags.DEFINE_string("checkpoint", None, "A run, a checkpoint or an export.")
        flags.DEFINE_string("output", None, "A new directory.")
        flags.DEFINE_string(
            "dataset", "", "A data set with classes; by default that of the model's training."
        )
        flags.DEFINE_string("train_split", "train", "The split that classifiers are fitted to.")
        flags.DEFINE_string(
            "validation_split", "validation", "The split that they are evaluated on."
        )
        flags.DEFINE_integer(
            "num_images", 0, "At most so many images of each split; 0 for all.", lower_bound=0
        )
        flags.DEFINE_string("data_dir", "", "Where data sets are; by default as in training.")
    with group("How"):
        flags.DEFINE_string("block", "all", "The number of a transformer's block; or all.")
        flags.DEFINE_integer("batch_size", 64, "Images that are processed together.", lower_bound=1)
        flags.DEFINE_float(
            "memory", 4.0, "GiB of features in one pass; fitting needs more.", lower_bound=0.0
        )
    with group("Fine-tuning"):
        flags.DEFINE_bool("finetune", False, "Trains the transformer up to --block further.")
        flags.DEFINE_integer("epochs", 10, "Passes over the training split.", lower_bound=1)
        flags.DEFINE_integer("finetune_batch_size", 32, "Images in an update.", lower_bound=1)
        flags.DEFINE_float("learning_rate", 1e-4, "The peak learning rate.", lower_bound=0.0)
        flags.DEFINE_float("weight_decay", 0.01, "AdamW's weight decay.", lower_bound=0.0)
    require("checkpoint", "output")


def main() -> None:
    """Probes what the flags say."""
    from vqgan_jax.probing.probe import Data, Finetuning, probe

    options = flags.FLAGS
    finetuning = None
    if options.finetune:
        finetuning = Finetuning(
            options.epochs,
            options.finetune_batch_size,
            options.learning_rate,
            options.weight_decay,
        )
    data = Data(
        options.dataset,
        options.train_split,
        options.validation_split,
        options.num_images,
        options.batch_size,
        options.data_dir,
    )
    probe(options.checkpoint, options.output, options.block, data, options.memory, finetuning)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
