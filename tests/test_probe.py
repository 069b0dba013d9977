"""Features of trained models, linear classifiers of them, fine-tuning, and the `probe` command."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import small_generator as small
import vqgan_jax
from vqgan_jax.errors import DataError
from vqgan_jax.probing import linear
from vqgan_jax.probing.chart import depth_chart
from vqgan_jax.probing.classifiers import finetuned_features, load_classifier
from vqgan_jax.probing.features import FeatureModel, no_condition
from vqgan_jax.probing.probe import Data, Finetuning, grouped, probe


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    small.write_models(directory)
    return directory


@pytest.fixture(scope="module")
def generator(models):
    return vqgan_jax.load(models / "transformer")


def raw_images(count=3):
    return np.random.default_rng(5).integers(0, 256, (count, 16, 16, 3), np.uint8)


# ---- Linear classifiers, against Newton's method in NumPy.


def newton(features, labels, decay, classes):
    """The minimum of mean cross-entropy + decay / 2 |W|^2; biases are not decayed."""
    count, width = features.shape
    inputs = np.concatenate([features, np.ones((count, 1))], axis=1)
    penalty = np.repeat(decay * np.append(np.ones(width), 0.0), classes)
    targets = np.eye(classes)[labels]
    weights = np.zeros((width + 1) * classes)

    def value_of(weights):
        logits = inputs @ weights.reshape(-1, classes)
        logs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        return -np.mean(logs[np.arange(count), labels]) + 0.5 * penalty @ weights**2, np.exp(logs)

    for _ in range(60):
        value, shares = value_of(weights)
        gradient = (inputs.T @ (shares - targets)).ravel() / count + penalty * weights
        hessian = np.diag(penalty)
        for x, share in zip(inputs, shares, strict=True):
            hessian = (
                hessian + np.kron(np.outer(x, x), np.diag(share) - np.outer(share, share)) / count
            )
        step, size = np.linalg.pinv(hessian) @ gradient, 1.0
        while value_of(weights - size * step)[0] > value + 1e-15 and size > 1e-6:
            size /= 2
        weights = weights - size * step
    return weights.reshape(-1, classes)[:-1], weights.reshape(-1, classes)[-1]


def small_problem():
    """Two sets of features of 60 examples: in one classes are far apart, in the other close."""
    random = np.random.default_rng(0)
    labels = random.permutation(np.arange(60) % 3)
    centres = random.standard_normal((3, 4))
    noise = random.standard_normal((60, 4))
    sets = [3.0 * centres[labels] + noise, 0.7 * centres[labels] + noise]
    return np.stack(sets) * [1.0, 10.0, 0.1, 3.0] + [5.0, 0.0, -1.0, 2.0], labels


def test_classifiers_are_the_optimum_that_newtons_method_finds():
    features, labels = small_problem()
    fitted = linear.fit_classifiers(features.astype(np.float32), labels, 3)
    accuracies = []
    for i, own in enumerate(features):
        mean, scale = own.mean(axis=0), own.std(axis=0)
        standard = (own - mean) / scale
        last = np.arange(60) % linear.HOLD_OUT == linear.HOLD_OUT - 1
        judged = []
        for decay in linear.DECAYS:
            kernel, bias = newton(standard[~last], labels[~last], decay, 3)
            right = np.argmax(standard[last] @ kernel + bias, axis=1) == labels[last]
            judged.append((right.mean(), decay))
        decay = max(judged)[1]
        assert fitted.decay[i] == pytest.approx(decay)
        kernel, bias = newton(standard, labels, decay, 3)
        expected = standard @ kernel + bias
        found = own @ np.asarray(fitted.linear.kernel[i]) + np.asarray(fitted.linear.bias[i])
        np.testing.assert_allclose(found, expected, atol=0.01 * np.abs(expected).max())
        accuracies.append(np.mean(np.argmax(expected, axis=1) == labels))
    np.testing.assert_allclose(fitted.accuracy, accuracies)
    assert accuracies[0] > 0.9 > accuracies[1] > 0.5


@pytest.mark.slow
def test_rows_in_pieces_and_constant_features(monkeypatch):
    """Pieces of 8 rows, of which the last has padding, give what one piece gives."""
    features, labels = small_problem()
    features = np.concatenate([features, np.full((2, 60, 1), 7.0)], axis=2).astype(np.float32)
    features, labels = features[:, :57], labels[:57]
    whole = linear.fit_classifiers(features, labels, 3)
    monkeypatch.setattr(linear, "ROWS", 8)
    jax.clear_caches()
    pieces = linear.fit_classifiers(features, labels, 3)
    np.testing.assert_array_equal(whole.decay, pieces.decay)
    for i in range(2):
        a, b = (features[i] @ f.linear.kernel[i] + f.linear.bias[i] for f in (whole, pieces))
        np.testing.assert_allclose(a, b, atol=0.01 * float(np.abs(a).max()))
    assert not np.any(np.asarray(whole.linear.kernel)[:, -1])


# ---- Features.


def test_features_of_blocks_are_means_of_what_each_block_gives(generator):
    """As the module itself gives them, when it has no more blocks."""
    model, raw = FeatureModel(generator), raw_images()
    found = jax.jit(model.features, static_argnums=0)(model.names, model.variables, raw)
    for block in (1, 2):
        _, params = model.up_to(block)
        variables = {"tokenizer": model.variables["tokenizer"], "transformer": params}
        expected = jax.jit(finetuned_features(model, block))(variables, raw)
        np.testing.assert_allclose(found[f"block {block}"], expected, rtol=1e-4, atol=1e-5)
    codes = np.asarray(generator.tokenizer.encode(raw / np.float32(127.5) - 1)).reshape(3, 16)
    params = generator.params
    table, positions = params["code_embedding"]["embedding"], params["grid_positions"]
    places = np.arange(15)
    tokens = (
        table[codes[:, :15]] + positions["rows"][places // 4] + positions["columns"][places % 4]
    )
    np.testing.assert_allclose(found["block 0"], np.mean(tokens, axis=1), atol=1e-5)
    assert found["encoder"].shape == (3, 32) and found["latents"].shape == (3, 8)
    pixels = raw.reshape(3, -1) / np.float32(127.5) - 1
    np.testing.assert_allclose(found["pixels"], pixels, atol=1e-5)


@pytest.mark.slow
def test_no_condition_is_known(generator):
    """In front stands the row of the table after those of the classes."""
    np.testing.assert_array_equal(no_condition(generator.config), [3])
    config = generator.config.copy_and_resolve_references()
    config.condition.own_table, config.condition.num_classes = False, small.CODEBOOK
    with pytest.raises(DataError, match="no token for an image without its condition class"):
        no_condition(config)


def test_groups_fit_into_memory():
    sizes = {"pixels": 50, "block 0": 16, "block 1": 16, "block 2": 16}
    assert grouped(sizes, 1000) == [("pixels", "block 0", "block 1", "block 2")]
    assert grouped(sizes, 32) == [("pixels",), ("block 0", "block 1"), ("block 2",)]
    assert len(grouped(sizes, 1)) == 4


# ---- The command.


@pytest.fixture(scope="module")
def probed(models, tmp_path_factory):
    """All features, with block 2 fine-tuned in another run."""
    output = tmp_path_factory.mktemp("probe")
    data = Data(batch_size=8)
    results = probe(str(models / "transformer"), output / "all", data=data)
    options = Finetuning(epochs=15, batch_size=8, learning_rate=3e-3)
    finetuned = probe(
        str(models / "transformer"), output / "two", "2", data=data, finetuning=options
    )
    return output, results, finetuned


def held_out(models):
    images, labels = [], []
    for path in sorted((models / "images" / "validation").rglob("*.png")):
        images.append(np.asarray(Image.open(path)))
        labels.append(small.CLASSES.index(path.parent.name))
    return np.stack(images), np.array(labels)


@pytest.mark.slow
def test_results_of_all_features(models, probed):
    output, results, _ = probed
    assert json.loads((output / "all" / "probe.json").read_text()) == results
    names = [row["features"] for row in results["features"]]
    assert names == ["pixels", "encoder", "latents", "block 0", "block 1", "block 2"]
    assert (results["train_images"], results["validation_images"]) == (60, 24)
    assert results["commonest_class"] == pytest.approx(1 / 3)
    found = {row["features"]: row["accuracy"] for row in results["features"]}
    assert found["encoder"] > 0.6  # classes are colours
    with Image.open(output / "all" / "probe.png") as chart:
        assert len(np.unique(np.asarray(chart).reshape(-1, 3), axis=0)) > 3
    images, labels = held_out(models)
    best = max(found.values())
    probabilities = load_classifier(output / "all" / "classifier")(images)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-5)
    assert np.mean(probabilities.argmax(axis=1) == labels) == pytest.approx(best)


@pytest.mark.slow
def test_finetuned_weights_are_those_on_disk(models, generator, probed):
    output, results, finetuned = probed
    linear_row = {row["features"]: row for row in results["features"]}["block 2"]
    assert finetuned["features"] == [linear_row]
    images, labels = held_out(models)
    probabilities = load_classifier(output / "two" / "finetuned")(images)
    accuracy = np.mean(probabilities.argmax(axis=1) == labels)
    assert accuracy == pytest.approx(finetuned["finetuned"]["accuracy"])
    with np.load(output / "two" / "finetuned" / "weights.npz") as weights:
        before = generator.params["blocks"]["attention"]["query"]["kernel"]
        moved = weights["transformer/blocks/attention/query/kernel"] - np.asarray(before)
        assert np.all(np.abs(moved).max(axis=(1, 2)) > 1e-4)
        np.testing.assert_array_equal(
            [name for name in weights if "/head/" in name or "norm_out" in name], []
        )
    before = load_classifier(output / "two" / "classifier")(images)
    assert np.abs(before - probabilities).max() > 1e-3
    # Of the training images it has learned more than the linear classifier could.
    paths = sorted((models / "images" / "train").rglob("*.png"))
    train = np.stack([np.asarray(Image.open(path)) for path in paths])
    own = np.array([small.CLASSES.index(path.parent.name) for path in paths])
    losses = [
        -np.mean(np.log(load_classifier(output / "two" / name)(train)[np.arange(60), own]))
        for name in ("classifier", "finetuned")
    ]
    assert losses[1] < losses[0]


@pytest.mark.slow
def test_what_cannot_be_probed_is_told_in_one_line(models, probed, tmp_path):
    plain, one = tmp_path / "plain", tmp_path / "one"
    for folder in (plain, one / "class"):
        folder.mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (16, 16), (i, i, i)).save(folder / f"{i}.png")
    transformer, tokenizer = str(models / "transformer"), str(models / "tokenizer")
    for checkpoint, block, data, finetuning, words in (
        (transformer, "3", Data(), None, "has the blocks 1 to 2"),
        (transformer, "-1", Data(), None, "--block is -1"),
        (tokenizer, "1", Data(), None, "is a tokenizer, which has the features pixels"),
        (tokenizer, "all", Data(), Finetuning(), "--finetune needs a transformer"),
        (transformer, "1", Data(images=5), Finetuning(), "--finetune trains on the whole split"),
        (
            transformer,
            "all",
            Data(),
            Finetuning(),
            "--finetune needs a transformer and the --block",
        ),
        (transformer, "all", Data(dataset=f"folder:{plain}"), None, "have no classes"),
        (transformer, "all", Data(dataset=f"folder:{one}"), None, "has one class, class"),
        (transformer, "all", Data(train_split="trian"), None, "no split 'trian'"),
        (transformer, "all", Data(images=3), None, "has 3 labelled images in the split train"),
    ):
        with pytest.raises(DataError) as error:
            probe(checkpoint, tmp_path / "new", block, data, finetuning=finetuning)
        assert words in str(error.value) and "\n" not in str(error.value)
        assert not (tmp_path / "new").exists()
    with pytest.raises(DataError, match="is not empty; choose another --output"):
        probe(transformer, probed[0] / "all")
    with pytest.raises(DataError, match="is no classifier: it has no classifier.json"):
        load_classifier(tmp_path)


@pytest.mark.slow
def test_a_tokenizer_has_features_too(models, probed, tmp_path):
    results = probe(str(models / "tokenizer"), tmp_path / "new", data=Data(batch_size=8))
    of_transformer = {row["features"]: row for row in probed[1]["features"]}
    assert results["features"] == [of_transformer[n] for n in ("pixels", "encoder", "latents")]
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"probe.json", "classifier"}


def test_higher_accuracy_is_drawn_higher():
    chart = np.asarray(depth_chart("title", [(0, 0.2), (1, 0.6), (2, 0.4)], {"pixels": 0.3}))
    blue = (chart == [0x1F, 0x5F, 0xA8]).all(axis=-1)
    columns = np.flatnonzero(blue.any(axis=0))
    heights = [
        np.flatnonzero(blue[:, c]).mean()
        for c in np.linspace(columns[4], columns[-5], 3, dtype=int)
    ]
    assert heights[1] < heights[2] < heights[0]
    assert jnp.isfinite(jnp.asarray(heights)).all()
