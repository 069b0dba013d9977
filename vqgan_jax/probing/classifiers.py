"""Classifiers on disk, and as functions from images to class probabilities.

A classifier is a directory of two files: `classifier.json` says of which model it is and of which
of its features, and `weights.npz` has `classifier/kernel` and `classifier/bias`; of a fine-tuned
transformer, its parameters too, as `transformer/blocks/attention/query/kernel`.
"""

import dataclasses
import json
import os
import pathlib
import zipfile
from collections.abc import Callable, Sequence
from typing import Annotated

import flax.traverse_util
import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from vqgan_jax.configuration.documents import convert, first_line, parse_json, read_bytes
from vqgan_jax.errors import DataError
from vqgan_jax.generation import Generator
from vqgan_jax.inference import load
from vqgan_jax.probing.features import FeatureModel, averaged, block_name
from vqgan_jax.probing.linear import Linear
from vqgan_jax.training.encoding import encode_raw

FILE, WEIGHTS = "classifier.json", "weights.npz"


def finetuned_features(model: FeatureModel, block: int) -> Callable:
    """`(variables, raw, dropout key or None) -> (B, width)`, behind a block, to be differentiated.

    `variables` has the tokenizer's and, as `transformer`, the parameters of `FeatureModel.up_to`.
    """
    transformer, _ = model.up_to(block)

    def features(variables, raw, key=None):
        codes = encode_raw(model.tokenizer, variables["tokenizer"], raw)
        x = transformer.apply(
            {"params": variables["transformer"]},
            model.no_condition(codes),
            codes,
            train=key is not None,
            rngs=None if key is None else {"dropout": key},
            method="states",
        )
        return averaged(x[:, transformer.num_conditions :])

    return features


def write_classifier(
    directory: pathlib.Path,
    checkpoint: str | os.PathLike,
    model: Generator,
    features: str,
    linear: Linear,
    class_names: Sequence[str],
    finetuned=None,
) -> None:
    """Writes a classifier to a directory, which it makes.

    Args:
        directory: where.
        checkpoint: the model's run, checkpoint or export.
        model: the tokenizer or generator there.
        features: which of a `FeatureModel`'s it takes.
        linear: `(D, classes)`, of the features as they are.
        class_names: of all classes.
        finetuned: parameters of the transformer up to that block, where they are others.
    """
    directory.mkdir(parents=True, exist_ok=True)
    weights = {"classifier": {"kernel": linear.kernel, "bias": linear.bias}}
    if finetuned is not None:
        weights["transformer"] = finetuned
    weights = flax.traverse_util.flatten_dict(weights, sep="/")
    np.savez(directory / WEIGHTS, **{name: np.asarray(leaf) for name, leaf in weights.items()})
    description = {
        "checkpoint": str(pathlib.Path(checkpoint).expanduser().absolute()),
        "fingerprint": model.fingerprint,
        "features": features,
        "class_names": list(class_names),
    }
    (directory / FILE).write_text(json.dumps(description, indent=2) + "\n")


@dataclasses.dataclass(frozen=True)
class _Description:
    """What `classifier.json` holds."""

    checkpoint: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
    fingerprint: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    features: str
    class_names: Annotated[list[str], msgspec.Meta(min_length=1, max_length=2**20)]


def _read_weights(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of an uncompressed `.npz` file, which are together no larger than the file.

    Raises:
        DataError: it is no such file, or has values that are not finite.
    """
    if not path.is_file():  # a pipe would never end
        raise DataError(f"{path} is missing, or no regular file.")
    try:
        with zipfile.ZipFile(path) as file:
            if any(member.compress_type != zipfile.ZIP_STORED for member in file.infolist()):
                raise DataError(f"{path} is compressed, which no classifier's weights are.")
            if sum(member.file_size for member in file.infolist()) > path.stat().st_size:
                raise DataError(f"{path} is damaged: its arrays overlap.")
        with np.load(path, allow_pickle=False) as arrays:
            weights = dict(arrays)
    except DataError:
        raise
    except Exception as error:  # zipfile and NumPy raise many kinds for a damaged file
        raise DataError(f"{path} is damaged: {first_line(error)}.") from error
    for name, array in weights.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
            raise DataError(f"{path} is damaged: {name} is no array of floats.")
        if not np.isfinite(array).all():
            raise DataError(f"{path} is damaged: {name} has values that are no finite numbers.")
    return weights


def load_classifier(directory: str | os.PathLike) -> Callable[[np.ndarray], np.ndarray]:
    """What `write_classifier` wrote, as a function of images; `sample --classifier` takes such.

    Args:
        directory: `classifier` or `finetuned` of what `python -m vqgan_jax.probe` wrote.

    Returns:
        A function from uint8 images `(B, H, W, 3)`, of the size that the model was trained on, to
        the probabilities of the classes, `(B, classes)` float32.

    Raises:
        DataError: there is no classifier, or it is of another model than is at its checkpoint.
        CheckpointError: the model is not where it was.
    """
    directory = pathlib.Path(directory).expanduser()
    file = directory / FILE
    if not file.is_file():
        raise DataError(f"{directory} is no classifier: it has no {FILE}.")
    description = convert(parse_json(read_bytes(file), str(file)), _Description, str(file))
    loaded = load(description.checkpoint)
    if loaded.fingerprint != description.fingerprint:
        raise DataError(
            f"{directory} is a classifier of another model than is in {description.checkpoint} now."
        )
    arrays = _read_weights(directory / WEIGHTS)
    model, name = FeatureModel(loaded), description.features
    side = model.config.model.resolution
    try:
        weights = flax.traverse_util.unflatten_dict(arrays, sep="/")
        linear = Linear(**weights.pop("classifier"))
        variables = jax.device_put(model.variables | weights)
        if weights:
            block = next(i for i in range(model.num_blocks + 1) if block_name(i) == name)
            features = finetuned_features(model, block)
        else:

            def features(variables, raw):
                return model.features([name], variables, raw)[name]

        @jax.jit
        def probabilities(variables, raw):
            return jax.nn.softmax(linear(features(variables, raw)), axis=-1)

        shape = (1, side, side) if model.config.data.num_labels else (1, side, side, 3)
        raw = jax.ShapeDtypeStruct(shape, np.uint8)
        found = jax.eval_shape(probabilities, variables, raw).shape
    except Exception as error:  # as many kinds as there are wrong shapes and names
        raise DataError(f"{directory} does not fit its own {FILE}: {first_line(error)}.") from error
    if found != (1, len(description.class_names)):
        raise DataError(
            f"{directory / WEIGHTS} is of {found[-1]} classes, and {FILE} names "
            f"{len(description.class_names)}."
        )

    def classify(images: np.ndarray) -> np.ndarray:
        if images.shape[1:3] != (side, side):
            raise ValueError(
                f"images are {images.shape}; the classifier takes {side}x{side} pixels."
            )
        return np.asarray(probabilities(variables, jnp.asarray(images)))

    return classify
