"""Our TAEHV decoder against a file of `taehv.py`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from seeded import draw

LAST_BIAS = "decoder.22.bias"


def weights(names: Iterable[tuple[str, list[int]]]) -> dict[str, np.ndarray]:
    """Drawn, with pixels around a middle gray, so that few are clamped."""
    drawn = {name: draw(name, shape) for name, shape in names}
    return drawn | {LAST_BIAS: 0.3 * drawn[LAST_BIAS] + np.float32(0.5)}


def check(npz: Mapping[str, np.ndarray], decode: Any) -> float:
    """The largest error, in deviations of the original's clip. `decode`: of a latent [B,t,y,x,c], in [-1, 1]."""
    clip = (np.asarray(decode(npz["latent"][None]))[0] + 1) / 2
    return float(np.abs(clip - npz["clip"]).max() / npz["clip"].std())


def names_of(npz: Mapping[str, np.ndarray]) -> list[tuple[str, list[int]]]:
    """The names and shapes of the decoder's tensors."""
    return json.loads(str(npz["names"]))
