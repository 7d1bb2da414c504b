"""Our LTX-Video transformer against a file of `ltx.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from seeded import draw

from sora_jax.models.ltx import LTX
from sora_jax.models.ltx_weights import PUBLISHED_LTX, ltx_config
from sora_jax.tokens.packing import PackedBatch, Segment, pack_batch, unpack
from sora_jax.tokens.patches import coordinates, patchify, unpatchify

SIGMA = 0.73125
PATCH = (1, 1, 1)


@jax.jit
def velocity(model: LTX, batch: PackedBatch, sigma: np.ndarray) -> jax.Array:
    """Of the batch's patches, as they are."""
    return model(batch.patches, batch, sigma)


def model_of(npz: Mapping[str, Any], dtype: str = "float32", **fields: Any) -> LTX:
    """With the weights that the original had."""
    tensors = {name: draw(name, shape) for name, shape in json.loads(str(npz["names"]))}
    config = ltx_config(json.loads(str(npz["config"])), dtype=dtype, **fields)
    return PUBLISHED_LTX.load(config, tensors, dtype=jnp.dtype(dtype))


def segment(latent_tyxc: np.ndarray, text: np.ndarray, given: int = 0, fps: float = 25.0) -> Segment:
    """A latent as tokens, its first frames given."""
    grid = latent_tyxc.shape[:3]
    start = np.ones((*grid, 1), np.float32)
    start[:given] = 0
    return Segment(
        patches=patchify(latent_tyxc, PATCH),
        coords=coordinates(grid, PATCH, fps, 8, "absolute"),
        init_sigma=patchify(start, PATCH)[:, 0],
        caption_time=np.zeros(start.size, np.float32),
        text=text,
        text_time=np.zeros(len(text), np.float32),
    )


def sigmas(batch: PackedBatch, sigma: float = SIGMA) -> np.ndarray:
    """One sigma for every condition in use."""
    return np.where(batch.condition_segment_ids > 0, sigma, 0.0).astype(np.float32)


def run(model: LTX, npz: Mapping[str, Any], given: int = 0, fps: float = 25.0) -> np.ndarray:
    """The velocity float32[t,y,x,c] of the file's latent, its first frames given."""
    one = segment(npz["latent"], npz["text"], given, fps)
    batch, (place,) = pack_batch([[one]], 1, 48, 16, 4)  # positions more than it takes
    (tokens,) = unpack(velocity(model, batch, sigmas(batch)), [place])
    return unpatchify(tokens, npz["latent"].shape[:3], PATCH)


def check(npz: Mapping[str, Any]) -> dict[str, float]:
    """The largest error of each output, in deviations of the original's; of bfloat16, PyTorch's own error beside."""
    error = lambda got, wanted: float(np.abs(got - wanted).max() / wanted.std())
    wanted = npz["velocity"]
    out = {"velocity": error(run(model_of(npz), npz), wanted)}
    by_token = run(model_of(npz, conditional=True), npz, given=1, fps=24.0)
    return out | {
        "velocity_by_token": error(by_token, npz["velocity_by_token"]),
        "bfloat16": error(run(model_of(npz, "bfloat16"), npz), wanted),
        "bfloat16, PyTorch's own": error(npz["velocity_bfloat16"], wanted),
    }
