"""A folder that diffusers wrote: `model_index.json`, and a folder for each component."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from sora_jax.errors import UserError

INDEX = "model_index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
OPTIONAL = ("transformer_2", "image_encoder", "image_processor")

Reference: TypeAlias = Literal["original", "diffusers"]
REFERENCES = ("original", "diffusers")


@dataclasses.dataclass(frozen=True)
class Family:
    """What the files of a model don't say.

    Attributes:
      tokens, latent_frames: of the longest and largest video of its training.
      resolution, width, fps, frames: of that; a frame of 16:9 may be wider than what it was trained on.
      steps, guidance, shift: of the original code; diffusers' defaults, and the scheduler's shift, may be others.
      licence: of the weights.
      low_noise_guidance: of the original code for the transformer of low noise; None: `guidance`.
      from_picture: whether it makes videos from a picture alone.
    """

    tokens: int
    latent_frames: int
    resolution: int
    width: int
    fps: float
    frames: int
    steps: int
    guidance: float
    shift: float
    licence: str
    low_noise_guidance: float | None = None
    from_picture: bool = False


def is_pretrained(folder: pathlib.Path) -> bool:
    """Whether a folder holds a model as diffusers writes it."""
    return (folder / INDEX).is_file()


def parts_of(index: Mapping[str, Any]) -> tuple[str, ...]:
    """The folders that a pipeline needs."""
    return (*PARTS, *(part for part in OPTIONAL if any(index.get(part) or ())))


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A file of settings.

    Raises:
      UserError: it is missing, or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it is no object")
        return value
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the model's folder is incomplete; fetch it again.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error}): fetch the model again.") from error


def free_memory() -> float:
    """Bytes that programs can still take on this machine; infinite where it doesn't say."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return math.inf
