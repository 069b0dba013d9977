"""The config of a run as a config file: `--config` of a run that is resumed without one."""

import pathlib


def get_config(workdir: str):
    """The config that the run in `workdir` was begun with.

    Raises:
        ConfigError: there is no run with a checkpoint.
    """
    from vqgan_jax.configuration import ConfigError
    from vqgan_jax.training.run_files import stored_config

    config = stored_config(pathlib.Path(workdir))
    if config is None:
        raise ConfigError(
            f"{workdir} holds no run with a checkpoint to resume; a new one needs --config."
        )
    return config
