"""Acceptance-rejection sampling: of the samples of a class, those that a classifier likes best.

"Generating Diverse High-Fidelity Images with VQ-VAE-2" (Razavi et al. 2019) and "Vector-quantized
Image Modeling with Improved VQGAN" (Yu et al. 2022): more samples are drawn than are wanted, a
classifier gives each its probability of the class that it was drawn for, and of each class the
share with the highest is accepted.

Samples that are drawn are candidates; each has a number, and is drawn as the sample of that number
always is. Its PNG carries its score, so that both are on disk or neither is.
"""

import dataclasses
import importlib
import json
import logging
import math
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vqgan_jax.configuration.documents import convert, parse_json, read_bytes
from vqgan_jax.errors import DataError
from vqgan_jax.sample_files import leftovers, path_of, write_atomically

Classifier = Callable[[np.ndarray], np.ndarray]

CANDIDATES = "candidates"  # the folder of what is drawn
SCORES = "scores.json"
_SCORE = "class probability"  # of a candidate's PNG


def find_classifier(name: str) -> Classifier:
    """The function that `MODULE:FUNCTION` names.

    Raises:
        DataError: there is none.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise DataError(f"--classifier is {name!r}; it must be MODULE:FUNCTION.")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module is a program and can raise anything
        reason = " ".join(str(error).split())
        raise DataError(
            f"--classifier: the module {module_name} cannot be imported: "
            f"{type(error).__name__}: {reason}."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise DataError(f"--classifier: the module {module_name} has no function {function_name}.")
    return function


class Rejection:
    """Which candidates are drawn, how they are scored, and which of them are accepted.

    Attributes:
        numbers: `(M,)`, the candidates, ascending. Of each place in the turn of classes there are
            the first ones, so many that of n samples wanted n / acceptance are drawn, rounded up.
        labels: `(M,)`, their classes.
    """

    def __init__(
        self,
        classify: Classifier,
        acceptance: float,
        classes: np.ndarray,
        num_samples: int,
        num_classes: int,
    ) -> None:
        """Of samples whose classes are `classes` in turn, `num_samples` are to be accepted.

        Args:
            classify: takes uint8 images `(B, H, W, 3)` and returns probabilities of the classes,
                `(B, num_classes)`, whose rows sum to 1.
            acceptance: the share of candidates that is accepted, above 0 and at most 1.
            classes: `(L,)`, sample number i is of `classes[i % L]`.
            num_samples: that are accepted, of all classes together.
            num_classes: of the model.

        Raises:
            DataError: there is no such share.
        """
        if not 0.0 < acceptance <= 1.0:
            raise DataError(f"--acceptance is {acceptance}; it must be above 0 and at most 1.")
        self._classify, self._num_classes = classify, num_classes
        self._wanted = classes[np.arange(num_samples) % len(classes)]
        places = range(min(len(classes), num_samples))
        wanted = [len(range(place, num_samples, len(classes))) for place in places]
        # 1e-9: of 3 wanted, a share of 0.3 needs 10 candidates, and 3 / 0.3 is a little more.
        drawn = [math.ceil(count / acceptance - 1e-9) for count in wanted]
        self.numbers = np.sort(
            np.concatenate(
                [
                    place + len(classes) * np.arange(n)
                    for place, n in zip(places, drawn, strict=True)
                ]
            )
        )
        self._classes = classes
        self.labels = self.label_of(self.numbers)

    def label_of(self, numbers: np.ndarray) -> np.ndarray:
        """The classes of candidates by number."""
        return self._classes[numbers % len(self._classes)]

    def scores(self, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Images `(B, H, W, 3)` uint8 and their classes -> their probabilities, `(B,)`.

        Raises:
            DataError: the classifier fails, or returns something else than probabilities of all
                classes.
        """
        try:
            found = np.asarray(self._classify(images), np.float64)
        except Exception as error:  # it is the user's program and can raise anything
            reason = " ".join(str(error).split())
            raise DataError(
                f"--classifier fails on uint8 images of shape {images.shape}: "
                f"{type(error).__name__}: {reason}."
            ) from error
        expected = (len(images), self._num_classes)
        if found.shape != expected:
            raise DataError(
                f"--classifier returns an array of shape {found.shape}; it must be {expected}, of "
                "each image a probability of each of the model's classes."
            )
        sums = found.sum(axis=1)
        if not (np.all(found >= 0.0) and np.allclose(sums, 1.0, atol=1e-2)):
            raise DataError(
                "--classifier must return probabilities: none below 0, and of each image a sum of "
                f"1; it returns values from {found.min():.4g} to {found.max():.4g} with sums from "
                f"{sums.min():.4g} to {sums.max():.4g}. Of logits, return the softmax."
            )
        return found[np.arange(len(images)), labels]

    def accepted(self, scores: np.ndarray) -> np.ndarray:
        """Which candidate becomes each sample, as places in `numbers`: `(num_samples,)`.

        Of every class those with the highest scores, of equal ones the first; they stand in the
        order of their numbers, and the samples' classes are in turn.

        Args:
            scores: `(M,)`, of the candidates.
        """
        chosen = np.empty(len(self._wanted), np.int64)
        for label in np.unique(self._wanted):
            places = np.flatnonzero(self.labels == label)
            samples = np.flatnonzero(self._wanted == label)
            best = places[np.argsort(-scores[places], kind="stable")]
            chosen[samples] = np.sort(best[: len(samples)])
        return chosen


def score_text(score: float) -> PngInfo:
    """What a candidate's PNG carries beside its pixels."""
    info = PngInfo()
    info.add_text(_SCORE, repr(float(score)))
    return info


def stored_scores(paths: Sequence[pathlib.Path]) -> np.ndarray:
    """The scores of candidates, from their PNGs: `(M,)` float64."""
    scores = np.empty(len(paths))
    for i, path in enumerate(paths):
        with Image.open(path) as image:
            scores[i] = float(image.text[_SCORE])
    return scores


@dataclasses.dataclass
class _Summary:
    """What `scores.json` has."""

    accepted: list[int]
    candidates: list[int]
    classes: list[int]
    scores: list[float]


def _read_summary(output: pathlib.Path) -> _Summary:
    file = output / SCORES
    summary = convert(parse_json(read_bytes(file), str(file)), _Summary, str(file))
    known = set(summary.candidates)
    if len(summary.scores) != len(summary.candidates) or not known.issuperset(summary.accepted):
        raise DataError(f"{file} is damaged: its lists do not belong together.")
    return summary


def is_accepted(rejection: Rejection, output: pathlib.Path) -> bool:
    """Whether `accept` has left all samples in `output`."""
    if not (output / SCORES).exists():
        return False
    try:
        summary = _read_summary(output)
    except DataError as error:
        logging.warning("%s It is made again.", error)
        return False
    paths = [path_of(output, index) for index in range(len(summary.accepted))]
    same = summary.candidates == rejection.numbers.tolist()
    return same and all(path.exists() for path in paths)


def accept(rejection: Rejection, output: pathlib.Path) -> dict[str, np.ndarray]:
    """Chooses among the candidates that are drawn, and leaves the accepted ones as the samples.

    `scores.json` has, of all candidates, `candidates` (their numbers), `classes` and `scores`; and
    in `accepted`, the number of the candidate that each sample is. It is there when all samples
    are.

    Returns:
        `candidates` and `scores` of the samples.
    """
    if not is_accepted(rejection, output):
        for path in leftovers(output / CANDIDATES):
            path.unlink()
        drawn = [path_of(output / CANDIDATES, number) for number in rejection.numbers]
        scores = stored_scores(drawn)
        chosen = rejection.accepted(scores)
        (output / SCORES).unlink(missing_ok=True)
        for index, place in enumerate(chosen):
            content, path = drawn[place].read_bytes(), path_of(output, index)
            if not (path.exists() and path.read_bytes() == content):
                write_atomically(path, content)
        index = len(chosen)  # of more samples, accepted before
        while (stale := path_of(output, index)).exists():
            stale.unlink()
            index += 1
        summary = _Summary(
            accepted=rejection.numbers[chosen].tolist(),
            candidates=rejection.numbers.tolist(),
            classes=rejection.labels.tolist(),
            scores=scores.tolist(),
        )
        content = json.dumps(dataclasses.asdict(summary)) + "\n"
        write_atomically(output / SCORES, content.encode())
    summary = _read_summary(output)
    score_of = dict(zip(summary.candidates, summary.scores, strict=True))
    return {
        "candidates": np.array(summary.accepted),
        "scores": np.array([score_of[number] for number in summary.accepted]),
    }
