"""What a model consists of: its networks, what it can hold, and how it is sampled where nothing else is asked for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.checkpoints.knowledge import Knowledge
from sora_jax.config import component
from sora_jax.diffusion import flow
from sora_jax.diffusion.ltx_schedule import DynamicShift, linear_quadratic
from sora_jax.errors import UserError
from sora_jax.models.text import TextConfig

# `models.dit.DiT`, `models.wan.Wan` or `WanPair`, `models.ltx.LTX`; `models.vae.VAE`, `models.pixels.PixelVAE`,
# `models.wan_vae.WanVAE` or `models.ltx_vae.LTXVAE`. Each has a `config`, with what pipelines ask of it under the same
# names.
Transformer: TypeAlias = Any
Autoencoder: TypeAlias = Any
DTYPES = ("float32", "bfloat16", "float16")  # of arithmetic


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises UserError where a value is none of the choices."""
    if value not in choices:
        raise UserError(f"There is no {name} {value!r}: choose one of {', '.join(choices)}.")


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of a segment, as in training's sequences.

    Attributes:
      tokens: video tokens of a segment, and of a packed sequence.
      latent_frames: of a segment, the most that training showed; 0: as many as there are tokens for.
      frame_tokens: tokens of a latent frame, the most that training showed; 0: as many as there are.
      resolution: short side of whole frames that training showed, in pixels; 0: any.
      fps: the most frames a second that training showed; 0: any.
      grid: pixels of whose multiples the sides (height, width) of padded frames were in training.
      text: tokens of a prompt.
      text_len: text positions of a packed sequence.
      pictures: an image encoder's states of a segment's pictures.
      seq_multiple: packed sequences are as short as what is asked for allows, a multiple of so many positions; 0: as
        long as training's, so that one compiled step serves every request.
    """

    tokens: int = 256
    latent_frames: int = 0
    frame_tokens: int = 0
    resolution: int = 0
    fps: float = 0.0
    grid: tuple[int, int] = (1, 1)
    text: int = 64
    text_len: int = 128
    seq_multiple: int = 0
    pictures: int = 0


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a model is sampled where nothing else is asked for.

    Attributes:
      steps: of the solver.
      guidance: classifier-free guidance scale.
      low_noise_guidance: of the second transformer of a pair, see `pipeline.settings.Settings`.
      distilled: whether the model is a flow map that has learned that guidance: it can't be given another.
      context_noise, anchor: what later windows of a long video see of earlier ones, see `pipeline.settings.Settings`.
      solver: a name of `solvers.SOLVERS`.
      negative: the negative prompt.
      shift: of the schedule towards noise (`flow.shift`), for every length; 0: by length, see `Bundle`.
      shift_tokens, log_shifts, terminal: a shift that grows with tokens, and the last sigma but 0; see
        `ltx_schedule.DynamicShift`. Where `shift_tokens` is (0, 0) there is no such shift.
      sigmas: the schedule of a few-step model as it is, without its last 0, for so many steps; (): there is none.
      linear_quadratic: whether the schedule is `ltx_schedule.linear_quadratic`, for any number of steps.
      ends, keep_end: between which the schedule's sigmas are spaced, see `flow.schedule`.
      max_sigma: of a schedule; a little below 1 where its solver divides by 1 − σ.
      resolution, aspect, fps, duration: of a video of a prompt; 0 or "": as `pipeline.request.Request` has it.
      from_picture: whether it makes videos from a picture alone, none of words.
    """

    steps: int = 12
    guidance: float = 3.0
    low_noise_guidance: float | None = None
    distilled: bool = False
    context_noise: float = 0.0
    anchor: bool = False
    solver: str = "euler"
    negative: str = ""
    shift: float = 0.0
    shift_tokens: tuple[int, int] = (0, 0)
    log_shifts: tuple[float, float] = (0.0, 0.0)
    terminal: float = 0.0
    sigmas: tuple[float, ...] = ()
    linear_quadratic: bool = False
    ends: tuple[float, float] = (1.0, 0.0)
    keep_end: bool = False
    max_sigma: float = 1.0
    resolution: int = 0
    aspect: str = ""
    fps: float = 0.0
    duration: float = 0.0
    from_picture: bool = False

    @property
    def dynamic_shift(self) -> DynamicShift | None:
        """The shift that grows with tokens, where there is one."""
        return (
            DynamicShift(self.shift_tokens, self.log_shifts, self.terminal)
            if any(self.shift_tokens)
            else None
        )


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A model, ready to use. `dit` is None where only an autoencoder was stored.

    `decoder`: in place of the autoencoder's own (`models.taehv.TAEHV`); None: that.

    `image_encoder`: of pictures uint8[Y,X,3], what the transformer sees besides their latent (`models.vision`); None:
    nothing.

    `base_tokens` is `flow.shift_factor`'s as the transformer was trained: segments longer than this spend more of their
    steps near noise; unless `sampling.shift` is one for all.
    """

    name: str
    vae: Autoencoder
    dit: Transformer | None = None
    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    limits: Limits = dataclasses.field(default_factory=Limits)
    base_tokens: float = 64.0
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    card: dict[str, Any] = dataclasses.field(default_factory=dict)
    decoder: Autoencoder | None = None
    image_encoder: Callable[[list[np.ndarray]], np.ndarray] | None = None

    @functools.cached_property
    def knowledge(self) -> Knowledge:
        """What it saw in training, as its card's "knows" tells; nothing where that is absent."""
        return component(Knowledge, self.card.get("knows", {}), "card.knows")

    def shift_factor(self, tokens: int | jax.Array) -> jax.Array:
        """By which the schedule of a segment of so many tokens is shifted towards noise (`flow.shift`).

        Of each segment, where they are an array; but one number, where it is the same for all.
        """
        if (dynamic := self.sampling.dynamic_shift) is not None:
            return jnp.exp(jnp.float32(dynamic.log_factor(tokens)))
        return jnp.asarray(
            self.sampling.shift or flow.shift_factor(jnp.asarray(tokens), self.base_tokens), jnp.float32
        )

    def fixed_sigmas(self, steps: int) -> tuple[float, ...]:
        """The sigmas of so many steps, without the last, 0, where they depend on nothing else; () where they do."""
        own = self.sampling
        if own.linear_quadratic:
            return tuple(linear_quadratic(steps)[:-1].tolist())
        return own.sigmas if len(own.sigmas) == steps else ()

    def schedule(
        self, steps: int, tokens: int, init_sigma: float = 1.0, sigmas: Sequence[float] = ()
    ) -> jax.Array:
        """`steps` + 1 sigmas from `init_sigma` to 0, see `flow.schedule`.

        Args:
          sigmas: in place of these, of which those below `init_sigma` are taken; (): `fixed_sigmas`, where there are.
        """
        own = self.sampling
        if fixed := sigmas or self.fixed_sigmas(steps):
            below = (sigma for sigma in fixed if sigma < init_sigma)
            return jnp.asarray([init_sigma, *below, 0.0], jnp.float32)
        if (dynamic := own.dynamic_shift) is not None:
            return jnp.asarray(dynamic.sigmas(steps, tokens, init_sigma))
        sigmas = flow.schedule(steps, self.shift_factor(tokens), init_sigma, own.ends, own.keep_end)
        return jnp.minimum(sigmas, own.max_sigma)
