"""Compiles a run for TPUs that are not here, and says what it needs of them.

    python -m vqgan_jax.plan --config=configs/vqgan_f16.py --topology=v5e:4x4 --batch_size=256
    python -m vqgan_jax.plan --config=configs/vim.py:large --topology=v5e:16x16,v5p:4x8x8 \\
        --tokenizer_config=configs/vit_vqgan.py:SL --config.condition.num_classes=1000 \\
        --config.mesh.data=-1 --config.mesh.fsdp=16 --programs=transformer,sampling

Needs the compiler for TPUs, `pip install '.[tpu]'`, but no TPU, no data and no weights.
Ends with exit code 1 where a program does not fit.
"""

import importlib.metadata
import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys

from absl import flags
from ml_collections import ConfigDict, config_flags

from vqgan_jax import command_line, configuration
from vqgan_jax.command_line.help import group, require
from vqgan_jax.configuration import ConfigError

_APART = "VQGAN_JAX_PLANS_APART"  # in the environment of the process that compiles


def main() -> None:
    """Plans what the flags say, in a process of its own."""
    if _APART in os.environ:
        plan_here()
    else:
        # So that the other process ends too.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        sys.exit(run_apart([sys.executable, "-m", "vqgan_jax.plan", *sys.argv[1:]]))


def run_apart(command: list[str]) -> int:
    """The exit code of a command that compiles: the compiler may crash, and its process with it.

    Raises:
        ConfigError: it did, or the system ended it.
    """
    code = subprocess.run(command, env=os.environ | {_APART: "1"}, check=False).returncode
    if code == -signal.SIGKILL:
        raise ConfigError("The planner was killed, as the system does when memory is full.")
    if code < 0:
        raise ConfigError(
            f"The compiler for TPUs crashed ({signal.Signals(-code).name}) on the last slice. "
            f"That is a fault of libtpu {importlib.metadata.version('libtpu')}, not of the config; "
            "another mesh, batch size or version may get past it."
        )
    return code


def plan_here() -> None:
    """Plans what the flags say, in this process."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # a TPU that is here is not needed, and may be busy
    # A compiler for TPUs that are elsewhere writes its programs to the cache and cannot read them.
    jax.config.update("jax_enable_compilation_cache", False)
    from vqgan_jax.planning.planner import Planner, with_batch
    from vqgan_jax.planning.topologies import Topology

    options = flags.FLAGS
    config = options.config
    if not isinstance(config, ConfigDict):
        raise ConfigError("--config names no file whose get_config returns a ConfigDict.")
    if options.batch_size:
        config = with_batch(config, options.batch_size)
    configuration.validate(config)
    tokenizer = read_config(options.tokenizer_config) if options.tokenizer_config else None
    cache = pathlib.Path(options.cache).expanduser()
    plans, all_fit = [], True
    for name in options.topology:
        topology = Topology.named(name)
        planner = Planner(topology, tokenizer, cache, tuple(options.programs or ()))
        if options.explain_sharding:
            print(planner.explain_sharding(config))
            continue
        own = planner.with_largest_batch(config) if options.find_batch_size else config
        plan, fits = planner.plan(own)
        plans.append(plan)
        all_fit = all_fit and fits
        if options.json:
            pathlib.Path(options.json).write_text(json.dumps(plans, indent=2) + "\n")
    sys.exit(0 if all_fit else 1)


def read_config(argument: str) -> ConfigDict:
    """The config of `FILE` or `FILE:ARGUMENT`, as `--config` takes it.

    Raises:
        ConfigError: there is no such file, or it has no tokenizer's config.
    """
    path, _, rest = argument.partition(":")
    if not pathlib.Path(path).is_file():
        raise ConfigError(f"There is no config file {path!r}.")
    make = runpy.run_path(path).get("get_config")
    config = make(rest) if make else None
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"get_config of {path} returns no ConfigDict.")
    if config.stage != "tokenizer":
        raise ConfigError(f"--tokenizer_config={argument} is the config of a {config.stage}.")
    configuration.validate(config)
    return config


def define_flags() -> None:
    """The flags of this command."""
    with group("What is planned"):
        config_flags.DEFINE_config_file(
            "config", None, "The experiment, as of train; --config.KEY=VALUE changes a key."
        )
        flags.DEFINE_list(
            "topology", None, "Slices of TPUs to compile for, as in v5e:16x16,v5p:8x8x8."
        )
        flags.DEFINE_integer(
            "batch_size", 0, "Images in an update, on all chips together; by default the config's."
        )
        flags.DEFINE_boolean("find_batch_size", False, "Looks for the largest batch that fits.")
        flags.DEFINE_string(
            "tokenizer_config",
            "",
            "Of a transformer whose tokenizer is not trained yet: the tokenizer's config.",
        )
        flags.DEFINE_list("programs", None, "Only programs with one of these words in their names.")
    with group("Output"):
        flags.DEFINE_boolean(
            "explain_sharding", False, "Only shows which chips have which part of each parameter."
        )
        flags.DEFINE_string("json", "", "A file that all figures are written to.")
        flags.DEFINE_string("cache", "~/.cache/vqgan_jax/plans", "Where figures are kept.")
    require("config", "topology")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
