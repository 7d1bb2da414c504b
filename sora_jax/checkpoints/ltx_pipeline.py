"""LTX-Video's pipelines: what their files don't say, from the original's inference.py and diffusers' LTXPipeline and
LTXConditionPipeline; and how they are sampled, as their scheduler's settings have it.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from sora_jax.checkpoints.components import Sampling
from sora_jax.checkpoints.diffusers_folder import Family, Reference, read_json
from sora_jax.diffusion.ltx_schedule import (
    CONDITION_TEXT_TOKENS,
    FPS,
    FRAMES,
    GUIDANCE,
    HEIGHT,
    STEPS,
    TEXT_TOKENS,
    WIDTH,
    DynamicShift,
)
from sora_jax.errors import UserError
from sora_jax.models.ltx import TIMESTEPS, LTXConfig
from sora_jax.models.ltx_vae_config import DECODE_NOISE, DECODE_TIMESTEP, LTXVAEConfig
from sora_jax.models.text import TextConfig

CONDITION = "LTXConditionPipeline"  # 0.9.5 and later
# The default of the original's inference.py; diffusers has none.
_NEGATIVE = "worst quality, inconsistent motion, blurry, jittery, distorted"
# Ways of FlowMatchEulerDiscreteScheduler to other sigmas or steps, which these models' files don't ask for.
_REFUSED = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
)
# 257 frames of 1280×704: MAX_NUM_FRAMES and, in whole cells, MAX_WIDTH × MAX_HEIGHT of the original's inference.py. Its
# default is 30 frames a second.
FAMILY = Family(
    tokens=29_040,
    latent_frames=33,
    resolution=704,
    width=1280,
    fps=30,
    frames=257,
    steps=STEPS,
    guidance=GUIDANCE,
    shift=0.0,
    licence="OpenRAIL-M from 0.9.5 on, before it a licence of its own",
)


def family_of(config: LTXConfig, index: Mapping[str, Any]) -> tuple[str, Family]:
    """Which model it is: one, whatever its size."""
    del config, index
    return "LTX-Video", FAMILY


def sampling_of(
    folder: pathlib.Path, family: Family, index: Mapping[str, Any], reference: Reference
) -> Sampling:
    """How it is sampled. Of the original the negative prompt is another; its sigmas are taken for the scheduler's.

    LTXConditionPipeline gives its scheduler linear-quadratic sigmas, as the original's files of 0.9.5 and later say.
    What a strength means there, and sigmas in training, are shifted as before: at usual sizes the two are near.

    Raises:
      UserError: the scheduler is another than FlowMatchEulerDiscreteScheduler, or set to what can't be followed.
    """
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    kind = scheduler.get("_class_name", index.get("scheduler", [None, None])[1])
    if kind != "FlowMatchEulerDiscreteScheduler":
        raise UserError(
            f"{folder / 'scheduler'} is a {kind}: of LTX-Video's, FlowMatchEulerDiscreteScheduler can be followed."
        )
    wanted: dict[str, Any] = dict.fromkeys(_REFUSED, False)
    wanted |= {"time_shift_type": "exponential", "num_train_timesteps": TIMESTEPS}
    for name, value in wanted.items():
        if scheduler.get(name) not in (None, value):
            raise UserError(
                f"{folder / 'scheduler'} has {name}={scheduler[name]!r}, which can't be followed: set it to {value!r}."
            )
    if scheduler.get("use_dynamic_shifting"):
        tokens = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
        shifts = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    else:
        tokens, shifts = (256, 4096), (math.log(scheduler.get("shift", 1.0)),) * 2
    if linear_quadratic := index.get("_class_name") == CONDITION:
        if scheduler.get("use_dynamic_shifting") or any(shifts):
            raise UserError(
                f"{folder / 'scheduler'} shifts the sigmas that {CONDITION} gives it, which can't be followed: set "
                "use_dynamic_shifting to false and shift to 1."
            )
        tokens, shifts = DynamicShift.tokens, DynamicShift.shifts
    return Sampling(
        family.steps,
        family.guidance,
        negative=_NEGATIVE if reference == "original" else "",
        linear_quadratic=linear_quadratic,
        shift_tokens=tokens,
        log_shifts=shifts,
        terminal=0.0 if linear_quadratic else scheduler.get("shift_terminal") or 0.0,
        resolution=HEIGHT,
        aspect=f"{WIDTH}:{HEIGHT}",
        fps=FPS,
        duration=FRAMES / FPS,
    )


def text_of(reference: Reference) -> TextConfig:
    """diffusers attends to what fills captions up; the original masks it, and takes small letters."""
    if reference == "original":
        return TextConfig(kind="t5", max_tokens=TEXT_TOKENS, clean="lower")
    return TextConfig(kind="t5", max_tokens=TEXT_TOKENS, attend_padding=True)


def condition_text_of(reference: Reference) -> TextConfig:
    """Of LTXConditionPipeline, whose captions may be longer, and whose padding is masked in both."""
    return dataclasses.replace(text_of(reference), max_tokens=CONDITION_TEXT_TOKENS, attend_padding=False)


def adapt(config: LTXConfig, vae: LTXVAEConfig, sampling: Sampling, reference: Reference) -> LTXConfig:
    """A latent cell is the autoencoder's."""
    del sampling, reference
    return dataclasses.replace(config, cell=vae.compression)


def adapt_condition(
    config: LTXConfig, vae: LTXVAEConfig, sampling: Sampling, reference: Reference
) -> LTXConfig:
    """Of LTXConditionPipeline, which counts time otherwise and takes keyframes beside the clip."""
    return dataclasses.replace(adapt(config, vae, sampling, reference), conditional=True)


def adapt_vae(vae: LTXVAEConfig, reference: Reference) -> LTXVAEConfig:
    """As diffusers decodes by default, a latent is said to have no noise, and none is added."""
    time, noise = (DECODE_TIMESTEP, DECODE_NOISE) if reference == "original" else (0.0, 0.0)
    return dataclasses.replace(vae, decode_timestep=time, decode_noise=noise)
