"""Autoguidance: a weaker model leads away in the place of the model without words (Karras et al. 2024)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from sora_jax.checkpoints.components import Bundle
from sora_jax.models.dit import DiT
from sora_jax.models.dit_config import DiTConfig
from sora_jax.tokens.packing import PackedBatch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Autoguided:
    """Answers a call of two passes (`guidance.guided_clean`): the first half by `strong`, the second by `weak`.

    Attributes:
      captioned: whether the weak model gets the captions too, as in the paper; or none, so that it leads away from
        pictures without words as well.
    """

    strong: DiT
    weak: DiT
    captioned: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def config(self) -> DiTConfig:
        return self.strong.config

    def __call__(self, x_bnp: jax.Array, batch: PackedBatch, sigma_bs: jax.Array) -> jax.Array:
        half = len(x_bnp) // 2
        parts = [jax.tree.map(lambda leaf, at=at: leaf[at], batch) for at in (slice(half), slice(half, None))]
        full = self.strong(x_bnp[:half], parts[0], sigma_bs[:half])
        away = self.weak(x_bnp[half:], parts[0] if self.captioned else parts[1], sigma_bs[half:])
        return jnp.concatenate([full, away])


def with_weak(strong: Bundle, weak: Bundle, captioned: bool) -> Bundle:
    """The bundle, sampled with guidance away from the transformer of `weak`, which knows the same latents."""
    return dataclasses.replace(strong, dit=Autoguided(strong.dit, weak.dit, captioned))
