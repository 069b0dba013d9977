import dataclasses

import numpy as np
import pytest

from vqgan_jax.conditions.layout_files import parse_layout, read_layout
from vqgan_jax.conditions.layout_pictures import draw_layout
from vqgan_jax.conditions.layouts import ATTRIBUTES, Layout, LayoutEncoding, SceneObject
from vqgan_jax.errors import DataError

SCENE = (
    SceneObject(16, (0.1, 0.2, 0.3, 0.4), frozenset({"group"})),
    SceneObject(0, (0.5, 0.0, 0.5, 1.0), frozenset({"occluded", "inside"})),
    SceneObject(299, (0.62, 0.55, 0.08, 0.1), frozenset(ATTRIBUTES)),
    SceneObject(7, (0.0, 0.9, 0.05, 0.05), frozenset({"depiction"})),  # outside of the crop
)
CROP = (0.25, 0.125, 0.5, 0.75)
PAD = 8191
# What the reference gives for SCENE and CROP with 5 objects: places, crop tokens, flip -> tokens.
REFERENCE = {
    ("boxes", True, False): [
        *(316, 1629, 4806, 3000, 44, 8099, 4799, 4465, 5282, *[PAD] * 6, 1012, 7087)
    ],
    ("boxes", True, True): [
        *(316, 1673, 4850, 3000, 0, 8054, 4799, 4437, 5254, *[PAD] * 6, 1012, 7087)
    ],
    ("boxes", False, False): [316, 810, 5093, 3000, 44, 8099, 4799, 4566, 5660, *[PAD] * 6],
    ("boxes", False, True): [316, 846, 5129, 3000, 0, 8054, 4799, 4509, 5603, *[PAD] * 6],
    ("centers", True, False): [316, 3262, 3000, 4027, 4799, 4829, *[PAD] * 4, 1012, 7087],
    ("centers", True, True): [316, 3307, 3000, 3982, 4799, 4800, *[PAD] * 4, 1012, 7087],
    ("centers", False, False): [316, 2997, 3000, 4027, 4799, 5113, *[PAD] * 4],
    ("centers", False, True): [316, 3032, 3000, 3982, 4799, 5056, *[PAD] * 4],
}
ENCODING = LayoutEncoding(300, max_objects=5, attributes=ATTRIBUTES)


@pytest.mark.parametrize(("places", "with_crop", "flip"), REFERENCE)
def test_tokens_equal_those_of_the_reference(places, with_crop, flip):
    encoding = dataclasses.replace(ENCODING, places=places, with_crop=with_crop)
    tokens = encoding.encode(Layout(SCENE, CROP), flip=flip)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == REFERENCE[places, with_crop, flip]


def test_every_window_is_a_crop_of_its_own():
    """Windows of 4x3 codes in an image of 6x5, which is the lower half of the scene."""
    half = (0.0, 0.5, 1.0, 0.5)
    windows = ENCODING.encode_windows(Layout(SCENE, half), (6, 5), (4, 3))
    assert windows.shape == (3, 3, ENCODING.length) and windows.dtype == np.int32
    for top, left in np.ndindex(3, 3):
        crop = (left / 5, 0.5 + top / 12, 3 / 5, 4 / 12)
        np.testing.assert_array_equal(windows[top, left], ENCODING.encode(Layout(SCENE, crop)))
    seen = [(windows[top, 0] == 1207).any() for top in range(3)]  # an object below row 0.9
    assert seen == [False, True, True]
    whole = ENCODING.encode_windows(Layout(SCENE, CROP), (4, 3), (4, 3))
    np.testing.assert_array_equal(whole[0, 0], REFERENCE["boxes", True, False])


@pytest.mark.parametrize("with_crop", [True, False])
@pytest.mark.parametrize("places", ["boxes", "centers"])
def test_stored_tokens_are_shuffled_as_encoding_shuffles(places, with_crop):
    encoding = dataclasses.replace(ENCODING, places=places, with_crop=with_crop)
    layouts = [Layout(SCENE), Layout(SCENE[:2]), Layout(()), Layout((*SCENE, SCENE[0]))]
    tokens = np.stack([encoding.encode(layout) for layout in layouts])
    keys = np.random.default_rng(0).random((4, 5))
    shuffled = encoding.shuffled(tokens, keys)
    assert shuffled.dtype == np.int32 and np.any(shuffled != tokens)
    for layout, row, own in zip(layouts, shuffled, keys, strict=True):
        order = np.argsort(own[: len(layout.objects)])
        expected = Layout(tuple(layout.objects[i] for i in order))
        np.testing.assert_array_equal(row, encoding.encode(expected))


def test_attributes_that_are_not_encoded_are_left_out():
    encoding = dataclasses.replace(ENCODING, attributes=("group",))
    assert encoding.encode(Layout(SCENE)).tolist() == [
        *(316, 1629, 4806, 0, 44, 8099, 599, 4465, 5282, 7, 7200, 7654, PAD, PAD, PAD, 0, 8099)
    ]


def test_lengths_are_the_references():
    assert LayoutEncoding(183).length == 92
    assert LayoutEncoding(183, "centers").length == 62
    assert LayoutEncoding(183, with_crop=False).length == 90
    assert LayoutEncoding(183).sections == 90


def test_shuffling_moves_objects_whole_and_depends_on_the_generator_alone():
    layout = Layout(SCENE)
    first = ENCODING.encode(layout, np.random.default_rng(1))
    np.testing.assert_array_equal(first, ENCODING.encode(layout, np.random.default_rng(1)))
    straight = ENCODING.encode(layout)
    rng = np.random.default_rng(0)
    orders = {tuple(ENCODING.encode(layout, rng)[:12:3].tolist()) for _ in range(300)}
    assert len(orders) == 24  # all orders of four objects
    triples = {tuple(triple) for triple in straight[:-2].reshape(-1, 3).tolist()}
    assert {tuple(triple) for triple in first[:-2].reshape(-1, 3).tolist()} == triples
    assert first[-2:].tolist() == straight[-2:].tolist()


@pytest.mark.parametrize("places", ["boxes", "centers"])
def test_decoding_gives_the_layout_up_to_half_a_section(places):
    encoding = dataclasses.replace(ENCODING, places=places)
    layout = encoding.decode(encoding.encode(Layout(SCENE, CROP)))
    half = 0.5 / 89 + 1e-9
    assert len(layout.objects) == 3
    for found, true in zip(layout.objects, SCENE, strict=False):
        assert (found.label, found.attributes) == (true.label, true.attributes)
        x, y, width, height = true.box
        corners = np.array([x, y, x + width, y + height])
        if places == "centers":
            corners = np.tile([x + width / 2, y + height / 2], 2)
        found_corners = np.array(found.box) + np.array([0, 0, *found.box[:2]])
        assert np.abs(found_corners - corners).max() <= half
    np.testing.assert_allclose(layout.crop, CROP, atol=2 * half)
    if places == "boxes":
        np.testing.assert_array_equal(encoding.encode(layout), REFERENCE["boxes", True, False])


def layout_of(box, *attributes):
    return Layout((SceneObject(0, box, frozenset(attributes)),))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LayoutEncoding(512, attributes=ATTRIBUTES), "need the tokens 0 to 8191"),
        (lambda: LayoutEncoding(80, "points"), "boxes"),
        (lambda: LayoutEncoding(80, attributes=("truncated",)), "'truncated'"),
        (lambda: LayoutEncoding(0), "at least 1 class"),
        (lambda: ENCODING.encode(Layout(SCENE + SCENE)), "8 objects.*places for 5"),
        (lambda: LayoutEncoding(16).encode(Layout(SCENE)), "label 16.*0 to 15"),
        (lambda: ENCODING.decode(np.zeros(16, int)), r"\(17,\), not \(16,\)"),
        (lambda: ENCODING.decode(np.full(17, 8150)), "8150 is no place"),
        (lambda: ENCODING.decode(np.arange(17)[::-1]), "not the upper left"),
        (lambda: ENCODING.check(layout_of((1.5, 0, 0.5, 0.5))), "object 0 is not within the scene"),
        (lambda: ENCODING.check(layout_of((-0.3, 0, 0.5, 0.5))), "is not within the scene"),
        (lambda: ENCODING.check(layout_of((0.1, 0.1, 0.5, 0.0))), "is not within the scene"),
        (
            lambda: dataclasses.replace(ENCODING, attributes=()).check(
                layout_of((0, 0, 1, 1), "group")
            ),
            "has the attribute group, which the model does not know; it knows none",
        ),
        (
            lambda: dataclasses.replace(ENCODING, attributes=()).decode(np.full(17, 300)),
            "300 is no class",
        ),
    ],
)
def test_impossible_encodings_layouts_and_tokens_are_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


NAMES = ("person", "dog", "cat")
SMALL = LayoutEncoding(3, max_objects=2, attributes=("group", "occluded"))


def test_a_layout_file_is_read(tmp_path):
    path = tmp_path / "layout.json"
    path.write_text(
        '{"objects": [{"class": "dog", "box": [0.1, 0.4, 0.3, 0.5], "occluded": true},'
        ' {"class": 2, "box": [0.5, 0, 0.5, 1], "group": false}], "crop": [0, 0.5, 0.5, 0.5]}'
    )
    assert read_layout(path, SMALL, NAMES) == Layout(
        (
            SceneObject(1, (0.1, 0.4, 0.3, 0.5), frozenset({"occluded"})),
            SceneObject(2, (0.5, 0.0, 0.5, 1.0)),
        ),
        (0.0, 0.5, 0.5, 0.5),
    )
    listed = parse_layout('[{"class": 2, "box": [0.1, 0, 0.9, 1]}]', SMALL)
    assert listed == Layout((SceneObject(2, (0.1, 0.0, 0.9, 1.0)),))


def objects(**changes):
    entry = {"class": '"dog"', "box": "[0.1, 0.4, 0.3, 0.5]"} | changes
    return "[{" + ", ".join(f'"{key}": {value}' for key, value in entry.items()) + "}]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{]", "not JSON: .*line 1 column 3"),
        ("[" * 100_000, "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        ('"dog"', "a list of objects"),
        ('{"boxes": []}', "a list of objects"),
        ('{"objects": [], "size": 3}', "The layout has 'size'"),
        ('["dog"]', r'objects\[0\] must be \{"class"'),
        (objects(box="[0.8, 0.1, 0.3, 0.5]"), r"objects\[0\]: the box .* leaves the frame"),
        (objects(box="[-0.1, 0.1, 0.3, 0.5]"), "leaves the frame"),
        (objects(box="[10, 40, 120, 200]"), "leaves the frame"),
        (objects(box="[0.1, NaN, 0.3, 0.5]"), "which JSON does not have"),
        (objects(box="[0.1, 0.1, 0.3, 0]"), "has no area"),
        (objects(box='[0.1, 0.1, "0.3", 0]'), "four numbers"),
        (objects(box="[0.1, 0.1, 0.3]"), "four numbers"),
        (objects(**{"class": '"dgo"'}), "no class 'dgo'; is 'dog' meant"),
        (objects(**{"class": "3"}), "the class 3 is outside of the numbers from 0 to 2"),
        (objects(**{"class": "true"}), "a name or a number, not true"),
        (objects(inside="true"), "has 'inside'; known here are class, box, group, occluded"),
        (objects(group="1"), "'group' must be true or false"),
        ("[" + ", ".join([objects()[1:-1]] * 3) + "]", "3 objects; the model takes at most 2"),
        ('{"objects": [], "crop": [0, 0, 2, 1]}', "crop: the box .* leaves the frame"),
    ],
)
def test_wrong_layouts_are_errors_in_one_line(text, message):
    with pytest.raises(DataError, match=message) as caught:
        parse_layout(text, SMALL, NAMES)
    assert "\n" not in str(caught.value)


def test_errors_name_the_file(tmp_path):
    with pytest.raises(DataError, match=r"missing\.json cannot be read: No such file"):
        read_layout(tmp_path / "missing.json", SMALL)
    (tmp_path / "named.json").write_text(objects())
    with pytest.raises(DataError, match=r"named\.json: objects\[0\]: .*number from 0 to 2"):
        read_layout(tmp_path / "named.json", SMALL)


def test_boxes_are_drawn_where_they_are():
    layout = Layout((SceneObject(1, (0.25, 0.5, 0.5, 0.25)),))
    picture = draw_layout(layout, 65, 129)
    assert (picture.shape, picture.dtype) == ((65, 129, 3), np.uint8)
    color = picture[32, 32]
    assert not np.array_equal(color, [255, 255, 255])
    for row, column in [(32, 96), (48, 32), (48, 96), (40, 32), (40, 96), (48, 64)]:
        np.testing.assert_array_equal(picture[row, column], color)
    drawn = np.argwhere((picture != 255).any(axis=-1))
    assert drawn.min(axis=0).tolist() == [32, 32] and drawn[:, 1].max() == 96
    assert (picture[33:48, 33:50] < 100).all(axis=-1).any()  # the label, black

    again = draw_layout(dataclasses.replace(layout, objects=layout.objects * 2), 65, 129)
    np.testing.assert_array_equal(again[48], picture[48])


def test_labels_attributes_centres_and_crops_show_in_the_picture():
    def drawn(layout):
        return draw_layout(layout, 128, 128, NAMES)

    box = (0.1, 0.1, 0.6, 0.6)
    plain = drawn(Layout((SceneObject(1, box),)))
    with_group = drawn(Layout((SceneObject(1, box, frozenset({"group"})),)))
    assert (plain != with_group).any()
    assert (plain != drawn(Layout((SceneObject(0, box),)))).any()

    encoding = LayoutEncoding(3, "centers", max_objects=2)
    centres = encoding.decode(encoding.encode(Layout((SceneObject(1, box),), CROP)))
    disc = drawn(centres)
    np.testing.assert_array_equal(disc[51, 51], plain[13, 13])  # the colour of the class
    left, top = (round(share * 127) for share in centres.crop[:2])
    assert disc[top, left].tolist() == [64, 64, 64]
