"""A run on top of a tiny diffusers folder, of four clips of one shape."""

from __future__ import annotations

import pathlib
from typing import Any

from ml_collections import ConfigDict

from helpers.diffusers_folder import golden, write_folder
from sora_jax.train.__main__ import make_config


def tiny_config(place: pathlib.Path, steps: int, **changes: Any) -> ConfigDict:
    """configs/finetune_wan.py with tiny parts; `place` gets the folder that it needs, and latents.

    Args:
      changes: keys with values as the command line has them, __ for the dot.
    """
    folder = place / "tiny-wan"
    if not folder.exists():
        write_folder(folder, golden("wan_pipeline_unipc"))
    own = {
        "pretrained": str(folder),
        "steps": str(steps),
        "data.durations": "0.5",
        "latents.clips": "4",
        "latents.folder": str(place / "latents"),
        "pipeline.seq_len": "48",
        "optim.lr": "0.01",
        "log.every": "1",
        "log.heldout_every": "0",
        "log.sheet_every": "0",
        "checkpoint.every": "3",
    }
    return make_config("finetune_wan:debug", own | {k.replace("__", "."): v for k, v in changes.items()})
