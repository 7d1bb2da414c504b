"""How a video is sampled: the settings that every ability takes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import TypeAlias

from sora_jax.diffusion.guidance import METHODS, Guidance
from sora_jax.diffusion.solvers import SOLVERS
from sora_jax.errors import UserError
from sora_jax.pipeline.checks import (
    MAX_SEED,
    check_bool,
    check_int,
    check_number,
    check_text,
    is_number,
    short_repr,
)

MAX_STEPS = 1000
MAX_GUIDANCE = 100
MAX_CONTEXT_NOISE = 0.99
MAX_STEP_CACHE = 1
MAX_FRAMES = 10**9  # that `max_frames` may allow

Progress: TypeAlias = Callable[[int, int], None]  # (steps done, steps in all)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How something is sampled.

    Attributes:
      seed: random seed.
      steps: of the solver, from noise; with a lower strength that share of them.
      sigmas: noise levels of the steps, from 1 down and without the last, 0: as they are, in place of the model's
        schedule of so many `steps`; with a lower strength those below where it begins. (): the model's.
      guidance: classifier-free guidance scale; 1 is none.
      low_noise_guidance: its scale where the second of two transformers denoises (Wan2.2-A14B); None: the same.
      solver: a name of `solvers.SOLVERS`.
      guidance_method: a name of `guidance.METHODS`; "zero" also leaves out the first 4% of the steps, at least one.
      guidance_interval: (lowest, highest) σ between which guidance acts.
      guidance_rescale: 0 to 1, how far the contrast that guidance adds is reduced, as in diffusers.
      conditioning_guidance: guidance scale of conditioning pictures and clips; 1 is none.
      context_noise: of a video longer than the model sees at once, which is made window after window: the σ, from 0 to
        below 1, at which a window is shown what was generated before it, so that the model repairs what it got wrong
        (diffusion forcing); 0 shows it as it is.
      anchor: whether later windows also see an early frame: the latest that was given, or the shot's first.
      step_cache: how little the first layer's part may change from step to step, relative to itself, for the other
        layers' to be taken from the step before (`models.step_cache`): some 0.05 to 0.15; 0 evaluates all of them.
      negative: the negative prompt.
      strict: refuse words that the model doesn't know; otherwise a note names them.
      max_frames: the most frames of a video, and of a batch together; None is what lasts ten minutes at the model's
        highest rate.

    Raises:
      UserError: a setting can't be used.
    """

    seed: int = 0
    steps: int = 12
    guidance: float = 3.0
    low_noise_guidance: float | None = None
    solver: str = "euler"
    guidance_method: str = "cfg"
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    conditioning_guidance: float = 1.0
    context_noise: float = 0.0
    anchor: bool = False
    step_cache: float = 0.0
    sigmas: tuple[float, ...] = ()
    negative: str = ""
    strict: bool = False
    max_frames: int | None = None

    def __post_init__(self) -> None:
        self.check()
        if self.sigmas:
            object.__setattr__(self, "sigmas", tuple(map(float, self.sigmas)))
            object.__setattr__(self, "steps", len(self.sigmas))

    @property
    def as_guidance(self) -> Guidance:
        """As the sampler takes it."""
        low, high = self.guidance_interval
        method = METHODS.index(self.guidance_method)
        text, low_text = self.guidance, self.low_noise_guidance
        return Guidance(
            text,
            self.conditioning_guidance,
            low,
            high,
            self.guidance_rescale,
            method,
            low_text=text if low_text is None else low_text,
        )

    def check(self) -> None:
        """Raises UserError where a setting can't be used."""
        check_int("seed", self.seed, 0, MAX_SEED)
        check_int("steps", self.steps, 1, MAX_STEPS)
        scales = ("guidance", "conditioning_guidance")
        for name in scales if self.low_noise_guidance is None else (*scales, "low_noise_guidance"):
            # Huge scales overflow to NaN, and would spoil the other segments of a packed sequence.
            check_number(name, getattr(self, name), minimum=-MAX_GUIDANCE, maximum=MAX_GUIDANCE)
        for name, choices in (("solver", SOLVERS), ("guidance_method", METHODS)):
            if (value := getattr(self, name)) not in choices:
                what = f"{name.replace('_', ' ')} {short_repr(value)}"
                raise UserError(f"There is no {what}: choose one of {', '.join(choices)}.")
        if not isinstance(self.sigmas, (tuple, list)) or len(self.sigmas) > MAX_STEPS:
            raise UserError(
                f"sigmas={short_repr(self.sigmas)} can't be used: give at most {MAX_STEPS} numbers."
            )
        levels = [*self.sigmas, 0] if self.sigmas else [1, 0]
        falling = all(is_number(level) for level in levels) and all(
            a > b for a, b in itertools.pairwise(levels)
        )
        if not falling or levels[0] != 1:
            raise UserError(
                f"sigmas={short_repr(self.sigmas)} can't be walked: give the noise levels of the steps, from 1 down to "
                "above 0, such as 1,0.9,0.75,0.5."
            )
        try:
            low, high = self.guidance_interval
        except (TypeError, ValueError):
            low = high = math.nan
        if not (is_number(low) and is_number(high) and 0 <= low <= high <= 1):
            raise UserError(
                f"guidance_interval={short_repr(self.guidance_interval)} is no interval: give two numbers, "
                "0 ≤ lowest ≤ highest ≤ 1."
            )
        check_number("guidance_rescale", self.guidance_rescale, minimum=0, maximum=1)
        check_number("context_noise", self.context_noise, minimum=0, maximum=MAX_CONTEXT_NOISE)
        check_bool("anchor", self.anchor)
        check_number("step_cache", self.step_cache, minimum=0, maximum=MAX_STEP_CACHE)
        check_text("negative", self.negative)
        check_bool("strict", self.strict)
        if self.max_frames is not None:
            check_int("max_frames", self.max_frames, 1, MAX_FRAMES)
