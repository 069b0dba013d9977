"""The tokenizers of a transformer's run: copies in its directory, whatever becomes of the others.

A run keeps the tokenizer of its codes and, for each condition that is an image, that of the
condition's codes.
"""

import contextlib
import pathlib
from collections.abc import Mapping

import jax
from ml_collections import ConfigDict

from vqgan_jax import configuration
from vqgan_jax.configuration import ConfigError, documents
from vqgan_jax.errors import DataError
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
        with contextlib.suppress(DataError, ConfigError):  # a damaged one names no paths
            text = documents.read_bytes(workdir / CONFIG_FILE)
            begun = configuration.from_json(text).to_dict()
    beside_codes = pathlib.Path(config.data.codes).expanduser() if config.data.codes else None
    tokenizer = _of_run(
        "config.tokenizer.path",
        config.tokenizer.path,
        workdir / TOKENIZER,
        begun.get("tokenizer", {}).get("path", ""),
        beside_codes and beside_codes / TOKENIZER,
    )
    images = config.condition.images
    begun_images = begun.get("condition", {}).get("images", {})
    of_conditions = {
        name: _of_run(
            f"config.condition.images.{name}.tokenizer",
            images[name].tokenizer,
            workdir / condition_folder(name),
            begun_images.get(name, {}).get("tokenizer", ""),
            beside_codes and beside_codes / condition_folder(name),
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


def _of_run(
    key: str,
    path: str,
    copy: pathlib.Path,
    begun_with: str,
    beside_codes: pathlib.Path | None,
) -> Tokenizer:
    """The copy in a run's directory, or before there is one the tokenizer at `path`.

    Where there is none at `path` any more, that which `tokenize` left beside the codes is taken.
    """
    if not copy.exists():
        gone = not path or not pathlib.Path(path).expanduser().exists()
        if gone and beside_codes is not None and beside_codes.exists():
            if jax.process_index() == 0:
                print(f"{key} {path!r} does not exist; the copy {beside_codes} is used.")
            return load_tokenizer(beside_codes)
        return load_tokenizer(path)
    try:
        kept = load_tokenizer(copy)
    except CheckpointError as error:
        raise CheckpointError(
            f"{str(error).rstrip('.')}. It is the run's copy of its tokenizer: put an undamaged "
            f"one there, or move it away to take that of {key} {path!r}, if it is still the same."
        ) from error
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
