"""Our LTX-Video autoencoder against a file of `ltx_vae.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping

import jax
import numpy as np
from seeded import draw

from sora_jax.checkpoints.ltx_vae_weights import load_ltx_vae
from sora_jax.models.ltx_vae import LTXVAE

TIMESTEP = 300.0

encode = jax.jit(LTXVAE.encode_chunk)


@jax.jit
def decode(model: LTXVAE, latent: jax.Array) -> jax.Array:
    """With the noise that the original was given."""
    generator = np.random.default_rng(5)
    noise = lambda high, wide: generator.standard_normal((high, wide), np.float32)
    return model.decode(latent, TIMESTEP if model.config.timestep_conditioning else None, noise)


def model_of(npz: Mapping[str, np.ndarray], dtype: str = "float32") -> LTXVAE:
    """With the weights that the original had."""
    tensors = {name: draw(name, shape) for name, shape in json.loads(str(npz["names"]))}
    return load_ltx_vae(json.loads(str(npz["config"])), tensors, dtype)


def check(npz: Mapping[str, np.ndarray], dtype: str = "float32") -> dict[str, float]:
    """The largest error of each output, in deviations of the original's."""
    model = model_of(npz, dtype)
    time = model.config.compression[0]
    clip = npz["frames"][None] / np.float32(127.5) - 1
    ours = {}
    for count in (int(name.removeprefix("mean_")) for name in npz if name.startswith("mean_")):
        mean, logvar, _ = encode(model, clip[:, :count])
        part = npz["latent"][None, : 1 + (count - 1) // time]
        ours |= {
            f"mean_{count}": mean,
            f"logvar_{count}": logvar[..., :1],
            f"clip_{count}": decode(model, part),
        }
    return {
        name: float(np.abs(np.asarray(array)[0] - npz[name]).max() / npz[name].std())
        for name, array in ours.items()
    }
