"""Eight simulated devices and one compilation cache for all tests."""

import os
import pathlib
import subprocess
import sys
import tempfile

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling takes most of the tests' time. Without optimisation and with the older emitters it takes
# a third of it, and tiny models run fast enough.
_XLA_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
)


def _add_xla_flags(*flags):
    """Adds flags to the environment, unless the compiler does not know one and ends the process."""
    environment = {"XLA_FLAGS": " ".join([os.environ.get("XLA_FLAGS", ""), *flags])}
    program = [sys.executable, "-c", "import jax; jax.devices()"]
    run = subprocess.run(program, env=os.environ | environment, capture_output=True, check=False)
    if run.returncode == 0:
        os.environ.update(environment)
    return run.returncode == 0


# The first process asks for all.
if "PYTEST_XDIST_WORKER" not in os.environ and not _add_xla_flags(*_XLA_FLAGS):
    for flag in _XLA_FLAGS:
        _add_xla_flags(flag)
# Several tests and processes compile the same.
_CACHE = pathlib.Path(tempfile.gettempdir()) / f"vqgan_jax_tests_{os.getuid()}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


# Fixtures that take long to make, each once for all processes.
_RUNS = ("reference_run", "reference_run_in_float64", "transformer_run")


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in its own hook
def pytest_collection_modifyitems(items):
    """Tests with the same long fixture are one worker's: others would wait, or make it again."""
    for item in items:
        if item.get_closest_marker("xdist_group"):
            continue
        found = [name for name in _RUNS if name in item.fixturenames]
        if not found and _of_module(item):
            found = [item.path.stem]
        if found:
            item.add_marker(pytest.mark.xdist_group(found[0]))


def _of_module(item):
    """Whether it has a fixture that its module's tests share."""
    known = item._fixtureinfo.name2fixturedefs
    return any(made[-1].scope == "module" and made[-1].baseid for made in known.values())


@pytest.fixture(scope="session")
def shared_directory(tmp_path_factory):
    """A directory of this test session that all its processes share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def run_inputs(shared_directory):
    """Images and perceptual weights for `tiny_config.py`, which finds them by the environment."""
    import training_runs as runs

    directory = runs.made_once(shared_directory / "inputs", runs.write_inputs)
    with pytest.MonkeyPatch.context() as environment:
        for name, value in runs.inputs_environment(directory).items():
            environment.setenv(name, value)
        yield directory


@pytest.fixture(scope="session")
def reference_run(shared_directory, run_inputs):
    """A run of `tiny_config.py` on one device that nothing interrupted."""
    import training_runs as runs

    return runs.made_once(shared_directory / "reference", runs.run)


@pytest.fixture(scope="session")
def reference_run_in_float64(shared_directory, run_inputs):
    """The same in double precision, which runs on several devices are compared with."""
    import training_runs as runs

    def make(directory):
        runs.run(directory, dtype="float64")

    return runs.made_once(shared_directory / "reference_in_float64", make)


@pytest.fixture(scope="session")
def transformer_inputs(shared_directory):
    """Tokenizer, images and codes for `tiny_transformer_config.py`, by the environment."""
    import training_runs as runs
    import transformer_runs

    directory = shared_directory / "transformer_inputs"
    runs.made_once(directory, transformer_runs.write_inputs)
    with pytest.MonkeyPatch.context() as environment:
        for name, value in transformer_runs.inputs_environment(directory).items():
            environment.setenv(name, value)
        yield transformer_runs.Inputs(directory)


@pytest.fixture(scope="session")
def transformer_run(shared_directory, transformer_inputs):
    """A run of `tiny_transformer_config.py` on one device that nothing interrupted."""
    import training_runs as runs
    import transformer_runs

    def make(directory):
        runs.run(directory, config=transformer_runs.CONFIG)

    return runs.made_once(shared_directory / "transformer_run", make)


@pytest.fixture
def float64():
    """Double precision within the test, in all threads."""
    import jax

    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
