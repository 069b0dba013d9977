"""Checkpoints of a run, and exports: what inference needs and nothing else.

A run keeps `checkpoints/STEP/{state,config}`: the whole training state, written in the background,
and the resolved config. An export is `config.json` and `variables/`: the model's parameters (the
moving average where there is one) and, for fine-tuning, the discriminator's; `checksums.json` has
the SHA-256 of each file. A transformer's run or export has those of its tokenizers within, as
`tokenizer/` and `condition_tokenizers/NAME/`.
"""

import contextlib
import errno
import json
import logging
import math
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from vqgan_jax import configuration, distributed
from vqgan_jax.checkpoints.checksums import check_checksums, write_checksums
from vqgan_jax.checkpoints.damage import set_aside
from vqgan_jax.checkpoints.writing import write_text
from vqgan_jax.configuration import documents
from vqgan_jax.configuration.memory import available_bytes
from vqgan_jax.errors import DataError
from vqgan_jax.training.sharding import path_name

CHECKPOINTS = "checkpoints"
CONFIG_FILE = "config.json"
VARIABLES = "variables"
TOKENIZER = "tokenizer"
CONDITION_TOKENIZERS = "condition_tokenizers"
_unchecked: set[pathlib.Path] = set()  # exports of which it was said that they have no checksums
_WRITE_ERRORS = (OSError, ValueError)  # tensorstore tells of a full disk by a ValueError


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which, why and what to do."""


def all_steps(workdir: pathlib.Path) -> list[int]:
    """The steps of the checkpoints that are whole in a run directory, ascending."""
    directory = pathlib.Path(workdir).absolute() / CHECKPOINTS
    return sorted(ocp.utils.checkpoint_steps(directory)) if directory.is_dir() else []


def latest_step(workdir: pathlib.Path) -> int | None:
    """The step of the newest checkpoint that is whole in a run directory, or None."""
    return max(all_steps(workdir), default=None)


class Checkpoints:
    """The checkpoints of one run directory: the latest ones and the best by a metric."""

    def __init__(self, workdir: pathlib.Path, config: ConfigDict):
        self._directory = pathlib.Path(workdir).absolute() / CHECKPOINTS
        self._config = config
        if jax.process_index() == 0:
            _set_aside_bookkeeping(self._directory)
        distributed.barrier("checkpoints: bookkeeping read")
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        training = self._config.training

        def rank(figures):
            # Without a perceptual term there is no "lpips"; no evaluation is never the best.
            stand_in = figures.get("reconstruction_loss", math.inf)
            return figures.get(training.best_metric, stand_in)

        policies = [LatestN(training.keep_latest)]
        if training.keep_best > 0:
            # Ascending order would keep the highest; ours are better when lower.
            policies.append(BestN(get_metric_fn=rank, reverse=True, n=training.keep_best))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies),
            best_fn=rank,  # without it the metrics would be forgotten when the run is resumed
            create=False,  # nothing is made before there is something to save
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )
        # Without the handlers a manager that has saved nothing yet cannot read metadata.
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        state_handler, config_handler = ocp.StandardCheckpointHandler(), ocp.JsonCheckpointHandler()
        registry.add("state", ocp.args.StandardSave, state_handler)
        registry.add("state", ocp.args.StandardRestore, state_handler)
        registry.add("config", ocp.args.JsonSave, config_handler)
        registry.add("config", ocp.args.JsonRestore, config_handler)
        return ocp.CheckpointManager(self._directory, options=options, handler_registry=registry)

    def save(self, step: int, state: Any, metrics: dict[str, float] | None = None) -> None:
        """Begins to write the state of `step`; a step that is there already stays as it is.

        Raises:
            CheckpointError: there is no room for it, or it or the one before could not be written.
        """
        if step in self._manager.all_steps():
            return
        self.wait()
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            _check_space(self._directory, state)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    config=ocp.args.JsonSave(json.loads(configuration.to_json(self._config))),
                ),
                metrics=metrics or {},
            )
        except _WRITE_ERRORS as error:
            raise _write_error(self._directory, error) from error

    def restore(self, abstract_state: Any) -> tuple[int, Any] | None:
        """The newest readable checkpoint as `(step, state)`, laid out as `abstract_state` says.

        A damaged one is renamed to `STEP.damaged`, reported, and the one before it is taken.

        Raises:
            CheckpointError: there are checkpoints, but of another model or none readable.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                self._check_compatible(step, abstract_state)
                restored = self._manager.restore(
                    step,
                    args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state)),
                )
                return step, restored["state"]
            except (CheckpointError, PermissionError, MemoryError, jax.errors.JaxRuntimeError):
                raise  # nothing that another checkpoint would help against
            except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
                self._set_aside(step, error)
        if any(self._directory.glob("*[0-9].damaged*")):
            raise CheckpointError(
                f"None of the checkpoints in {self._directory} can be read; they are renamed to "
                "STEP.damaged. Choose another --workdir to start anew."
            )
        return None

    def _check_compatible(self, step: int, abstract_state: Any) -> None:
        """Raises `CheckpointError` where the stored state is whole, but another config's.

        A config that is damaged is replaced by the run's, which has the same model.

        Raises:
            DataError: the stored config is damaged, and there is none to take its place.
        """
        path = self._directory / str(step)
        ours = _model_of(self._config)
        try:
            stored = _model_of(_parse_config(path / "config" / "metadata"))
            damage = None if stored == ours else "it is of another model than the run"
        except ValueError as error:
            stored, damage = None, documents.first_line(error)
        replaced = damage is not None and self._run_has(ours)
        if stored is None and not replaced:
            raise DataError(damage)
        if stored != ours and not replaced:
            raise CheckpointError(
                f"{path} is of another model: {_first_difference(stored, ours)}. "
                "Choose another --workdir, or the config that the run was started with."
            )
        metadata = self._manager.item_metadata(step)["state"]
        if metadata is None:
            raise DataError("it has no state")
        stored_shapes = shapes(metadata)
        our_shapes = shapes(abstract_state)
        if stored_shapes != our_shapes:
            different = sorted(stored_shapes.items() ^ our_shapes.items())
            raise CheckpointError(
                f"{path} holds another training state; the first "
                f"difference is at {different[0][0]}. The config's discriminator and optimizer "
                "must stay as the run was started with; or choose another --workdir and set "
                "config.training.initialize_from to this run."
            )
        if replaced:
            self._replace_config(path / "config" / "metadata", damage)

    def _run_has(self, model: dict[str, Any]) -> bool:
        """Whether the run's own `config.json` is good and of the same model."""
        try:
            return _model_of(_parse_config(self._directory.parent / CONFIG_FILE)) == model
        except ValueError:
            return False

    def _replace_config(self, path: pathlib.Path, damage: str) -> None:
        distributed.barrier(f"config of {path.parent.parent.name} read")
        if jax.process_index() == 0:
            if path.exists():
                instead = f"the run's {CONFIG_FILE} takes its place"
                set_aside(path, damage, instead, path.parent.parent)
            else:
                logging.warning("%s is missing; the run's %s takes its place.", path, CONFIG_FILE)
            path.parent.mkdir(exist_ok=True)
            text = (self._directory.parent / CONFIG_FILE).read_text()
            write_text(path, json.dumps(json.loads(text)))
        distributed.barrier(f"config of {path.parent.parent.name} replaced")

    def _set_aside(self, step: int, error: Exception) -> None:
        path = self._directory / str(step)
        self._manager.close()
        if jax.process_index() == 0:
            set_aside(path, documents.first_line(error), "the checkpoint before it is used")
        distributed.barrier(f"set aside {step}")
        self._manager = self._open()

    def reached_preemption(self, step: int) -> bool:
        """Whether the cluster asked all processes to stop after `step`."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Returns when everything begun is on disk."""
        try:
            self._manager.wait_until_finished()
        except _WRITE_ERRORS as error:
            raise _write_error(self._directory, error) from error

    def close(self) -> None:
        """Waits for what was begun and ends the writer's threads."""
        self.wait()
        self._manager.close()


def _set_aside_bookkeeping(directory: pathlib.Path) -> None:
    """Sets aside what checkpoints can do without: figures, which only rank them, and times."""
    for step in all_steps(directory.parent):
        for path, instead in (
            (directory / str(step) / "metrics", "the checkpoint counts as unranked"),
            (directory / str(step) / "_CHECKPOINT_METADATA", "it is not needed"),
        ):
            if not path.exists():
                continue
            try:
                file = path / "metrics" if path.name == "metrics" else path
                content = json.loads(documents.read_bytes(file))  # figures may be infinite
                form = dict[str, float] if path.name == "metrics" else dict[str, Any]
                documents.convert(content, form, "It")
            except (ValueError, RecursionError) as error:
                set_aside(path, documents.first_line(error), instead, path.parent)


def _parse_config(file: pathlib.Path) -> ConfigDict:
    """The config in a file that describes a model which could be built; `ValueError` otherwise."""
    config = configuration.from_json(documents.read_bytes(file))
    configuration.validate_stored(config)
    return config


def _model_of(config: ConfigDict) -> dict[str, Any]:
    """Stage and model of a config, with the keys that are newer than what is stored."""
    values = _without_form(json.loads(configuration.to_json(config)))
    return {section: values[section] for section in ("stage", "model")}


def _without_form(config: Any) -> Any:
    """A config without what only says how the same model is computed: that can change in a run."""
    if not isinstance(config, dict):
        return config
    form = ("remat", "remat_keeps", "unroll")
    return {key: _without_form(value) for key, value in config.items() if key not in form}


def _first_difference(stored: Any, ours: Any, name: str = "") -> str:
    """ "model.channels is 32 there and 64 here", for the first key that differs."""
    if isinstance(stored, dict) and isinstance(ours, dict):
        for key in sorted(stored.keys() | ours.keys()):
            if stored.get(key) != ours.get(key):
                path = f"{name}.{key}" if name else key
                return _first_difference(stored.get(key), ours.get(key), path)
    return f"{name} is {stored} there and {ours} here"


def shapes(state: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every array of a tree, by its path."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {path_name(path): tuple(leaf.shape) for path, leaf in flat}


def _check_space(directory: pathlib.Path, state: Any) -> None:
    """Raises `OSError` where a state does not fit, before the writer's threads run into it."""
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    free = shutil.disk_usage(directory).free
    if needed > free:
        text = f"it needs {needed / 2**20:.1f} MiB and {free / 2**20:.1f} MiB are free"
        raise OSError(errno.ENOSPC, text)


def _write_error(directory: pathlib.Path, error: Exception) -> CheckpointError:
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    if " [os_error_code=" in reason:  # tensorstore's, with all that it was doing in front
        reason = reason.partition(" [os_error_code=")[0].rpartition(": ")[2]
    return CheckpointError(
        f"Cannot write a checkpoint to {directory}: {reason[:300].rstrip('.')}. Earlier "
        "checkpoints are untouched; make room and start the same command again."
    )


def write_export(
    directory: str | pathlib.Path,
    config: ConfigDict,
    variables: Any,
    discriminator: Any | None = None,
    tokenizers: Mapping[str, tuple[ConfigDict, Any]] | None = None,
) -> None:
    """Writes what inference needs to a new directory, all at once at the end.

    Args:
        directory: where; it must not exist or be empty.
        config: the resolved config.
        variables: the model's collections, `params` and for an EMA quantiser `codebook`.
        discriminator: its collections, for fine-tuning and for the way back to other formats.
        tokenizers: of a transformer: config and variables of its tokenizer, `TOKENIZER`, and of
            those of its conditions, by `condition_folder`.

    Raises:
        CheckpointError: the directory is in use, or it cannot be written.
    """
    directory = pathlib.Path(directory).absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory} exists already; choose another output directory.")
    temporary = directory.with_name(f".{directory.name}.partial")
    items = {config.stage: variables}
    if discriminator is not None:
        items["discriminator"] = discriminator
    try:
        if temporary.exists():
            shutil.rmtree(temporary)  # left by an export that was killed
        temporary.mkdir(parents=True, exist_ok=True)  # a failed one's thread may still be at work
        # By this process alone, where there are several: the others do not wait for it.
        own = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=own, active_processes={own}, barrier_sync_key_prefix="export"
        )
        with ocp.StandardCheckpointer(
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            multiprocessing_options=alone,
        ) as checkpointer:
            checkpointer.save(temporary / VARIABLES, jax.device_get(items))
        (temporary / CONFIG_FILE).write_text(configuration.to_json(config))
        write_checksums(temporary, (CONFIG_FILE, VARIABLES))
        for name, tokenizer in (tokenizers or {}).items():
            write_export(temporary / name, *tokenizer)
        if directory.exists():
            directory.rmdir()
        temporary.rename(directory)
    except OSError as error:
        raise _write_error(directory, error) from error


def read_variables(path: str | pathlib.Path) -> tuple[ConfigDict, Any, Any | None]:
    """The config, the model's and the discriminator's variables of a run, checkpoint or export.

    Of a run directory, the newest checkpoint is taken; of a checkpoint, the moving average of the
    parameters where there is one. The discriminator's are None where there are none.

    Raises:
        CheckpointError: there is nothing of that kind at `path`, or it is damaged.
    """
    path = pathlib.Path(path).expanduser().absolute()
    if not path.exists():
        raise CheckpointError(f"There is no {path}.")
    if (path / CONFIG_FILE).is_file() and (path / VARIABLES).is_dir():
        return _read_export(path)
    for directory in (path / CHECKPOINTS, path):
        steps = ocp.utils.checkpoint_steps(directory) if directory.is_dir() else []
        if steps:
            return _read_checkpoint(directory / str(max(steps)))
    if (path / "state").is_dir() and (path / "config").is_dir():
        return _read_checkpoint(path)
    raise CheckpointError(
        f"{path} is no run directory, checkpoint or export: it has neither {CHECKPOINTS}/STEP/ "
        f"nor {CONFIG_FILE} and {VARIABLES}/."
    )


def read_config(path: str | pathlib.Path) -> ConfigDict:
    """The config of a checkpoint or an export.

    Raises:
        CheckpointError: it is damaged.
    """
    path = pathlib.Path(path).expanduser().absolute()
    file = path / CONFIG_FILE
    return _read_config(file if file.is_file() else path / "config" / "metadata", path)


def read_shapes(path: str | pathlib.Path) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter of a checkpoint's or an export's model, by its path.

    Raises:
        CheckpointError: it is damaged.
    """
    path = pathlib.Path(path).expanduser().absolute()
    config = read_config(path)
    folder = path / VARIABLES if (path / VARIABLES).is_dir() else path / "state"
    try:
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            tree = handler.metadata(folder).tree
        if folder.name == VARIABLES:
            return shapes(tree[config.stage]["params"])
        return shapes((tree.get("generator") or tree)["params"])
    except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
        raise CheckpointError(f"Cannot read {path}: {documents.first_line(error)}.") from error


def _read_export(path: pathlib.Path) -> tuple[ConfigDict, Any, Any | None]:
    try:
        if not check_checksums(path, (CONFIG_FILE, VARIABLES)):
            _say_unchecked(path)
    except (DataError, OSError) as error:
        raise CheckpointError(f"The export {path} cannot be used: {error}") from error
    config = _read_config(path / CONFIG_FILE, path)
    items = _read_tree(path / VARIABLES, lambda tree: tree)
    if not isinstance(items, dict) or config.stage not in items:
        raise CheckpointError(f"{path} is damaged: it holds no {config.stage}.")
    return config, items[config.stage], items.get("discriminator")


def _say_unchecked(path: pathlib.Path) -> None:
    """Once for each export that was written before there were checksums, with those within it."""
    if not _unchecked & {path, *path.parents[:2]}:
        logging.warning(
            "%s was written by an older version: it has no checksums, so damage cannot be seen.",
            path,
        )
    _unchecked.add(path)


def _read_checkpoint(path: pathlib.Path) -> tuple[ConfigDict, Any, Any | None]:
    config = _read_config(path / "config" / "metadata", path)
    if config.stage == "transformer":
        state = _read_tree(path / "state", _of_inference)
        return config, {"params": _inference_params(state)}, None

    def wanted(state):
        items = {"generator": _of_inference(state["generator"])}
        if state["generator"].get("codebook"):
            items["generator"]["codebook"] = state["generator"]["codebook"]
        if state.get("discriminator"):
            items["discriminator"] = {
                name: state["discriminator"][name]
                for name in ("params", "batch_stats")
                if state["discriminator"].get(name)
            }
        return items

    state = _read_tree(path / "state", wanted)
    variables = {"params": _inference_params(state["generator"])}
    if "codebook" in state["generator"]:
        variables["codebook"] = state["generator"]["codebook"]
    return config, variables, state.get("discriminator")


def _of_inference(state):
    """The part of a stored state that `_inference_params` needs."""
    name = "ema_params" if state.get("ema_params") else "params"
    return {name: state[name]}


def _inference_params(state):
    """The moving average of the parameters where there is one."""
    return state.get("ema_params") or state["params"]


def checkpoint_step(path: str | pathlib.Path) -> int | None:
    """The step of a run's newest checkpoint, or of a checkpoint; None for an export."""
    path = pathlib.Path(path).expanduser().absolute()
    for directory in (path / CHECKPOINTS, path):
        if directory.is_dir() and (steps := ocp.utils.checkpoint_steps(directory)):
            return max(steps)
    return int(path.name) if path.name.isdecimal() else None


def condition_folder(name: str) -> str:
    """The folder of a run or export that has the tokenizer of a condition."""
    return f"{CONDITION_TOKENIZERS}/{name}"


def tokenizer_path(path: str | pathlib.Path, folder: str = TOKENIZER) -> pathlib.Path:
    """Where a tokenizer of a transformer's run, checkpoint or export is.

    Raises:
        CheckpointError: it has none.
    """
    path = pathlib.Path(path).expanduser().absolute()
    for directory in (
        path,
        path.parent,
        path.parent.parent,
    ):  # a checkpoint is RUN/checkpoints/STEP
        if (directory / folder / CONFIG_FILE).is_file():
            return directory / folder
    raise CheckpointError(f"{path} is a transformer without its tokenizer: {folder}/ is missing.")


def _read_config(file: pathlib.Path, path: pathlib.Path) -> ConfigDict:
    try:
        return _parse_config(file)
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged: its {file.name} cannot be used: {error}"
        ) from error


def _read_tree(path: pathlib.Path, wanted) -> Any:
    """The part of a stored tree that `wanted` picks, as host arrays on the default device."""
    try:
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            metadata = wanted(handler.metadata(path).tree)
            device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            item = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
                metadata,
            )
            _check_memory(path, metadata)
            restore_args = ocp.checkpoint_utils.construct_restore_args(item)
            return handler.restore(
                path,
                args=ocp.args.PyTreeRestore(
                    item=item, restore_args=restore_args, partial_restore=True
                ),
            )
    except CheckpointError:
        raise
    except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
        reason = (str(error).strip() or repr(error)).splitlines()[0][:300]
        raise CheckpointError(f"Cannot read {path}: {reason}.") from error


def _check_memory(path: pathlib.Path, metadata: Any) -> None:
    """Raises `CheckpointError` where arrays are said to be larger than the memory."""
    needed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(metadata))
    available = available_bytes()
    if available is not None and needed > available:
        raise CheckpointError(
            f"Cannot read {path}: its arrays need {needed / 2**30:,.1f} GiB, and there are "
            f"{available / 2**30:,.1f} GiB."
        )
