"""A run on top of a tiny diffusers folder, of four clips of one shape."""

from __future__ import annotations

import pathlib
from typing import Any

from ml_collections import ConfigDict

from helpers.diffusers_folder import golden, write_folder
from sora_jax.train.__main__ import make_config

# Clips of three latent frames of two by two tokens.
TWELVE_TOKENS = {
    "wan": {"data.durations": "0.5"},
    "ltx": {"data.durations": "1", "data.resolutions": "64"},
}


def write_base(folder: pathlib.Path, model: str) -> pathlib.Path:
    """A tiny pipeline of "wan" or "ltx"."""
    return write_folder(folder, golden({"wan": "wan_pipeline_unipc", "ltx": "ltx_pipeline_text"}[model]))


def tiny_config(place: pathlib.Path, steps: int, model: str = "wan", **changes: Any) -> ConfigDict:
    """configs/finetune_MODEL.py with tiny parts; `place` gets the folder that it needs, and latents.

    Args:
      changes: keys with values as the command line has them, __ for the dot.
    """
    folder = place / f"tiny-{model}"
    if not folder.exists():
        write_base(folder, model)
    own = {
        "pretrained": str(folder),
        "steps": str(steps),
        **TWELVE_TOKENS[model],
        "latents.clips": "4",
        "latents.folder": str(place / f"latents-{model}"),
        "pipeline.seq_len": "48",
        "optim.lr": "0.01",
        "log.every": "1",
        "log.heldout_every": "0",
        "log.sheet_every": "0",
        "checkpoint.every": "3",
    }
    return make_config(f"finetune_{model}:debug", own | {k.replace("__", "."): v for k, v in changes.items()})
