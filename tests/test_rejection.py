"""Acceptance-rejection sampling: which samples are drawn, which are kept, and a killed command."""

import json
import os
import shutil
import signal
import sys
import time

import numpy as np
import pytest
from PIL import Image

import programs
import small_generator as small
import training_runs as runs
from transformer_runs import assert_one_line, environment_of_processes
from vqgan_jax.errors import DataError
from vqgan_jax.inference.sample import sample
from vqgan_jax.rejection import Rejection, find_classifier

COUNT, CLASSIFIER = 10, "color_classifier:by_mean_color"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    small.write_models(directory)
    return directory


def rejection(acceptance, classes, num_samples):
    return Rejection(None, acceptance, np.asarray(classes), num_samples, 3)


# ---- Which are drawn, and which are kept.


@pytest.mark.parametrize(
    ("acceptance", "classes", "wanted", "numbers"),
    [
        (0.5, [0, 1, 2], 6, range(12)),
        (1.0, [0, 1, 2], 5, range(5)),
        (0.5, [0, 1, 2], 2, [0, 1, 3, 4]),  # of the last class nothing is drawn in vain
        (0.5, [0, 1], 3, [0, 1, 2, 3, 4, 6]),  # of two wanted four, of one wanted two
        (0.3, [2], 3, range(10)),
        (0.25, [1, 1, 0], 4, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 15, 18, 21]),
    ],
)
def test_candidates(acceptance, classes, wanted, numbers):
    found = rejection(acceptance, classes, wanted)
    assert found.numbers.tolist() == list(numbers)
    assert found.labels.tolist() == [classes[number % len(classes)] for number in numbers]


@pytest.mark.parametrize("seed", range(5))
def test_the_best_of_each_class_are_kept(seed):
    random = np.random.default_rng(seed)
    classes, wanted = random.integers(0, 3, random.integers(1, 8)), int(random.integers(1, 40))
    ours = rejection(float(random.uniform(0.1, 1.0)), classes, wanted)
    scores = random.integers(0, 6, len(ours.numbers)) / 5  # many are equal
    chosen = ours.accepted(scores)
    assert len(set(chosen.tolist())) == len(chosen) == wanted
    labels = [classes[i % len(classes)] for i in range(wanted)]
    assert [ours.labels[place] for place in chosen] == labels
    for label in set(labels):
        of_class = [place for place in range(len(scores)) if ours.labels[place] == label]
        ranked = sorted(of_class, key=lambda place: (-scores[place], ours.numbers[place]))
        kept = [int(place) for place in chosen if ours.labels[place] == label]
        assert kept == sorted(ranked[: labels.count(label)])


@pytest.mark.parametrize("acceptance", [0.0, -0.5, 1.5])
def test_a_share_is_above_0_and_at_most_1(acceptance):
    with pytest.raises(DataError, match="--acceptance is"):
        rejection(acceptance, [0], 1)


# ---- The command.


def pictures(folder):
    found = {}
    for path in sorted(folder.glob("*.png")):
        if path.stem.isdecimal():
            with Image.open(path) as image:
                found[int(path.stem)] = np.asarray(image)
    return found


@pytest.fixture(scope="module")
def sampled(models, tmp_path_factory):
    output = tmp_path_factory.mktemp("rejection") / "output"
    draw(models, output)
    return output


def draw(models, output, count=COUNT, formats=("png", "grid", "npz"), **options):
    options = dict(classifier=CLASSIFIER, acceptance=0.5) | options
    sample(str(models / "transformer"), output, count, formats=formats, batch_size=1, **options)


def test_kept_are_exactly_the_best_scored(models, sampled, tmp_path):
    candidates, kept = pictures(sampled / "candidates"), pictures(sampled)
    # Four of class 0 are wanted, so eight are drawn; of the others three and six.
    assert sorted(candidates) == [*range(18), 18, 21]
    score = {}
    for number, image in candidates.items():
        powers = np.exp(np.asarray(image, np.float64).mean(axis=(0, 1)) / 64)
        score[number] = powers[number % 3] / powers.sum()
    expected = [None] * COUNT
    for label in range(3):
        slots = [i for i in range(COUNT) if i % 3 == label]
        best = sorted((n for n in score if n % 3 == label), key=lambda n: -score[n])
        for slot, number in zip(slots, sorted(best[: len(slots)]), strict=True):
            expected[slot] = number
    assert sorted(kept) == list(range(COUNT))
    for slot, number in enumerate(expected):
        np.testing.assert_array_equal(kept[slot], candidates[number])
    summary = json.loads((sampled / "scores.json").read_text())
    assert summary["accepted"] == expected and summary["candidates"] == sorted(candidates)
    np.testing.assert_allclose(summary["scores"], [score[n] for n in sorted(score)], rtol=1e-6)
    assert summary["classes"] == [n % 3 for n in sorted(candidates)]
    with np.load(sampled / "samples.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], np.stack([kept[i] for i in range(COUNT)]))
        np.testing.assert_array_equal(arrays["labels"], np.arange(COUNT) % 3)
        np.testing.assert_array_equal(arrays["candidates"], expected)
        np.testing.assert_allclose(arrays["scores"], [score[n] for n in expected], rtol=1e-6)
    settings = json.loads((sampled / "settings.json").read_text())
    assert (settings["classifier"], settings["acceptance"]) == (CLASSIFIER, 0.5)

    # Candidates are the samples of these numbers as they are drawn without a classifier.
    sample(str(models / "transformer"), tmp_path / "all", 24, formats=["png"], batch_size=1)
    plain = pictures(tmp_path / "all")
    for number, image in candidates.items():
        assert np.abs(plain[number].astype(int) - image).max() <= 1


def test_what_is_there_stays_and_what_is_missing_is_made(models, sampled, tmp_path, capsys):
    before = runs.fingerprint(sampled)
    times = {path: path.stat().st_mtime_ns for path in sampled.rglob("*.png")}
    (sampled / "candidates" / "000005.png").unlink()
    (sampled / "000002.png").unlink()
    draw(models, sampled)
    after = runs.fingerprint(sampled)
    assert before.pop("samples.npz") and after.pop("samples.npz") and after == before
    made = ("000005.png", "000002.png", "grid.png")
    assert all(p.stat().st_mtime_ns == t for p, t in times.items() if p.name not in made)
    # With all samples there, nothing is drawn, though the candidates are gone.
    for path in (sampled / "candidates").iterdir():
        path.rename(tmp_path / path.name)
    capsys.readouterr()
    draw(models, sampled)
    assert "a second." not in capsys.readouterr().out
    for path in tmp_path.glob("*.png"):
        path.rename(sampled / "candidates" / path.name)
    assert runs.fingerprint(sampled).keys() == before.keys() | {"samples.npz"}


@pytest.mark.parametrize("name", ["scores.json", "samples.npz"])
def test_damaged_results_are_made_again(models, sampled, tmp_path, name):
    output = tmp_path / "output"
    shutil.copytree(sampled, output)
    whole = (output / name).read_bytes()
    for content in (b"", b"[]", b"{}", whole[: len(whole) // 2]):
        (output / name).write_bytes(content)
        draw(models, output)
        with np.load(output / "samples.npz") as ours, np.load(sampled / "samples.npz") as theirs:
            assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
        assert (output / "scores.json").read_bytes() == (sampled / "scores.json").read_bytes()


@pytest.mark.slow
def test_fewer_samples_leave_none_that_were_accepted_before(models, sampled, tmp_path):
    output = tmp_path / "output"
    shutil.copytree(sampled, output)
    draw(models, output, count=4)
    kept = pictures(output)
    assert sorted(kept) == [0, 1, 2, 3]
    draw(models, tmp_path / "fresh", count=4)
    for number, image in pictures(tmp_path / "fresh").items():
        np.testing.assert_array_equal(kept[number], image)


@pytest.mark.slow
def test_arrays_alone(models, sampled, tmp_path):
    draw(models, tmp_path / "output", formats=("npz",))
    names = {path.name for path in (tmp_path / "output").iterdir()}
    assert names == {"samples.npz", "scores.json", "settings.json"}
    with np.load(tmp_path / "output" / "samples.npz") as a, np.load(sampled / "samples.npz") as b:
        assert set(a) == set(b) and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_killed_command_keeps_what_it_has(models, sampled, tmp_path):
    output = tmp_path / "output"
    command = [sys.executable, "-m", "vqgan_jax.sample", f"--output={output}", "--batch_size=1"]
    command += [f"--checkpoint={models / 'transformer'}", f"--num_samples={COUNT}"]
    command += [f"--classifier={CLASSIFIER}", "--acceptance=0.5", "--format=png,grid,npz"]
    environment = environment_of_processes(8)
    environment["PYTHONPATH"] += os.pathsep + os.path.dirname(__file__)
    process = programs.Program(command, env=environment)
    end = time.monotonic() + runs.TIMEOUT
    while len(list(output.glob("candidates/0*.png"))) < 3:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    runs.finish(process)
    assert not (output / "scores.json").exists()
    made = {path: path.stat().st_mtime_ns for path in output.glob("candidates/0*.png")}
    draw(models, output)
    assert all(path.stat().st_mtime_ns == written for path, written in made.items())
    ours, theirs = runs.fingerprint(output), runs.fingerprint(sampled)
    assert ours.pop("samples.npz") and theirs.pop("samples.npz") and ours == theirs


def test_wrong_classifiers_and_other_settings_are_named(models, sampled, tmp_path):
    before = runs.fingerprint(sampled)
    for options, words in (
        ({"acceptance": 0.25}, "was begun with acceptance 0.5, and this is 0.25"),
        ({"classifier": "", "acceptance": None}, "was begun with classifier 'color_classifier:by"),
    ):
        with pytest.raises(DataError) as error:
            draw(models, sampled, **options)
        assert words in assert_one_line(error)
    assert runs.fingerprint(sampled) == before
    for options, words in (
        ({"classifier": "color_classifier"}, "it must be MODULE:FUNCTION"),
        (
            {"classifier": "no_such_module:f"},
            "the module no_such_module cannot be imported: Module",
        ),
        ({"classifier": "color_classifier:f"}, "color_classifier has no function f"),
        ({"classifier": "color_classifier:logits"}, "Of logits, return the softmax"),
        ({"classifier": "color_classifier:of_two_classes"}, "of shape (1, 2); it must be (1, 3)"),
        ({"classifier": "color_classifier:that_fails"}, "TypeError: grey images only."),
        ({"acceptance": 0.0}, "--acceptance is 0.0; it must be above 0"),
        ({"classifier": "", "acceptance": 0.5}, "is of the samples that --classifier chooses"),
    ):
        with pytest.raises(DataError) as error:
            draw(models, tmp_path / "new", **options)
        assert words in assert_one_line(error)
        assert not (tmp_path / "new").exists()
    assert callable(find_classifier(CLASSIFIER))
