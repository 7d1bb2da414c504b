"""The real objective at a size that trains in seconds, and a command that trains it: tiny_run.py WORKDIR STEPS."""

from __future__ import annotations

import importlib.util
import pathlib
import sys

from flax import nnx
from ml_collections import ConfigDict

from helpers.tiny_model import TINY_VAE
from sora_jax.checkpoints.bundle import save_bundle
from sora_jax.checkpoints.components import Bundle
from sora_jax.models.vae import VAE, VAEConfig
from sora_jax.train.__main__ import run


def tiny_config(folder: pathlib.Path, steps: int) -> ConfigDict:
    """configs/toyworld_dit.py with tiny parts; `folder` gets the autoencoder that it needs, and latents."""
    path = pathlib.Path(__file__).parents[2] / "configs" / "toyworld_dit.py"
    spec = importlib.util.spec_from_file_location("toyworld_dit", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    if not (folder / "vae" / "config.json").exists():
        # As if its latents were measured, which is compiled for every shape too.
        shape = VAEConfig(**TINY_VAE, latent_std=(0.4,))
        save_bundle(Bundle("vae", VAE(shape, rngs=nnx.Rngs(0))), folder / "vae")
    config.autoencoder = str(folder / "vae")
    config.steps = steps
    config.dit = ConfigDict(
        {
            "size": "",
            "width": 32,
            "layers": 2,
            "heads": 2,
            "channels": 4,
            "text_width": 16,
            "dtype": "float32",
            "attention": "reference",  # compiles in half the time
        }
    )
    config.text = ConfigDict({"kind": "hash", "width": 16, "max_tokens": 64})
    config.data.resolutions = (32,)
    config.data.rates = (8.0,)
    config.data.max_frames = 13
    config.latents.clips = 60
    config.latents.folder = str(folder / "latents")
    config.pipeline.batch_size = 2
    config.pipeline.num_packing_bins = 8
    config.optim.schedule = "constant"
    config.optim.warmup = 2
    config.log.every = 1
    config.checkpoint.every = 3
    return config


if __name__ == "__main__":
    workdir = pathlib.Path(sys.argv[1])
    run(tiny_config(workdir.parent, int(sys.argv[2])), workdir)
