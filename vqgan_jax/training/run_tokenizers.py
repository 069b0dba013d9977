"""The tokenizers of a transformer's run: copies in its directory, whatever becomes of the others.

A run keeps the tokenizer of its codes and, for each condition that is an image, that of the
condition's codes.
"""

import json
import pathlib
from collections.abc import Mapping

import jax
from ml_collections import ConfigDict

from vqgan_jax.configuration import ConfigError
from vqgan_jax.inference import Tokenizer, load_tokenizer
from vqgan_jax.training.checkpoints import (
    CONFIG_FILE,
    TOKENIZER,
    CheckpointError,
    condition_folder,
    write_export,
)
from vqgan_jax.training.encoding import check_channels, check_one_code


def tokenizers_of_run(
    config: ConfigDict, workdir: pathlib.Path
) -> tuple[Tokenizer, dict[str, Tokenizer]]:
    """The tokenizer of a run and those of its conditions, by name.

    Raises:
        CheckpointError: one does not exist.
        ConfigError: the run was begun with another one, from another path.
        DataError: one takes other images than data sets have, or gives several codes a position.
    """
    begun = {}
    if (workdir / CONFIG_FILE).exists():
        begun = json.loads((workdir / CONFIG_FILE).read_text())
    tokenizer = _of_run(
        "config.tokenizer.path",
        config.tokenizer.path,
        workdir / TOKENIZER,
        begun.get("tokenizer", {}).get("path", ""),
    )
    images = config.condition.images
    begun_images = begun.get("condition", {}).get("images", {})
    of_conditions = {
        name: _of_run(
            f"config.condition.images.{name}.tokenizer",
            images[name].tokenizer,
            workdir / condition_folder(name),
            begun_images.get(name, {}).get("tokenizer", ""),
        )
        for name in config.condition.kinds
        if name in images
    }
    tokenizers = {"tokenizer": tokenizer}
    tokenizers |= {f"tokenizer of the condition {k}": own for k, own in of_conditions.items()}
    for what, own in tokenizers.items():
        check_channels(what, own)
        check_one_code(what, own)
    return tokenizer, of_conditions


def _of_run(key: str, path: str, copy: pathlib.Path, begun_with: str) -> Tokenizer:
    """The copy in a run's directory, or before there is one the tokenizer at `path`."""
    if not copy.exists():
        return load_tokenizer(path)
    kept = load_tokenizer(copy)
    if path != begun_with:
        try:
            other = load_tokenizer(path).fingerprint != kept.fingerprint
        except CheckpointError:
            other = False  # gone, or not here any more: the copy is there for that
        if other:
            raise ConfigError(
                f"{key} {path} is another tokenizer than that of the run, {copy}. Choose another "
                "--workdir, or the tokenizer that the run was started with."
            )
        if jax.process_index() == 0:
            print(f"{key} {path} has the same codes as {copy}, which the run goes on with.")
    return kept


def keep_tokenizers(
    tokenizer: Tokenizer, of_conditions: Mapping[str, Tokenizer], workdir: pathlib.Path
) -> None:
    """Writes the copies that `tokenizers_of_run` finds, where there are none.

    Raises:
        CheckpointError: one cannot be written.
    """
    if jax.process_index() != 0:
        return
    copies = {TOKENIZER: tokenizer} | {condition_folder(k): v for k, v in of_conditions.items()}
    for folder, kept in copies.items():
        if not (workdir / folder).exists():
            (workdir / folder).parent.mkdir(parents=True, exist_ok=True)
            write_export(workdir / folder, kept.config, kept.variables)
