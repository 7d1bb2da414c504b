"""Our T5 encoders against a file of `t5.py`."""

from __future__ import annotations

import json
import pathlib
import tempfile
from collections.abc import Mapping

import numpy as np
from seeded import draw

from sora_jax.models.t5 import T5Config, T5Encoder


def drawn(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The original's weights, by its names."""
    return {name: draw(name, shape) for name, shape in json.loads(str(arrays["names"]))}


def config_of(arrays: Mapping[str, np.ndarray], folder: pathlib.Path) -> T5Config:
    (folder / "config.json").write_text(str(arrays["config"]))
    return T5Config.from_file(folder / "config.json")


def check(arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Maximum errors, in the deviation of what is compared, for a file that tools/parity/t5.py wrote."""
    with tempfile.TemporaryDirectory() as folder:
        config, weights = config_of(arrays, pathlib.Path(folder)), drawn(arrays)
    ids, mask, states, attended = (arrays[name] for name in ("ids", "mask", "states", "states_attended"))
    found = {dtype: T5Encoder(config, weights, dtype)(ids, mask) for dtype in ("float32", "bfloat16")}
    errors = {
        f"states, {dtype}": np.abs(own - states)[mask].max() / states[mask].std()
        for dtype, own in found.items()
    }
    own = T5Encoder(config, weights)(ids[1:2], np.ones_like(mask[1:2]))[0]
    errors["states that attend to padding"] = np.abs(own - attended).max() / attended.std()
    return {name: float(error) for name, error in errors.items()}
