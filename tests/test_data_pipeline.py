import itertools
import logging
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image

from vqgan_jax.configuration import tokenizer_config
from vqgan_jax.data.elements import ReadTransformed, RowsOfBatches, spaced_indices, training_order
from vqgan_jax.data.pipeline import (
    evaluation_batches,
    evaluation_images,
    rows_of_devices,
    training_batches,
)
from vqgan_jax.data.sources import open_source
from vqgan_jax.data.transforms import training_transform
from vqgan_jax.errors import DataError

COUNT = 120


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Folder of images whose red is their number and whose other channels tell the place."""
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(COUNT):
        write(folder / f"{number % 3}/{number:03d}.png", number)
    return folder


def write(path, number):
    path.parent.mkdir(exist_ok=True)
    pixels = np.zeros((12, 14, 3), np.uint8)
    pixels[..., 0] = number
    pixels[..., 1:] = np.moveaxis(np.indices((12, 14)), 0, -1)
    Image.fromarray(pixels).save(path)


def make_config(folder, **data):
    config = tokenizer_config()
    config.model.resolution = 8
    config.training.batch_size = 8
    config.seed = 3
    config.data.update(
        {"name": f"folder:{folder}", "train_split": "all", "validation_split": "all"}
        | {"resize": -1, "threads": 2}
        | data
    )
    return config


def make_sharding(data=1, fsdp=1, tensor=1):
    devices = jax.devices()[: data * fsdp * tensor]
    mesh = jax.make_mesh(
        (data, fsdp, tensor),
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 3,
        devices=devices,
    )
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def take(config, count, sharding=None, start_step=0):
    batches = training_batches(config, sharding or make_sharding(), start_step)
    taken = [jax.tree.map(np.asarray, batch) for batch in itertools.islice(batches, count)]
    batches.close()
    return taken


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert len(one) == len(other)


def numbers(batches):
    return np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches])


def test_batches_have_the_sharding_and_types(photographs):
    sharding = make_sharding(2, 2, 2)
    batches = training_batches(make_config(photographs), sharding)
    batch = next(batches)
    batches.close()
    assert batch["image"].shape == (8, 8, 8, 3) and batch["image"].dtype == np.uint8
    assert batch["label"].shape == (8,) and batch["label"].dtype == np.int32
    assert all(array.sharding.is_equivalent_to(sharding, array.ndim) for array in batch.values())
    assert batch["image"].addressable_shards[0].data.shape == (2, 8, 8, 3)
    np.testing.assert_array_equal(batch["label"], np.asarray(batch["image"])[:, 0, 0, 0] % 3)


def test_every_pass_has_every_image_once_in_its_own_order(photographs):
    seen = numbers(take(make_config(photographs), 2 * COUNT // 8)).reshape(2, COUNT)
    np.testing.assert_array_equal(np.sort(seen), np.tile(np.arange(COUNT), (2, 1)))
    assert np.mean(seen[0] == seen[1]) < 0.1 and np.mean(np.diff(seen[0].astype(int)) == 1) < 0.1


def test_augmentation_changes_from_pass_to_pass(photographs):
    batches = take(make_config(photographs), 10 * COUNT // 8)
    views = [
        (int(image[0, 0, 0]), int(image[0, :, 2].min()), int(image[0, 0, 1]), image[0, 0, 2] < 6)
        for batch in batches
        for image in batch["image"]
    ]
    lefts, tops, _ = zip(*(view[1:] for view in views), strict=True)
    assert set(lefts) == set(range(7)) and set(tops) == set(range(5))
    first_image = {view for view in views if view[0] == views[0][0]}
    assert len(first_image) > 5
    mirrored = [image[0, 0, 2] > image[0, 1, 2] for batch in batches for image in batch["image"]]
    assert 0.44 < np.mean(mirrored) < 0.56


def test_a_batch_depends_on_seed_and_step_alone(photographs):
    config = make_config(photographs)
    whole = take(config, 20)
    for start in (1, 13, 17):  # within the first pass, and beyond its 15 batches
        assert_same(take(config, 3, start_step=start), whole[start : start + 3])
    config.seed = 4
    assert (numbers(take(config, 3)) != numbers(whole[:3])).any()


@pytest.mark.parametrize("axes", [(4, 1, 1), (2, 4, 1), (1, 2, 4)])
def test_devices_do_not_change_a_batch(photographs, axes):
    config = make_config(photographs)
    assert_same(
        take(config, 3, make_sharding(*axes), start_step=14), take(config, 3, start_step=14)
    )


def test_worker_processes_do_not_change_a_batch(photographs):
    config = make_config(photographs)
    expected = take(config, 5, start_step=13)
    config.data.processes = 2
    assert_same(take(config, 5, make_sharding(4), start_step=13), expected)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_read_disjoint_rows_that_make_the_same_batch(photographs, hosts):
    config = make_config(photographs)
    sharding = make_sharding(2, 4)
    parts = sharding.devices_indices_map((8,))
    source = open_source(config.data.name, "all")
    order = training_order(ReadTransformed(source, training_transform(config, 8)), config.seed)
    assembled = np.zeros((2, 8, 8, 8, 3), np.uint8)
    rows_read = []
    for host in range(hosts):
        # Devices of a host that are no neighbours in the mesh, as on a torus.
        held = [parts[device] for device in sharding.mesh.devices.flat[host::hosts]]
        rows = rows_of_devices(held, 8)
        rows_read += rows.tolist()
        elements = RowsOfBatches(order, rows, 8, start_step=14)
        for i in range(2 * len(rows)):
            assembled[i // len(rows), rows[i % len(rows)]] = elements[i]["image"]
    assert sorted(rows_read) == list(range(8))
    np.testing.assert_array_equal(
        assembled, [batch["image"] for batch in take(config, 2, start_step=14)]
    )


def test_replicated_rows_are_read_once():
    parts = [(slice(4, 8),), (slice(0, 2),), (slice(4, 8),), (slice(None, 2, None),)]
    assert rows_of_devices(parts, 16).tolist() == [0, 1, 4, 5, 6, 7]


@pytest.mark.parametrize("limit", [0, 13])
def test_evaluation_has_every_image_once_in_order(photographs, limit):
    (batches_list, masks) = ([], [])
    batches = evaluation_batches(make_config(photographs), make_sharding(4), 32, limit)
    for batch, mask in batches:
        assert batch["image"].shape == (32, 8, 8, 3) and mask.dtype == np.float32
        batches_list.append(jax.tree.map(np.asarray, batch))
        masks.append(np.asarray(mask))
    batches.close()
    mask = np.concatenate(masks)
    paths_in_order = sorted(range(COUNT), key=lambda number: (number % 3, number))
    expected = np.array(paths_in_order)[spaced_indices(COUNT, limit)]
    assert len(mask) == (128 if limit == 0 else 32) and mask.sum() == len(expected)
    np.testing.assert_array_equal(numbers(batches_list)[mask == 1], expected)
    image = batches_list[0]["image"][0]  # the centre crop of 12 x 14, not mirrored
    assert image[0, 0].tolist() == [0, 2, 3] and image[-1, -1].tolist() == [0, 9, 10]


def test_evaluation_images_are_spread_over_the_split(photographs):
    images = evaluation_images(make_config(photographs), 6)
    assert images.dtype == np.uint8 and images.shape == (6, 8, 8, 3)
    assert images[:, 0, 0, 0].tolist() == [0, 60, 1, 61, 2, 62]
    assert len(evaluation_images(make_config(photographs), 1000)) == COUNT


def test_label_maps(tmp_path):
    for number in range(4):
        labels = np.full((12, 14), number, np.uint8)
        Image.fromarray(labels).save(tmp_path / f"{number}.png")
    config = make_config(tmp_path, num_labels=4)
    (batch,) = take(config, 1)
    assert batch["image"].shape == (8, 8, 8) and set(batch["image"].ravel()) == {0, 1, 2, 3}
    config.data.num_labels = 3
    with pytest.raises(DataError, match=r"3.png has the label 3, but .*num_labels=3 allows 0 to 2"):
        take(config, 1)


@pytest.mark.parametrize("processes", [0, 1])
def test_damaged_images_are_replaced_and_named_once(tmp_path, caplog, processes):
    for number in range(COUNT):
        write(tmp_path / f"{number:03d}.png", number)
    (tmp_path / "057.png").write_bytes(b"damaged")
    config = make_config(tmp_path, processes=processes)
    with caplog.at_level(logging.WARNING):
        seen = numbers(take(config, 2 * COUNT // 8)).reshape(2, COUNT)
    expected = np.sort(np.where(np.arange(COUNT) == 57, 58, np.arange(COUNT)))
    np.testing.assert_array_equal(np.sort(seen), [expected, expected])
    warnings = [r.getMessage() for r in caplog.records if r.name.startswith("vqgan_jax")]
    assert len(warnings) == 1 and "057.png cannot be decoded: it is not an image" in warnings[0]


def test_damage_in_evaluation_is_masked(tmp_path):
    for number in range(COUNT):
        write(tmp_path / f"{number:03d}.png", number)
    (tmp_path / "119.png").write_bytes(b"damaged")
    batches = evaluation_batches(make_config(tmp_path), make_sharding(), COUNT)
    ((batch, mask),) = batches
    batches.close()
    assert np.asarray(mask).tolist() == [1] * 119 + [0]
    assert numbers([jax.tree.map(np.asarray, batch)])[:119].tolist() == list(range(119))
    assert evaluation_images(make_config(tmp_path), COUNT)[-1, 0, 0, 0] == 0  # goes round


@pytest.mark.parametrize("processes", [0, 1])
@pytest.mark.parametrize("damaged", [(3, 90), tuple(range(COUNT))])
def test_too_many_damaged_images_stop_the_run(tmp_path, processes, damaged):
    for number in range(COUNT):
        write(tmp_path / f"{number:03d}.png", number)
    for number in damaged:
        (tmp_path / f"{number:03d}.png").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"2 images or more of 120 are damaged.*\.png.*\.png"):
        take(make_config(tmp_path, processes=processes), COUNT // 8)


def test_images_below_the_crop_are_named(photographs):
    config = make_config(photographs)
    config.model.resolution = 16
    with pytest.raises(DataError, match=r"\.png: 14 x 12 pixels are too few for a crop of 16"):
        take(config, 1)


def test_close_ends_the_threads(photographs):
    before = set(threading.enumerate())
    take(make_config(photographs), 2)
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=20)
        assert not thread.is_alive()


def test_a_program_that_forgets_to_close_still_ends(photographs, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import jax\n"
        "from jax.sharding import AxisType, NamedSharding, PartitionSpec\n"
        "from vqgan_jax.configuration import tokenizer_config\n"
        "from vqgan_jax.data.pipeline import training_batches\n"
        "mesh = jax.make_mesh((1,), ('data',), axis_types=(AxisType.Auto,))\n"
        "config = tokenizer_config()\n"
        f"config.data.name = 'folder:{photographs}'\n"
        "config.model.resolution = 8\n"
        "batches = training_batches(config, NamedSharding(mesh, PartitionSpec('data')))\n"
        "print(next(batches)['image'].shape)\n"
    )
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0 and result.stdout == "(12, 8, 8, 3)\n"
    assert result.stderr == ""
