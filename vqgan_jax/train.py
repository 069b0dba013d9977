"""Trains a model: `python -m vqgan_jax.train --config=configs/vqgan_f16.py --workdir=runs/f16`.

`--config=FILE:ARGUMENT` picks a variant of the config, `--config.KEY=VALUE` changes a key. The same
command goes on with a run that was stopped; the exit code is 75 where that is to be done.
"""

import pathlib

from absl import flags
from ml_collections import ConfigDict, config_flags

from vqgan_jax import commands, distributed
from vqgan_jax.configuration import ConfigError, validate

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, a file of configs/.")
_WORKDIR = flags.DEFINE_string(
    "workdir", "", "Where the run's files go; runs/NAME of the config file by default."
)
_EXPLAIN = flags.DEFINE_boolean(
    "explain_sharding", False, "Only show which devices have which part of each parameter."
)


def main() -> None:
    """Trains what the flags say."""
    distributed.join()
    import jax

    from vqgan_jax.data.splits import opening_line
    from vqgan_jax.training.loop import explain_sharding, train, with_stored_rules

    path = config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]
    if not pathlib.Path(path).is_file():
        raise ConfigError(f"There is no config file {path!r}.")
    if not isinstance(_CONFIG.value, ConfigDict):
        raise ConfigError(f"get_config of {path} returns no ConfigDict, but {_CONFIG.value!r}.")
    name = pathlib.Path(path).stem
    workdir = _WORKDIR.value or f"runs/{name}"
    if _EXPLAIN.value:
        table = explain_sharding(_CONFIG.value, workdir)
        if jax.process_index() == 0:
            print(table)
        return
    config = _CONFIG.value
    validate(config)
    if jax.process_index() == 0 and not config.data.get("codes"):
        rules = with_stored_rules(config, pathlib.Path(workdir)).data.folder_rules
        if line := opening_line(config.data.name, rules):
            print(line, flush=True)
    figures = train(config, workdir, started=commands.STARTED)
    if jax.process_index() != 0:
        return
    for name, value in figures.items():
        print(f"{name:>22}  {value:.4g}")
    print(f"Pictures are in {workdir}/images, all figures in {workdir}/metrics.jsonl.")


if __name__ == "__main__":
    distributed.define_flags()
    flags.mark_flag_as_required("config")
    commands.run(main)
