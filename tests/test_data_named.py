import io
import json
import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from vqgan_jax.configuration import tokenizer_config
from vqgan_jax.data.inputs import list_pictures
from vqgan_jax.data.sources import Feature, open_source
from vqgan_jax.errors import DataError, UnreadableImage

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 5, 6, 3)).astype(np.uint8)


class TinyPhotographs(tfds.core.GeneratorBasedBuilder):
    """Stands for any public data set that somebody prepared."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "depth": tfds.features.Image(shape=(None, None, 1)),
            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, pixels in enumerate(PIXELS):
            image, depth = io.BytesIO(), io.BytesIO()
            Image.fromarray(pixels).save(image, "PNG")
            Image.fromarray(pixels[..., 0]).save(depth, "PNG")
            if i == 3:
                image = io.BytesIO(b"damaged")
            image.seek(0)
            depth.seek(0)
            yield i, {"image": image, "depth": depth, "label": int(pixels[0, 0, 0]) % 2}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    TinyPhotographs(data_dir=data_dir).download_and_prepare(file_format="array_record")
    return data_dir


def test_reads_images_and_labels(data_dir):
    source = open_source("tiny_photographs", "train", data_dir)
    assert len(source) == 7 and source.class_names == ("cat", "dog")
    left = {pixels.tobytes(): int(pixels[0, 0, 0]) % 2 for pixels in PIXELS}
    damaged = 0
    for i in range(7):
        try:
            example = pickle.loads(pickle.dumps(source)).read(i)
        except UnreadableImage as error:
            assert f"tiny_photographs train[{i}]" in str(error)
            damaged += 1
        else:
            assert left.pop(example["image"].tobytes()) == example["label"]
    assert damaged == 1 and len(left) == 1
    assert len(open_source("tiny_photographs", "train[:3]", data_dir)) == 3


def test_other_features(data_dir):
    depth = open_source("tiny_photographs", "train", data_dir, "depth")
    labels = open_source("tiny_photographs", "train", data_dir, "depth", label_map=True)
    assert depth.read(0)["image"].shape == (5, 6, 3) and labels.read(0)["image"].shape == (5, 6)
    np.testing.assert_array_equal(depth.read(0)["image"][..., 1], labels.read(0)["image"])
    with pytest.raises(DataError, match="image_key is 'normals', but the images .* depth, image"):
        open_source("tiny_photographs", "train", data_dir, "normals")


def test_features_are_read_beside_the_image(data_dir):
    features = {"depth": Feature.LABEL_MAP}
    source = open_source("tiny_photographs", "train", data_dir, features=features)
    source = pickle.loads(pickle.dumps(source))
    read = 0
    for i in range(7):
        try:
            example = source.read(i)
        except UnreadableImage:
            continue
        np.testing.assert_array_equal(example["features"]["depth"], example["image"][..., 0])
        read += 1
    assert read == 6 and source.describe(2, "depth") == "tiny_photographs train[2] depth"
    with pytest.raises(DataError, match="can be conditions are depth, image; .* no 'normals'"):
        open_source("tiny_photographs", "train", data_dir, features={"normals": Feature.PICTURE})


def test_missing_split_lists_those_there_are(data_dir):
    with pytest.raises(DataError, match="no split 'validation'; it has train"):
        open_source("tiny_photographs", "validation", data_dir)


def test_unknown_name_has_near_matches(data_dir):
    with pytest.raises(DataError, match="'cifr10'.*cifar10"):
        open_source("cifr10", "train", data_dir)
    with pytest.raises(DataError, match="Near it are earth"):
        open_source("eart", "train", data_dir)


def test_unprepared_data_set_gives_the_commands(data_dir):
    with pytest.raises(DataError) as caught:
        open_source("cifar10", "train", data_dir)
    *_, command = str(caught.value).splitlines()
    code = command.partition('-c "')[2].rstrip('"')
    compile(code, "command", "exec")
    assert f"tfds.builder('cifar10', data_dir='{data_dir}')" in code
    assert "file_format='array_record'" in code
    with pytest.raises(DataError, match="downloads/manual.*ILSVRC2012_img_train.tar"):
        open_source("imagenet2012", "train", data_dir)


def test_other_file_format_is_refused(data_dir, tmp_path):
    folder = tmp_path / "copy/tiny_photographs/1.0.0"
    folder.mkdir(parents=True)
    for file in (data_dir / "tiny_photographs/1.0.0").iterdir():
        (folder / file.name.replace("array_record", "tfrecord")).write_bytes(file.read_bytes())
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match="stored as tfrecord.*random access"):
        open_source("tiny_photographs", "train", tmp_path / "copy")


class TinyEvaluated(TinyPhotographs):
    """One with a test split and none for validation, as many are."""

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "test": self._generate_examples()}

    def _generate_examples(self):
        return (example for example in super()._generate_examples() if example[0] != 3)


def test_a_named_data_set_is_reconstructed_by_what_it_holds_out(data_dir, tmp_path, monkeypatch):
    """`reconstruct --dataset=NAME`, of a tokenizer that was trained on something else."""
    monkeypatch.chdir(tmp_path)
    TinyEvaluated(data_dir=data_dir).download_and_prepare(file_format="array_record")
    config = tokenizer_config()
    config.data.update(name="folder:elsewhere", data_dir=str(data_dir))
    config.model.resolution = 16
    pictures = list_pictures(["tiny_evaluated"], config, 1, validation_images=2)
    assert [picture.name for picture in pictures] == ["validation-0000.png", "validation-0001.png"]
    assert all("tiny_evaluated test" in picture.origin for picture in pictures)
    assert pictures[0].read().shape == (16, 16, 3)
    assert config.data.name == "folder:elsewhere"
    for item, words in (
        ("tiny_photographs", "no split 'validation'; it has train"),
        ("./tiny_evaluated", "There is no file or folder"),
        ("no_such", "no data set called 'no_such'"),
    ):
        with pytest.raises(DataError, match=words):
            list_pictures([item], config, 1)
