"""`config.video`: the clip that a configuration is about. The planner makes it; training doesn't read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from sora_jax.config import component
from sora_jax.errors import UserError
from sora_jax.models.vae import VAEConfig


@dataclasses.dataclass(frozen=True)
class TargetConfig:
    """`config.video`: the clip that a configuration is about, and how it is sampled.

    Attributes:
      resolution, aspect, seconds, fps: of the clip.
      steps: of the solver.
      passes: of the model in each step; 2 with guidance by words.
      vae: of the autoencoder that decodes it, fields of `VAEConfig`.
    """

    resolution: int
    seconds: float
    fps: float
    aspect: str = "16:9"
    steps: int = 50
    passes: int = 2
    vae: Mapping[str, Any] = dataclasses.field(default_factory=dict, metadata={"keys": VAEConfig})

    def __post_init__(self) -> None:
        for name in ("resolution", "seconds", "fps", "steps", "passes"):
            if not getattr(self, name) > 0:
                raise UserError(f"config.video.{name}={getattr(self, name)} must be above 0.")


def target_of(config: ConfigDict) -> TargetConfig | None:
    """None where a configuration has none."""
    return component(TargetConfig, config.video, "video") if config.get("video") is not None else None
