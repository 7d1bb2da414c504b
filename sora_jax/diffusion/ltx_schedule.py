"""How LTX-Video is sampled: the sigmas of diffusers' LTXPipeline and LTXConditionPipeline, and their defaults.

All are walked with Euler's steps. What the pipelines' arguments and the conversion script's scheduler say is here; a
folder's `scheduler/scheduler_config.json` may say otherwise.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from sora_jax.errors import UserError

# Defaults of both pipelines: 161 frames of 512×704.
STEPS, GUIDANCE, FPS = 50, 3.0, 25.0
HEIGHT, WIDTH, FRAMES = 512, 704, 161
TEXT_TOKENS, CONDITION_TEXT_TOKENS = 128, 256  # a prompt's, in LTXPipeline and in LTXConditionPipeline

# Distilled models (0.9.7, configs/ltxv-13b-0.9.7-distilled.yaml of Lightricks/LTX-Video at bc4ab62) have guidance 1 and
# these sigmas, as they are, with 0 behind: the first pass's; and the second's, after latents were enlarged.
DISTILLED = (1.0, 0.9937, 0.9875, 0.9812, 0.975, 0.9094, 0.725)
DISTILLED_SECOND_PASS = (0.9094, 0.725, 0.4219)


@dataclasses.dataclass(frozen=True)
class DynamicShift:
    """A shift towards noise that grows with the number of tokens; names of FlowMatchEulerDiscreteScheduler in brackets.

    Attributes:
      tokens, shifts: two numbers of tokens, and the logarithms of the shift there, between and beyond which it is
        linear [base_image_seq_len, max_image_seq_len, base_shift, max_shift].
      terminal: the last sigma but 0, to which the others are stretched; 0: they aren't [shift_terminal].
    """

    tokens: tuple[int, int] = (1024, 4096)
    shifts: tuple[float, float] = (0.95, 2.05)
    terminal: float = 0.1

    def log_factor(self, tokens: Any) -> Any:
        """The logarithm of the shift of a video of so many tokens (`flow.shift`); of each, where they are an array."""
        (few, many), (low, high) = self.tokens, self.shifts
        return low + (high - low) * (tokens - few) / (many - few)

    def factor(self, tokens: int) -> float:
        """The shift of a video of so many tokens."""
        return math.exp(self.log_factor(tokens))

    def sigmas(self, steps: int, tokens: int, init_sigma: float = 1.0) -> np.ndarray:
        """float32[steps + 1], from 1 to 0: evenly spaced from 1 to 1/steps, shifted, stretched, and 0.

        From an `init_sigma` below 1: as much shorter, and stretched where it is above the terminal one.

        Raises:
          UserError: there is less than one step.
        """
        _check(steps)
        # In float32, as diffusers: what is near 1 is rounded and then stretched.
        even, factor = np.linspace(1.0, 1 / steps, steps).astype(np.float32), self.factor(tokens)
        if init_sigma < 1:
            even *= np.float32(init_sigma / (init_sigma + factor * (1 - init_sigma)))
        sigmas = factor / (factor + (1 / even - 1))
        first = np.float32(init_sigma)
        # One step has nothing to stretch; diffusers divides by 0 there.
        if first > self.terminal > 0 and steps > 1:
            sigmas = first - (first - sigmas) * (first - self.terminal) / (first - sigmas[-1])
        sigmas[0] = first
        return np.append(sigmas, 0.0).astype(np.float32)


def linear_quadratic(steps: int, threshold: float = 0.025) -> np.ndarray:
    """float32[steps + 1], from 1 to 0, of LTXConditionPipeline: half of the steps remove `threshold` of the noise.

    What has been removed grows linearly up to there, then as a parabola with the same slope at first.

    Raises:
      UserError: there is less than one step.
    """
    _check(steps)
    if steps == 1:
        return np.float32([1.0, 0.0])
    half = steps // 2
    slope, rest = threshold / half, steps - half
    after = np.maximum(np.arange(steps) - half, 0)
    removed = slope * np.arange(steps) + (1 - slope * steps) * (after / rest) ** 2
    return np.append(1 - removed, 0.0).astype(np.float32)


def _check(steps: int) -> None:
    if steps < 1:
        raise UserError(f"A video can't be made in {steps} steps: give at least 1.")
