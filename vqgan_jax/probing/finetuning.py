"""Fine-tuning for recognition: a transformer up to a block with a linear classifier behind it.

All weights learn, from where a trained model and a linear classifier of its features are, after
"Generative Pretraining from Pixels" (Chen et al. 2020). The tokenizer stays as it is.
"""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vqgan_jax.data.pipeline import training_batches
from vqgan_jax.probing.classifiers import finetuned_features
from vqgan_jax.probing.features import (
    FeatureModel,
    labelled_batches,
    rows_of_devices,
    whole_batches,
)
from vqgan_jax.probing.linear import Linear


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        steps: updates.
        batch_size: images an update.
        learning_rate: the peak, reached after a tenth of the steps; then half a cosine to 0.
        weight_decay: of matrices, decoupled.
        seed: of the order of images, their crops and flips, and of dropout.
    """

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    seed: int = 0


def finetune(model: FeatureModel, block: int, linear: Linear, split: str, schedule: Schedule):
    """The parameters up to a block and the classifier, after training on a split's images.

    Args:
        model: of a transformer.
        block: the last one that is kept, from 1.
        linear: a classifier of the features behind it, to begin from.
        split: of the data set; images without a class do not count.
        schedule: how long and how fast.

    Returns:
        `(params of FeatureModel.up_to, Linear)`.

    Raises:
        DataError: the data cannot be used.
    """
    config = model.config.copy_and_resolve_references()
    config.seed, config.data.train_split = schedule.seed, split
    config.training.batch_size = whole_batches(schedule.batch_size)
    rows, whole = rows_of_devices()
    warmup = max(1, schedule.steps // 10)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, schedule.learning_rate, warmup, max(schedule.steps, warmup + 1)
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, weight_decay=schedule.weight_decay, mask=kernels),
    )
    features = finetuned_features(model, block)

    def loss(learned, tokenizer, raw, labels, key):
        variables = {"tokenizer": tokenizer, "transformer": learned["transformer"]}
        logits = learned["classifier"](features(variables, raw, key))
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(
            logits, jnp.maximum(labels, 0)
        )
        return jnp.sum(losses * (labels >= 0)) / jnp.maximum(jnp.sum(labels >= 0), 1)

    @jax.jit(donate_argnums=(0, 1))
    def update(learned, state, tokenizer, raw, labels, step):
        key = jax.random.fold_in(jax.random.key(schedule.seed), step)
        value, gradients = jax.value_and_grad(loss)(learned, tokenizer, raw, labels, key)
        updates, state = optimizer.update(gradients, state, learned)
        return optax.apply_updates(learned, updates), state, value

    learned = {"transformer": model.up_to(block)[1], "classifier": linear}
    learned = jax.tree.map(jnp.array, jax.device_put(learned, whole))  # copies, to be donated
    state = optimizer.init(learned)
    tokenizer = jax.device_put(model.variables["tokenizer"], whole)
    batches = training_batches(config, rows)
    with contextlib.closing(batches):
        for step in range(schedule.steps):
            batch = next(batches)
            learned, state, value = update(
                learned, state, tokenizer, batch["image"], batch["label"], step
            )
            if (step + 1) % max(1, schedule.steps // 10) == 0:
                print(f"step {step + 1}/{schedule.steps}  loss {value:.4f}", flush=True)
    return learned["transformer"], learned["classifier"]


def kernels(params):
    """True for matrices; not for embeddings, norms and biases."""
    return jax.tree.map_with_path(
        lambda path, _: jax.tree_util.keystr(path[-1:]).strip("[].'\"") == "kernel", params
    )


def finetuned_accuracy(
    model: FeatureModel, block: int, params, linear: Linear, split: str, batch_size: int, limit: int
) -> float:
    """The share of a split's images with a class whose most probable class is theirs."""
    features = finetuned_features(model, block)
    predict = jax.jit(lambda variables, raw: jnp.argmax(linear(features(variables, raw)), axis=-1))
    _, whole = rows_of_devices()
    variables = {"tokenizer": model.variables["tokenizer"], "transformer": params}
    variables = jax.device_put(variables, whole)
    right, total = 0, 0
    for raw, labels in labelled_batches(model.config, split, batch_size, limit):
        found = np.asarray(predict(variables, raw))
        right += int(np.sum((found == labels) & (labels >= 0)))
        total += int(np.sum(labels >= 0))
    return right / total
