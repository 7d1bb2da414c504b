"""Our Wan autoencoder against a file of `wan_vae.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from seeded import draw

from sora_jax.checkpoints.wan_vae_weights import load_wan_vae
from sora_jax.models.wan_vae import WanVAE

encode = jax.jit(WanVAE.encode_chunk)


@jax.jit
def decode(model: WanVAE, latent: jax.Array, cache: Any = None) -> tuple[jax.Array, Any]:
    """Clipped, as diffusers' is."""
    clip, cache = model.decode_chunk(latent, cache)
    return jnp.clip(clip, -1.0, 1.0), cache


def model_of(npz: Mapping[str, np.ndarray], dtype: str = "float32") -> WanVAE:
    """With the weights that the original had."""
    tensors = {name: draw(name, shape) for name, shape in json.loads(str(npz["names"]))}
    return load_wan_vae(json.loads(str(npz["config"])), tensors, dtype)


def check(npz: Mapping[str, np.ndarray], dtype: str = "float32") -> dict[str, float]:
    """The largest error of each output, in deviations of the original's."""
    model = model_of(npz, dtype)
    time = model.config.compression[0]
    clip = npz["frames"][None] / np.float32(127.5) - 1
    ours = {}
    for count in (int(name.removeprefix("mean_")) for name in npz if name.startswith("mean_")):
        mean, logvar, _ = encode(model, clip[:, :count])
        part = npz["latent"][None, : 1 + (count - 1) // time]
        ours |= {f"mean_{count}": mean, f"logvar_{count}": logvar, f"clip_{count}": decode(model, part)[0]}
    return {
        name: float(np.abs(np.asarray(array)[0] - npz[name]).max() / npz[name].std())
        for name, array in ours.items()
    }
