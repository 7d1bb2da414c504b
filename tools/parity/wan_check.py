"""Our Wan transformer against a file of `wan.py`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from seeded import draw

from sora_jax.models.wan import Wan
from sora_jax.models.wan_weights import PUBLISHED_WAN, wan_config
from sora_jax.tokens.canvas import all_noise_canvas, to_segment
from sora_jax.tokens.packing import PackedBatch, Segment, pack_batch, unpack
from sora_jax.tokens.patches import unpatchify
from sora_jax.tokens.spans import CausalSpan

SIGMA = 0.75


@jax.jit
def velocity(model: Wan, batch: PackedBatch, sigma: np.ndarray) -> jax.Array:
    """Of the batch's patches, as they are."""
    return model(batch.patches, batch, sigma)


def model_of(npz: Mapping[str, Any], dtype: str = "float32") -> Wan:
    """With the weights that the original had."""
    tensors = {name: draw(name, shape) for name, shape in json.loads(str(npz["names"]))}
    config = wan_config(json.loads(str(npz["config"])), dtype=dtype)
    return PUBLISHED_WAN.load(config, tensors, dtype=jnp.dtype(dtype))


def segment(latent_tyxc: np.ndarray, text: np.ndarray, given: int = 0) -> Segment:
    """A latent as tokens, its first frames given."""
    t, y, x, channels = latent_tyxc.shape
    canvas = all_noise_canvas(CausalSpan(0, 1 + 4 * (t - 1)), (y, x), channels, 16.0)
    start = np.ones((t, y, x), np.float32)
    start[:given] = 0
    canvas = dataclasses.replace(canvas, latent=latent_tyxc, init_sigma=start)
    return to_segment(canvas, (1, 2, 2), text, np.zeros(len(text), np.float32), "latent")


def sigmas(batch: PackedBatch, sigma: float = SIGMA) -> np.ndarray:
    """One sigma for every condition in use."""
    return np.where(batch.condition_segment_ids > 0, sigma, 0.0).astype(np.float32)


def run(model: Wan, npz: Mapping[str, Any], given: int = 0) -> np.ndarray:
    """The velocity float32[c,t,y,x] of the file's latent, its first frames given."""
    latent = npz["latent"][0].transpose(1, 2, 3, 0)
    one = segment(latent, npz["text"][0], given)
    batch, (place,) = pack_batch([[one]], 1, 32, 16, 4)  # positions more than it takes
    (tokens,) = unpack(velocity(model, batch, sigmas(batch)), [place])
    return unpatchify(tokens, latent.shape[:3], (1, 2, 2)).transpose(3, 0, 1, 2)


def check(npz: Mapping[str, Any]) -> dict[str, float]:
    """The largest error of each output, in deviations of the original's; of bfloat16, PyTorch's own error beside."""
    error = lambda got, wanted: float(np.abs(got - wanted).max() / wanted.std())
    wanted = npz["velocity"][0]
    model = model_of(npz)
    out = {
        "velocity": error(run(model, npz), wanted),
        "velocity_by_token": error(run(model, npz, given=1), npz["velocity_by_token"][0]),
    }
    del model
    return out | {
        "bfloat16": error(run(model_of(npz, "bfloat16"), npz), wanted),
        "bfloat16, PyTorch's own": error(npz["velocity_bfloat16"][0], wanted),
    }
