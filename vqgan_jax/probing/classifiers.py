"""Classifiers on disk, and as functions from images to class probabilities.

A classifier is a directory of two files: `classifier.json` says of which model it is and of which
of its features, and `weights.npz` has `classifier/kernel` and `classifier/bias`; of a fine-tuned
transformer, its parameters too, as `transformer/blocks/attention/query/kernel`.
"""

import json
import os
import pathlib
from collections.abc import Callable, Sequence

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from vqgan_jax.data.errors import DataError
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
    if not (directory / FILE).is_file():
        raise DataError(f"{directory} is no classifier: it has no {FILE}.")
    description = json.loads((directory / FILE).read_text())
    loaded = load(description["checkpoint"])
    if loaded.fingerprint != description["fingerprint"]:
        raise DataError(
            f"{directory} is a classifier of another model than is in "
            f"{description['checkpoint']} now."
        )
    with np.load(directory / WEIGHTS) as arrays:
        weights = flax.traverse_util.unflatten_dict(dict(arrays), sep="/")
    model, name, linear = (
        FeatureModel(loaded),
        description["features"],
        Linear(**weights.pop("classifier")),
    )
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

    side = model.config.model.resolution

    def classify(images: np.ndarray) -> np.ndarray:
        if images.shape[1:3] != (side, side):
            raise ValueError(
                f"images are {images.shape}; the classifier takes {side}x{side} pixels."
            )
        return np.asarray(probabilities(variables, jnp.asarray(images)))

    return classify
