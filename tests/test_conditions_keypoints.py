"""Keypoints: the files that people and detectors write, and skeletons beside cropped images."""

import json

import numpy as np
import pytest
from PIL import Image

from vqgan_jax.conditions.keypoint_files import parse_keypoints, read_keypoints
from vqgan_jax.conditions.skeletons import LIMBS, draw_people, draw_skeleton, mirror_people
from vqgan_jax.configuration import tokenizer_config
from vqgan_jax.data.condition_sources import ConditionImage
from vqgan_jax.data.pipeline import open_reader
from vqgan_jax.data.transforms import Transform
from vqgan_jax.errors import DataError

SKELETON = ConditionImage("pose", "keypoints", derive="skeleton")
# Someone who faces us: nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles, of each
# pair the left one first, which is on the right for us. The left arm is raised.
COCO = [
    *([30, 10], [32, 8], [28, 8], [34, 9], [26, 9], [37, 18], [23, 18], [46, 12], [20, 27]),
    *([50, 4], [18, 36], [35, 38], [25, 38], [36, 48], [24, 48], [37, 58], [23, 58]),
]
COCO = np.array([[x, y, 2] for x, y in COCO], np.float64)
OPENPOSE = np.array(
    [
        *([30, 10, 0.9], [30, 18, 0.9], [23, 18, 0.9], [20, 27, 0.9], [18, 36, 0.9]),
        *([37, 18, 0.9], [46, 12, 0.9], [50, 4, 0.9], [25, 38, 0.9], [24, 48, 0.9]),
        *([23, 58, 0.9], [35, 38, 0.9], [36, 48, 0.9], [37, 58, 0.9], [28, 8, 0.9]),
        *([32, 8, 0.9], [26, 9, 0.9], [34, 9, 0.9]),
    ]
)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (COCO.tolist(), [COCO]),
        ({"keypoints": COCO.tolist()}, [COCO]),
        ({"keypoints": COCO.ravel().tolist(), "num_keypoints": 17, "category_id": 1}, [COCO]),
        (
            [{"keypoints": COCO.ravel().tolist()}, {"keypoints": (COCO + 1).tolist()}],
            [COCO, COCO + 1],
        ),
        (
            {"version": 1.3, "people": [{"pose_keypoints_2d": OPENPOSE.ravel().tolist()}] * 2},
            [OPENPOSE, OPENPOSE],
        ),
        ({"people": []}, []),
        ([], []),
    ],
)
def test_all_forms_are_read(content, expected, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    people = read_keypoints(path)
    assert people.dtype == np.float64 and people.shape[0] == len(expected)
    for found, own in zip(people, expected, strict=True):
        np.testing.assert_array_equal(found, own)
    assert draw_people(people, 64, 64).any() == bool(expected)


FLAT = json.dumps(COCO.ravel().tolist())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("7", r"Keypoints are \[\[x, y, visible\], ...\]"),
        ('{"poses": []}', "here 'keypoints' is missing"),
        ('{"people": [{"keypoints": []}]}', "here 'pose_keypoints_2d' is missing"),
        ('{"keypoints": [1, 2, 3, 4]}', r"people\[0\]: keypoints are x, y, visible of each"),
        ('[[1, 2, 3], [1, 2, "4"]]', r"people\[0\]: keypoints are x, y, visible of each"),
        ("[[1, 2, 3], [1, 2, true]]", "keypoints are x, y, visible"),
        (f"[[1, 2, 3], [1, 2, 1{'0' * 400}]]", "keypoints are x, y, visible"),
        ('{"keypoints": 3}', "not 3"),
        ("[[1, 2, 3]]", r"people\[0\] has 1 keypoints; 17, as COCO"),
        (f'[{{"keypoints": {FLAT}}}, {{"keypoints": {json.dumps([0] * 75)}}}]', "has 25 keypoints"),
        (f'[{{"keypoints": {FLAT}}}, {{"keypoints": {json.dumps([0] * 54)}}}]', "others 18"),
        ('{"keypoints": [NaN, 2, 1' + ", 0" * 48 + "]}", "which JSON does not have"),
    ],
)
def test_what_is_wrong_is_one_line(text, message, tmp_path):
    with pytest.raises(DataError, match=message) as error:
        parse_keypoints(text)
    assert "\n" not in str(error.value)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=f"{tmp_path}/a.json: "):
        read_keypoints(tmp_path / "a.json")


def colors_of_sides(picture):
    """The colours of all pixels that are no disc, in the left half and in the right half."""
    halves = picture[:, :30], picture[:, 31:]
    sets = ({tuple(color) for color in half.reshape(-1, 3).tolist()} for half in halves)
    return [colors - {(0, 0, 0), (255, 255, 255)} for colors in sets]


@pytest.mark.parametrize(("keypoints", "wrist"), [(COCO, 9), (OPENPOSE, 7)])
def test_a_mirrored_person_has_the_colours_of_a_person(keypoints, wrist):
    """Limbs of one side have other colours than their pairs, and stay on their side for us."""
    people = keypoints[None]
    mirrored = mirror_people(people, 61)
    picture, mirror = draw_people(people, 64, 61), draw_people(mirrored, 64, 61)
    # As a detector would find it: the raised arm is the right one.
    other = {9: 10, 7: 4}[wrist]
    np.testing.assert_array_equal(mirrored[0, other, :2], (60 - 50, 4))
    np.testing.assert_array_equal(mirror_people(mirrored, 61), people)
    left, right = colors_of_sides(picture)
    assert len(left - right) > 4 and len(right - left) > 4
    assert colors_of_sides(mirror) == [left, right]
    shape = (picture != 0).any(axis=-1)
    assert np.mean((mirror != 0).any(axis=-1) != shape[:, ::-1]) < 0.03
    assert np.any(mirror != picture[:, ::-1])


def test_later_people_lie_over_earlier_ones():
    limbs, two = LIMBS["coco"], np.stack([COCO, COCO + [3, 2, 0]])
    first, second = (draw_skeleton(person, limbs, 64, 61) for person in two)
    covered = second.any(axis=-1, keepdims=True)
    np.testing.assert_array_equal(draw_people(two, 64, 61), np.where(covered, second, first))
    with pytest.raises(ValueError, match=r"\(P, 17, 3\), .* not \(2, 16, 3\)"):
        draw_people(two[:, 1:], 64, 61)


def write(root, height, width, keypoints):
    for folder in (root / "train", root / "keypoints" / "train"):
        folder.mkdir(parents=True)
    Image.new("RGB", (width, height)).save(root / "train" / "a.png")
    (root / "keypoints" / "train" / "a.json").write_text(json.dumps(keypoints.tolist()))


def reader(root, transform, condition=SKELETON):
    config = tokenizer_config()
    config.data.update(name=f"folder:{root}")
    return open_reader(config.data, "train", transform, [condition])


def test_skeletons_follow_the_crop_and_the_mirroring(tmp_path):
    """Images of 128 x 120 pixels, of which the shorter side becomes 60, and then 48 x 48."""
    write(tmp_path, 128, 120, COCO * (2, 2, 1) + (0.5, 0.5, 0))
    transform = Transform(48, 60, random_crop=True, random_flip=True)
    read, flips = reader(tmp_path, transform), set()
    assert read.blank()["pose"].shape == (48, 48, 3)
    for seed in range(12):
        place = transform.place(128, 120, np.random.default_rng(seed))
        found = read.exactly(0, np.random.default_rng(seed))["pose"]
        # Half the size: the middle between two pixels becomes the centre of one.
        person = COCO - (place.left, place.top, 0)
        if place.flipped:
            person = mirror_people(person[None], 48)[0]
        np.testing.assert_array_equal(found, draw_skeleton(person, LIMBS["coco"], 48, 48))
        flips.add(place.flipped)
    assert flips == {True, False}


def test_wrong_files_of_a_data_set_are_named(tmp_path):
    write(tmp_path, 64, 61, COCO[1:])
    path = tmp_path / "keypoints" / "train" / "a.json"
    with pytest.raises(DataError, match=rf"{path}: people\[0\] has 16 keypoints; 17"):
        reader(tmp_path, Transform(48, 60)).exactly(0)
    labels = ConditionImage("pose", "keypoints", num_labels=3, derive="skeleton")
    with pytest.raises(DataError, match="here the tokenizer is one of label maps"):
        reader(tmp_path, Transform(48, 60), labels)
    path.unlink()
    with pytest.raises(DataError, match="a.png has no JSON file of the feature 'keypoints'; it wo"):
        reader(tmp_path, Transform(48, 60))
