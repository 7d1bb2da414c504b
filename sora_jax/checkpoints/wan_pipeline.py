"""Wan's pipelines: what their files don't say (rates, sizes and lengths of training, steps and guidance), from the
models' own repositories; and how they are sampled, as their scheduler's settings or the original code have it.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from sora_jax.checkpoints.components import Sampling
from sora_jax.checkpoints.diffusers_folder import Family, Reference, parts_of, read_json
from sora_jax.diffusion import flow
from sora_jax.errors import UserError
from sora_jax.models.text import TextConfig
from sora_jax.models.wan import WanConfig
from sora_jax.models.wan_vae_config import WanVAEConfig

TEXT_TOKENS = 512  # to which captions are padded
IMAGE_TO_VIDEO = "WanImageToVideoPipeline"
# FastWan's (FastVideo): guidance is learned, three steps at these sigmas.
FEW_STEPS, _FEW_SIGMAS = "WanDMDPipeline", (1.0, 0.757, 0.522)

# Wan's own negative prompt is for the original's defaults; diffusers has none.
_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)


# By the width of the transformer and the channels of its latents. diffusers' defaults are 50 steps and guidance 5.
FAMILIES = {
    "Wan2.1, 480p": Family(32_760, 21, 480, 832, 16, 81, 50, 5.0, 5.0, "Apache-2.0"),
    "Wan2.1, 720p": Family(75_600, 21, 720, 1280, 16, 81, 50, 5.0, 5.0, "Apache-2.0"),
    "Wan2.2-A14B": Family(75_600, 21, 720, 1280, 16, 81, 40, 4.0, 12.0, "Apache-2.0", 3.0),
    "Wan2.2-I2V-A14B": Family(
        75_600, 21, 720, 1280, 16, 81, 40, 3.5, 5.0, "Apache-2.0", 3.5, from_picture=True
    ),
    # Those of 480p and of 720p differ in weights alone: the smaller size and its shift, up to the larger one's tokens.
    "Wan2.1-I2V": Family(75_600, 21, 480, 832, 16, 81, 40, 5.0, 3.0, "Apache-2.0", from_picture=True),
    "Wan2.1-FLF2V": Family(75_600, 21, 720, 1280, 16, 81, 50, 5.0, 16.0, "Apache-2.0", from_picture=True),
    "Wan2.2-TI2V": Family(27_280, 31, 704, 1280, 24, 121, 50, 5.0, 5.0, "Apache-2.0"),
}


def family_of(config: WanConfig, index: Mapping[str, Any]) -> tuple[str, Family]:
    """Which model it is, by the channels of its latents, its heads and its parts."""
    if config.channels == 48:
        name = "Wan2.2-TI2V"
    elif "transformer_2" in parts_of(index):
        name = "Wan2.2-I2V-A14B" if config.extra_channels else "Wan2.2-A14B"
    elif config.extra_channels:
        name = "Wan2.1-FLF2V" if config.picture_positions else "Wan2.1-I2V"
    else:
        name = "Wan2.1, 480p" if config.heads <= 12 else "Wan2.1, 720p"
    return name, FAMILIES[name]


def sampling_of(
    folder: pathlib.Path,
    family: Family,
    index: Mapping[str, Any],
    reference: Reference,
) -> Sampling:
    """How it is sampled.

    Raises:
      UserError: its scheduler can't be followed.
    """
    common: dict[str, Any] = {
        "resolution": family.resolution,
        "aspect": f"{family.width}:{family.resolution}",
        "fps": family.fps,
        "duration": family.frames / family.fps,
        "from_picture": family.from_picture,
    }
    if index.get("_class_name") == FEW_STEPS:
        return Sampling(3, 1.0, solver="sde", shift=8.0, sigmas=_FEW_SIGMAS, **common)
    if reference == "original":
        return Sampling(
            family.steps,
            family.guidance,
            solver="unipc",
            negative=_NEGATIVE,
            shift=family.shift,
            ends=(0.999, 0.0),
            low_noise_guidance=family.low_noise_guidance,
            **common,
        )
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    kind = scheduler.get("_class_name", index.get("scheduler", [None, None])[1])
    if kind == "UniPCMultistepScheduler":
        if not (scheduler.get("use_flow_sigmas") and scheduler.get("prediction_type") == "flow_prediction"):
            raise UserError(
                f"{folder / 'scheduler'} isn't set for flow matching: set use_flow_sigmas to true and prediction_type "
                "to flow_prediction."
            )
        shift, solver, ends = scheduler.get("flow_shift", 1.0), "unipc", (1.0, 0.001)
        common["max_sigma"] = 1 - 1e-6
    elif kind == "FlowMatchEulerDiscreteScheduler":
        shift, solver = (
            scheduler.get("shift", 1.0),
            "sde" if scheduler.get("stochastic_sampling") else "euler",
        )
        # It shifts its least sigma when it is made, and again when steps are set.
        ends, common["keep_end"] = (1.0, float(flow.shift(jnp.float32(0.001), shift))), True
    else:
        raise UserError(
            f"{folder / 'scheduler'} is a {kind}: UniPCMultistepScheduler and FlowMatchEulerDiscreteScheduler can be "
            "followed."
        )
    return Sampling(50, 5.0, solver=solver, shift=float(shift), ends=ends, **common)


def text_of(reference: Reference) -> TextConfig:
    """The same in both."""
    del reference
    return TextConfig(kind="t5", max_tokens=TEXT_TOKENS, clean="wan")


def adapt(config: WanConfig, vae: WanVAEConfig, sampling: Sampling, reference: Reference) -> WanConfig:
    """UniPC's timesteps are whole numbers in both."""
    del vae
    return dataclasses.replace(config, reference=reference, whole_timesteps=sampling.solver == "unipc")
