"""The command, on folders as people have them; figures against scikit-image on what it wrote."""

import json
import pathlib
import resource
import sys
from pathlib import PurePath

import numpy as np
import pytest
from PIL import Image
from skimage import data as skimage_data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import programs
import tiny
import vqgan_jax
from vqgan_jax.data.inputs import crop_to_multiple, unique_names
from vqgan_jax.errors import DataError
from vqgan_jax.inference.reconstruct import overview, reconstruct, without_infinity
from vqgan_jax.training.checkpoints import write_export
from vqgan_jax.training.pictures import label_colors


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """LPIPS weights in the published format: (path, sha256)."""
    path = tmp_path_factory.mktemp("weights") / "alexnet.ckpt"
    return path, tiny.write_weights(path, tiny.published_tree("alexnet"))


@pytest.fixture(scope="module")
def export(tmp_path_factory, weights):
    """An untrained tokenizer."""
    config = tiny.config_of_tiny_model()
    network = config.loss.perceptual_network
    network.backbone, network.path, network.sha256 = "alexnet", str(weights[0]), weights[1]
    path = tmp_path_factory.mktemp("exports") / "tiny"
    write_export(path, config, tiny.initial_variables(config))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five images of two sizes that the factor does not divide, two of one name, two unusable."""
    folder = tmp_path_factory.mktemp("photos")
    colour = skimage_data.astronaut()
    (folder / "deeper" / "still").mkdir(parents=True)
    Image.fromarray(colour[:41, :33]).save(folder / "a.png")
    Image.fromarray(colour[50:91, :33]).save(folder / "a.jpg", quality=95)
    Image.fromarray(colour[:40, 40:73]).convert("L").save(folder / "deeper" / "grid.png")
    Image.fromarray(colour[:37, 40:89]).convert("P").save(folder / "deeper" / "still" / "p.PNG")
    transparent = np.dstack([colour[60:97, :49], np.arange(37 * 49).reshape(37, 49) % 256])
    Image.fromarray(transparent.astype(np.uint8)).save(folder / "grid.png")
    content = (folder / "a.png").read_bytes()
    (folder / "broken.png").write_bytes(content[: len(content) // 2])
    Image.fromarray(colour[:12, :40]).save(folder / "tiny.png")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def written(export, folder, tmp_path_factory):
    """The output directory of one run over the folder, and what the command returned."""
    output = tmp_path_factory.mktemp("outputs") / "seen"
    return output, reconstruct(str(export), [str(folder)], output, batch_size=2)


def halves(path):
    pair = np.asarray(Image.open(path))
    middle = pair.shape[1] // 2
    return pair[:, :middle], pair[:, middle:]


def test_every_readable_picture_is_written_under_its_name(written, folder):
    output, summary = written
    pictures = {path.relative_to(output).as_posix() for path in output.rglob("*.png")}
    names = {"a.png", "a-2.png", "deeper/grid.png", "deeper/still/p.png", "grid-2.png"}
    assert pictures == names | {"grid.png"}
    assert {entry["name"] for entry in summary["pictures"]} == names
    inputs = {entry["name"]: entry["input"] for entry in summary["pictures"]}
    assert inputs["a.png"] == str(folder / "a.jpg") and inputs["a-2.png"] == str(folder / "a.png")
    assert [line.split(" ")[0] for line in summary["skipped"]] == [
        str(folder / "broken.png"),
        str(folder / "tiny.png"),
    ]
    assert "40 x 12 pixels" in summary["skipped"][1]


@pytest.mark.slow
def test_left_half_is_the_centre_of_the_input(written, folder):
    left, right = halves(written[0] / "a-2.png")
    np.testing.assert_array_equal(left, skimage_data.astronaut()[:40, :32])
    assert right.shape == left.shape and np.abs(right.astype(int) - left).mean() > 10


def test_figures_are_those_of_scikit_image_on_the_files(written):
    output, _ = written
    stored = json.loads((output / "metrics.json").read_text())
    assert stored["images"] == 5 and stored["lpips_network"] == "alexnet"
    for entry in stored["pictures"]:
        left, right = halves(output / entry["name"])
        assert left.shape == (entry["height"], entry["width"], 3)
        psnr = peak_signal_noise_ratio(left, right, data_range=255)
        ssim = structural_similarity(
            left,
            right,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
        )
        np.testing.assert_allclose(entry["psnr"], psnr, rtol=1e-4)
        np.testing.assert_allclose(entry["ssim"], ssim, atol=1e-4)
        assert 0 < entry["lpips"] < 10
    for name, mean in stored["means"].items():
        np.testing.assert_allclose(mean, np.mean([entry[name] for entry in stored["pictures"]]))
    assert stored["means"].keys() == {"psnr", "ssim", "lpips"}


@pytest.mark.slow
def test_codebook_figures_do_not_count_padding(written, export):
    """Five pictures go in batches of two, so one batch is padded."""
    tokenizer = vqgan_jax.load(export)
    counts = np.zeros(32)
    for entry in written[1]["pictures"]:
        left, _ = halves(written[0] / entry["name"])
        codes = tokenizer.encode(left[None] / np.float32(127.5) - 1)
        counts += np.bincount(np.asarray(codes).ravel(), minlength=32)
    frequencies = counts[counts > 0] / counts.sum()
    perplexity = np.exp(-np.sum(frequencies * np.log(frequencies)))
    np.testing.assert_allclose(written[1]["codebook_usage"], np.mean(counts > 0), rtol=1e-6)
    np.testing.assert_allclose(written[1]["codebook_perplexity"], perplexity, rtol=1e-4)


def test_output_in_use_stays_as_it_is(export, folder, tmp_path):
    (tmp_path / "a.png").write_text("mine")
    with pytest.raises(DataError, match="not empty; choose another --output"):
        reconstruct(str(export), [str(folder)], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_text() == "mine"


@pytest.mark.slow
def test_resize_scales_the_shorter_side(export, folder, tmp_path):
    files = [str(folder / "tiny.png"), str(folder / "a.png")]
    summary = reconstruct(str(export), files, tmp_path / "out", resize=33)
    sizes = [(entry["height"], entry["width"]) for entry in summary["pictures"]]
    assert sizes == [(32, 110), (40, 32)] and summary["skipped"] == []


def test_nothing_to_reconstruct_is_an_error_and_writes_nothing(export, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="There are no images in .*empty"):
        reconstruct(str(export), [str(tmp_path / "empty")], tmp_path / "out")
    with pytest.raises(DataError, match="There is no file or folder .*missing"):
        reconstruct(str(export), [str(tmp_path / "missing")], tmp_path / "out")
    with pytest.raises(DataError, match="None of the 1 images"):
        reconstruct(str(export), [str(folder / "broken.png")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_pictures_too_large_for_the_memory_are_an_error_and_nothing_is_written(
    export, folder, tmp_path
):
    """One map of 6144 x 6144 positions and 32 channels takes 4.5 GiB, and 3 GiB are left."""
    Image.new("L", (6144, 6144)).save(tmp_path / "large.png")
    files = [str(folder / "a.png"), str(tmp_path / "large.png")]
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 3 * 2**30, before[1]))
    try:
        with pytest.raises(DataError, match="1 images of 6144 x 6144 pixels.*--batch_size or"):
            reconstruct(str(export), files, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert not (tmp_path / "out").exists()


def test_without_perceptual_weights_the_other_figures_remain(tmp_path, folder, capsys):
    config = tiny.config_of_tiny_model()
    config.loss.perceptual_network.path = str(tmp_path / "nowhere.ckpt")
    write_export(tmp_path / "export", config, tiny.initial_variables(config))
    files = [str(folder / "a.png")]
    summary = reconstruct(str(tmp_path / "export"), files, tmp_path / "out")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "nowhere.ckpt" in warnings[0]
    assert summary["means"].keys() == {"psnr", "ssim"} and summary["lpips_network"] is None


@pytest.mark.slow
def test_validation_split_of_the_run_itself(tmp_path, weights):
    images = tmp_path / "data" / "validation"
    images.mkdir(parents=True)
    (tmp_path / "data" / "train").mkdir()
    for i in range(3):
        Image.fromarray(skimage_data.astronaut()[40 * i :][:40, :50]).save(images / f"{i}.png")
    config = tiny.config_of_tiny_model()
    config.data.name = f"folder:{tmp_path / 'data'}"
    network = config.loss.perceptual_network
    network.backbone, network.path, network.sha256 = "alexnet", str(weights[0]), weights[1]
    write_export(tmp_path / "export", config, tiny.initial_variables(config))
    output = tmp_path / "out"
    summary = reconstruct(str(tmp_path / "export"), ["validation"], output, validation_images=2)
    names = [entry["name"] for entry in summary["pictures"]]
    assert names == ["validation-0000.png", "validation-0001.png"]
    assert halves(output / names[0])[0].shape == (32, 32, 3)  # the config's resolution


@pytest.mark.slow
def test_label_maps_come_back_in_colours_with_their_accuracy(tmp_path):
    config = tiny.config_of_tiny_model()
    config.model.in_channels = config.model.out_channels = config.data.num_labels = 5
    config.loss.binary_cross_entropy = 1.0
    write_export(tmp_path / "export", config, tiny.initial_variables(config))
    labels = np.random.default_rng(0).integers(0, 5, (2, 10, 13)).astype(np.uint8)
    (tmp_path / "maps").mkdir()
    for i, label_map in enumerate(labels):
        Image.fromarray(label_map).save(tmp_path / "maps" / f"{i}.png")
    Image.fromarray(labels[0] + 1).save(tmp_path / "maps" / "beyond.png")
    Image.fromarray(np.zeros((10, 13, 3), np.uint8)).save(tmp_path / "maps" / "colour.png")
    output = tmp_path / "out"
    summary = reconstruct(str(tmp_path / "export"), [str(tmp_path / "maps")], output)
    assert [entry["name"] for entry in summary["pictures"]] == ["0.png", "1.png"]
    assert "label 5; the tokenizer knows 0 to 4" in summary["skipped"][0]
    assert "no label map" in summary["skipped"][1]
    for label_map, entry in zip(labels, summary["pictures"], strict=True):
        left, right = halves(output / entry["name"])
        np.testing.assert_array_equal(left, label_colors(5)[label_map[:, :12]])
        accuracy = np.mean(np.all(left == right, axis=-1))
        np.testing.assert_allclose(entry["pixel_accuracy"], accuracy, rtol=1e-6)
    assert summary["means"].keys() == {"pixel_accuracy"}


def test_command_line(export, folder, tmp_path):
    command = [sys.executable, "-m", "vqgan_jax.reconstruct", f"--checkpoint={export}"]

    def run(*arguments):
        return programs.run([*command, *arguments], timeout=300)

    good = run(
        f"--dataset={folder / 'a.png'},{folder / 'broken.png'}", f"--output={tmp_path / 'out'}"
    )
    assert good.returncode == 0, good.stderr
    assert "skipped: " in good.stderr and "broken.png" in good.stderr
    assert "mean of 1" in good.stdout and "Traceback" not in good.stderr
    bad = run(f"--dataset={folder / 'broken.png'}", f"--output={tmp_path / 'other'}")
    assert bad.returncode == 1 and "Traceback" not in bad.stderr
    assert bad.stderr.splitlines()[-1].startswith("error: None of the 1 images")


def test_perfect_reconstruction_is_null_in_json():
    summary = {"means": {"psnr": float("inf")}, "pictures": [{"psnr": float("inf"), "ssim": 1.0}]}
    assert without_infinity(summary) == {
        "means": {"psnr": None},
        "pictures": [{"psnr": None, "ssim": 1.0}],
    }


def test_names_are_unique_where_letters_differ_only_in_case():
    paths = [PurePath(p) for p in ("A.jpg", "a.png", "a.tif", "b/a.png", "a-2.png", "grid.jpg")]
    names = unique_names(paths, reserved=["grid.png"])
    assert names == ["A.png", "a-2.png", "a-3.png", "b/a.png", "a-2-2.png", "grid-2.png"]


@pytest.mark.parametrize("factor", [1, 4, 16])
def test_crop_takes_the_centre(factor):
    image = np.arange(35 * 52).reshape(35, 52)
    cropped = crop_to_multiple(image, factor)
    height, width = cropped.shape
    assert height % factor == width % factor == 0
    assert 35 - height < factor and 52 - width < factor
    top, left = divmod(cropped[0, 0], 52)
    assert abs(top - (35 - height - top)) <= 1 and abs(left - (52 - width - left)) <= 1


def test_overview_of_pictures_of_different_sizes():
    pairs = [
        Image.new("RGB", size, "black") for size in [(20, 10), (8, 16), (20, 16), (2, 2), (4, 4)]
    ]
    grid = np.asarray(overview(pairs))
    assert grid.shape == (2 * 18 - 2, 4 * 22 - 2, 3)
    assert (grid == 0).all(-1).sum() == 200 + 128 + 320 + 4 + 16
    assert (grid[3:13, :20] == 0).all() and (grid[:3, :20] == 255).all()
