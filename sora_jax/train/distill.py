"""Distilling a transformer into a flow map of few steps, its guidance included.

The student is the teacher's architecture that is also told where a step goes: u(x_σ, σ, σ′) is the mean velocity of the
teacher's guided path from σ to σ′, so that x_σ + (σ′ − σ) u is its end. It is learned two ways at once, by halves of a
batch. Short steps take the teacher's guided velocity; a longer step takes what the student's own two half steps give
(shortcut models, Frans et al. 2024, equation 5; for a guided teacher and any σ, as in Align Your Flow, Sabour et al.
2025).
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sora_jax.checkpoints.bundle import load_bundle, take_weights
from sora_jax.checkpoints.components import Bundle, Sampling
from sora_jax.config import COUNT, SHARE, check_ranges, component
from sora_jax.diffusion import flow
from sora_jax.diffusion.flow import gather_sigmas
from sora_jax.diffusion.guidance import Guidance, guided_clean
from sora_jax.errors import UserError
from sora_jax.models.dit import DiT
from sora_jax.models.vae import VAE
from sora_jax.tokens.packing import PackedBatch
from sora_jax.train.dit import DiTObjective, DiTRun, Sheets
from sora_jax.train.loop_config import LoopConfig

MakeSheets = Callable[[DiTObjective], Sheets]
_FREE = ("flow_map", "dtype", "remat", "attention", "sequence")  # fields that no weight depends on


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """How a flow map is learned.

    Attributes:
      teacher: a bundled model, a folder that holds one, or a training run's workdir.
      guidance: classifier-free guidance scale of the teacher's velocity, which the student then has by itself.
      shortest: of steps, as a share of the schedule: shorter ones are the teacher's.
      from_noise: share of the long steps that begin at σ = 1, where sampling begins.
    """

    teacher: str = "toyworld"
    guidance: float = 3.0
    shortest: float = 1 / 16
    from_noise: float = 0.25

    def __post_init__(self) -> None:
        check_ranges(self, "distill", guidance=COUNT, shortest=(1e-3, 1), from_noise=SHARE)


@dataclasses.dataclass(frozen=True)
class DistillRun(DiTRun):
    """Distilling a diffusion transformer. Its architecture and its autoencoder are the teacher's.

    Attributes:
      distill: how a flow map is learned.
    """

    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)


class DistillObjective(DiTObjective):
    """A flow map on packed sequences: σ, and where the step goes, are drawn per segment."""

    schema: ClassVar[type[LoopConfig]] = DistillRun

    def __init__(self, config: ConfigDict, workdir: pathlib.Path, sheets: MakeSheets | None = None) -> None:
        self.distill = component(DistillConfig, config.distill, "distill")
        super().__init__(config, workdir, sheets)

    @functools.cached_property
    def teacher(self) -> Bundle:
        return load_bundle(self.distill.teacher)

    def check(self) -> None:
        """As the transformer's; also raises UserError where the teacher doesn't fit."""
        self._check_teacher()
        super().check()

    def _check_teacher(self) -> None:
        name, teacher = self.distill.teacher, self.teacher.dit
        if teacher is None:
            raise UserError(f"config.distill.teacher: the model {name!r} has no transformer.")
        ours = dataclasses.asdict(self.dit)
        for key, value in dataclasses.asdict(teacher.config).items():
            if key not in _FREE and ours[key] != value:
                raise UserError(
                    f"config.dit.{key} is {ours[key]} and the teacher {name!r} has {value}: a student has its "
                    f"teacher's architecture; take configs/distill.py:{name}, which reads it from there."
                )
        if teacher.config.flow_map or not self.dit.flow_map:
            raise UserError(
                f"config.dit.flow_map={self.dit.flow_map} and the teacher's is {teacher.config.flow_map}: the student "
                "is a flow map and its teacher none."
            )
        if self.flow.base_tokens != self.teacher.base_tokens:
            raise UserError(
                f"config.flow.base_tokens={self.flow.base_tokens:g} is not the teacher's: set "
                f"{self.teacher.base_tokens:g}."
            )
        if self.pipeline.batch_size % 2:
            raise UserError(
                f"config.pipeline.batch_size={self.pipeline.batch_size} must be even: half of a batch learns short "
                "steps, half long ones."
            )

    @property
    def frozen(self) -> DiT:
        """The teacher's transformer, which `loss` takes too."""
        assert self.teacher.dit is not None
        return self.teacher.dit

    def init(self, key: jax.Array) -> DiT:
        self._check_teacher()
        return take_weights(super().init(key), self.init_from or self.distill.teacher, "dit")

    def loss(
        self, model: DiT, batch: PackedBatch, key: jax.Array, *frozen: DiT
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean square of the mean velocity's error over the generated tokens that move; `frozen` is the teacher."""
        [teacher] = frozen
        sigma_key, noise_key, drop_key = jax.random.split(key, 3)
        batch = self.drop_captions(batch, drop_key)
        B, K = batch.patches.shape[0], self.pipeline.max_segments
        is_short = jnp.arange(B) < B // 2
        begin, end = self._draw_steps(sigma_key, is_short[:, None], (B, K + 1))
        lengths = jnp.sum(batch.segment_ids[:, :, None] == jnp.arange(K + 1), axis=1)
        factor = flow.shift_factor(lengths, self.flow.base_tokens)
        # Tokens of a lower initial σ wait until their segment's σ has come down to it.
        by_condition = lambda share: jnp.minimum(
            gather_sigmas(flow.shift(share, factor), batch.condition_segment_ids), batch.condition_init_sigma
        )
        sigma, middle, next_sigma = by_condition(begin), by_condition((begin + end) / 2), by_condition(end)
        token = lambda table: gather_sigmas(table, batch.condition_ids)[..., None]
        noise = jax.random.normal(noise_key, batch.patches.shape)
        x = flow.interpolate(batch.patches, noise, token(sigma))

        short = self._teacher_velocity(teacher, *_rows((x, batch, sigma), stop=B // 2))
        long = _two_steps(model, *_rows((x, batch, sigma, middle, next_sigma), start=B // 2))
        target = jax.lax.stop_gradient(jnp.concatenate([short, long]))
        error = jnp.mean(jnp.square(model(x, batch, sigma, next_sigma) - target), axis=-1)
        moves = (batch.segment_ids > 0) & (token(next_sigma) < token(sigma))[..., 0]
        mean = lambda rows: (
            jnp.sum(error * moves * rows[:, None]) / jnp.maximum(jnp.sum(moves * rows[:, None]), 1)
        )
        return mean(jnp.ones(B)), {"short_error": mean(is_short), "long_error": mean(~is_short)}

    def _draw_steps(
        self, key: jax.Array, is_short: jax.Array, shape: tuple[int, int]
    ) -> tuple[jax.Array, jax.Array]:
        """Where steps begin and end, in shares of the schedule, 1…0."""
        keys = jax.random.split(key, 3)
        uniform = lambda index: jax.random.uniform(keys[index], shape)
        shortest = self.distill.shortest
        length = jnp.where(is_short, shortest * uniform(0), shortest ** uniform(0))
        begin = length + (1 - length) * uniform(1)
        begin = jnp.where(uniform(2) < self.distill.from_noise, 1.0, begin)
        return begin, begin - length

    def _teacher_velocity(
        self, teacher: DiT, x: jax.Array, batch: PackedBatch, sigma: jax.Array
    ) -> jax.Array:
        guidance = Guidance(self.distill.guidance).tables(sigma.shape)
        passes = Guidance(self.distill.guidance).passes()
        clean, _ = guided_clean(teacher, x, batch, sigma, guidance, passes)
        return flow.velocity_at(x, clean, gather_sigmas(sigma, batch.condition_ids)[..., None])

    def flops(self, batch: PackedBatch) -> float:
        """Of the student's forward and backward pass, half a batch of the teacher's passes and of two steps."""
        return super().flops(batch) * (3 + Guidance(self.distill.guidance).passes() / 2 + 1) / 3

    def bundle(self, name: str, vae: VAE, dit: Any = None) -> Bundle:
        sampling = Sampling(steps=4, guidance=self.distill.guidance, distilled=True)
        return dataclasses.replace(super().bundle(name, vae, dit), sampling=sampling)


def _rows(tree: Any, start: int | None = None, stop: int | None = None) -> Any:
    return jax.tree.map(lambda leaf: leaf[start:stop], tree)


def _two_steps(
    model: DiT, x: jax.Array, batch: PackedBatch, sigma: jax.Array, middle: jax.Array, next_sigma: jax.Array
) -> jax.Array:
    """The mean velocity of two steps in a row; 0 where σ doesn't change."""
    token = lambda table: gather_sigmas(table, batch.condition_ids)[..., None]
    there = flow.euler(x, model(x, batch, sigma, middle), token(sigma), token(middle))
    there = flow.euler(there, model(there, batch, middle, next_sigma), token(middle), token(next_sigma))
    span = token(next_sigma - sigma)
    return jnp.where(span < 0, (there - x) / jnp.where(span < 0, span, 1.0), 0.0)
