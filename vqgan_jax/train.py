"""Trains a tokenizer or a transformer; the same command resumes a stopped run.

    python -m vqgan_jax.train --config=quickstart
    python -m vqgan_jax.train --config=quickstart:./photos --workdir=runs/photos
    python -m vqgan_jax.train --workdir=runs/photos --config.training.num_steps=2000
    python -m vqgan_jax.train --list

--config=NAME:VARIANT picks a config and a variant of it, --config.KEY=VALUE changes a key; without
--config the run in --workdir is resumed with its own. The exit code is 75 where the run was stopped
with its state saved.
"""

import difflib
import pathlib

from absl import flags
from ml_collections import ConfigDict, config_flags

from vqgan_jax import command_line, distributed
from vqgan_jax.command_line.configs import STORED_CONFIG, config_files
from vqgan_jax.command_line.help import SEVERAL_PROCESSES, group
from vqgan_jax.configuration import ConfigError, validate

# What the figures of an evaluation are, for people.
_MEANINGS = {
    "psnr": "PSNR in dB, higher is better",
    "ssim": "SSIM, at most 1, higher is better",
    "lpips": "LPIPS, lower is better",
    "l1": "mean absolute error, of pixels in [-1, 1]",
    "l2": "mean squared error, of pixels in [-1, 1]",
    "reconstruction_loss": "reconstruction loss",
    "pixel_accuracy": "share of pixels with the right label",
    "codebook_usage": "share of the codes that are used",
    "codebook_perplexity": "perplexity of the codes: how many are used, as if equally often",
    "images": "images of the evaluation",
    "cross_entropy": "cross-entropy per code in nats, lower is better",
    "bits_per_code": "bits per code, lower is better",
    "perplexity": "perplexity per code",
    "code_frequency_bits": "bits per code by the codes' frequencies alone",
    "left_neighbour_bits": "bits per code by the left neighbour alone",
}


def define_flags() -> None:
    """The flags of this command."""
    with group("What is trained"):
        config_flags.DEFINE_config_file(
            "config",
            None,
            "The experiment: a config's name as --list shows it, or a file; after a "
            "colon its variant. --config.KEY=VALUE changes a key.",
        )
        flags.DEFINE_string(
            "workdir", "", "Where the run's files are written; by default runs/NAME of the config."
        )
    with group("Instead of training"):
        flags.DEFINE_boolean("list", False, "Lists the configs that there are.")
        flags.DEFINE_boolean("print_config", False, "Prints every key of the config.")
        flags.DEFINE_boolean(
            "explain_sharding", False, "Shows which devices have which part of each parameter."
        )
    with group(SEVERAL_PROCESSES):
        distributed.define_flags()


def main() -> None:
    """Trains what the flags say."""
    options = flags.FLAGS
    if options.list:
        from vqgan_jax.command_line.configs import list_configs

        print(*list_configs(), sep="\n")
        return
    if options.config is None:
        raise ConfigError("--config is missing; --list shows the configs that there are.")
    path = config_flags.get_config_filename(options["config"]).split(":")[0]
    if not pathlib.Path(path).is_file():
        near = difflib.get_close_matches(path, config_files(), n=1)
        meant = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"There is no config file {path!r}.{meant} --list shows those that there are."
        )
    config = options.config
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"get_config of {path} returns no ConfigDict, but {config!r}.")
    workdir = options.workdir or f"runs/{pathlib.Path(path).stem}"
    if options.print_config:
        from vqgan_jax.command_line.configs import described_config

        print(*described_config(config), sep="\n")
        return
    command_line.announce(f"train {_shown(path, workdir)} -> {workdir}")
    distributed.join()
    import jax

    from vqgan_jax.training.loop import explain_sharding, train

    if options.explain_sharding:
        table = explain_sharding(config, workdir)
        if jax.process_index() == 0:
            print(table)
        return
    validate(config)
    figures = train(config, workdir, started=command_line.STARTED)
    if jax.process_index() != 0:
        return
    width = max(len(_MEANINGS.get(name, name)) for name in figures)
    for name, value in figures.items():
        print(f"  {_MEANINGS.get(name, name):<{width}}  {value:.4g}")
    print(f"Pictures are in {workdir}/images, all figures in {workdir}/metrics.jsonl. Next:")
    if config.stage == "tokenizer":
        command = f"reconstruct --checkpoint={workdir} --dataset=FOLDER --output=seen"
    else:
        command = f"sample --checkpoint={workdir} --output=samples"
    print(f"  python -m vqgan_jax.{command}")


def _shown(path: str, workdir: str) -> str:
    """The config for people: a name for one of the package, else its file."""
    if path == str(STORED_CONFIG):
        return f"the config of {workdir}"
    file = pathlib.Path(path).resolve()
    names = [name for name, found in config_files().items() if found.resolve() == file]
    return names[0] if names else path


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
