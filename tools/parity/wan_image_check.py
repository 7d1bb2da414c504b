"""Our image encoder and image-to-video transformer against a file of `wan_image.py`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from seeded import draw
from wan_check import segment, sigmas, velocity

from sora_jax.models.vision import ClipVision, Preparation, tower
from sora_jax.models.wan import Wan
from sora_jax.models.wan_weights import PUBLISHED_WAN, wan_config
from sora_jax.tokens.packing import Segment, pack_batch, unpack
from sora_jax.tokens.patches import patchify, unpatchify

PATCH = (1, 2, 2)


def encoder_of(npz: Mapping[str, Any]) -> ClipVision:
    """With the weights that the original had."""
    part = {name: json.loads(str(npz[name])) for name in ("names", "config", "files")}
    tensors = {name: draw(name, shape) for name, shape in part["names"]["image_encoder"]}
    sizes = tower(part["config"]["image_encoder"])
    return ClipVision(sizes, Preparation.of(part["files"]["image_processor"]), tensors, "the file")


def pictures_of(npz: Mapping[str, Any]) -> list[np.ndarray]:
    """Those that were given."""
    return [npz["picture"], npz["last_picture"]][: len(npz["states"])]


def transformer_of(npz: Mapping[str, Any]) -> Wan:
    """With the weights that the original had."""
    names, config = (json.loads(str(npz[name]))["transformer"] for name in ("names", "config"))
    tensors = {name: draw(name, shape) for name, shape in names}
    return PUBLISHED_WAN.load(wan_config(config), tensors)


def segment_of(npz: Mapping[str, Any]) -> Segment:
    """The file's latent as tokens, with its pictures."""
    latent = npz["latent"][0].transpose(1, 2, 3, 0)
    channels = npz["velocity"].shape[1]
    one = segment(latent[..., :channels], npz["text"][0])
    pictures = np.concatenate(npz["states"])
    return dataclasses.replace(one, extra_channels=patchify(latent[..., channels:], PATCH), pictures=pictures)


def check(npz: Mapping[str, Any]) -> dict[str, float]:
    """The largest error of each output, in deviations of the original's."""
    error = lambda got, wanted: float(np.abs(got - wanted).max() / wanted.std())
    one = segment_of(npz)
    # Positions more than it takes.
    batch, (place,) = pack_batch([[one]], 1, 32, 16, 4, 2 * len(one.pictures))
    (tokens,) = unpack(velocity(transformer_of(npz), batch, sigmas(batch)), [place])
    got = unpatchify(tokens, npz["latent"].shape[2:], PATCH).transpose(3, 0, 1, 2)
    return {
        "states": error(encoder_of(npz)(pictures_of(npz)), npz["states"]),
        "velocity": error(got, npz["velocity"][0]),
    }
