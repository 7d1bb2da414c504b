"""Reference results of LTX-Video's transformer, by diffusers: OUT/ltx_VARIANT.npz.

    python tools/parity/ltx.py OUT [--wide]

Run by an environment with torch and diffusers; weights are `draw`'s. "velocity" is called as LTXPipeline does, with one
timestep and a latent frame at the time of its last video frame; "velocity_by_token" as LTXConditionPipeline does, with
a timestep a token and a latent frame at the time of its first.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

import diffusers
import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from seeded import draw

TINY: dict[str, Any] = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "num_layers": 2,
    "caption_channels": 16,
}
WIDE: dict[str, Any] = {"num_layers": 2}
CELL = (8, 32, 32)  # video frames and pixels of a latent cell
TIMESTEP = 731.25  # they aren't whole
FPS = {"velocity": 25, "velocity_by_token": 24}
GRID = (5, 2, 3)
WORDS = 7  # of 12 text positions; the rest is masked, not zero


def main() -> None:
    """Writes every variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--wide", action="store_true", help="true widths too: a minute and 3 GB")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    for name, config in ({"tiny": TINY} | ({"wide": WIDE} if arguments.wide else {})).items():
        write_transformer(arguments.out / f"ltx_{name}.npz", config)
    write_schedules(arguments.out / "ltx_schedules.npz")


def fill(model: torch.nn.Module) -> list[tuple[str, list[int]]]:
    """Draws every weight of a model; returns names and shapes."""
    state = {
        name: torch.from_numpy(draw(name, tuple(value.shape))) for name, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    model.eval()
    return [(name, list(value.shape)) for name, value in state.items()]


def versions() -> str:
    """Of what made a file."""
    return json.dumps({module.__name__: module.__version__ for module in (diffusers, torch, np)})


def write_transformer(path: pathlib.Path, config: dict[str, Any]) -> None:
    """One forward pass with a timestep for all, one with a timestep a token, one in bfloat16."""
    model = diffusers.LTXVideoTransformer3DModel(**config)
    names = fill(model)
    generator = np.random.default_rng(0)
    latent = generator.standard_normal((*GRID, model.config.in_channels), np.float32)
    text = generator.standard_normal((1, 12, model.config.caption_channels), np.float32)
    tokens = torch.from_numpy(latent.reshape(1, -1, latent.shape[-1]))
    mask = torch.from_numpy((np.arange(12) < WORDS)[None])
    frames, height, width = GRID
    scale = (CELL[0] / FPS["velocity"], CELL[1], CELL[2])

    def plain(model: torch.nn.Module, dtype: torch.dtype) -> np.ndarray:
        return (
            model(
                tokens.to(dtype),
                torch.from_numpy(text).to(dtype),
                torch.tensor([TIMESTEP]),
                mask,
                frames,
                height,
                width,
                rope_interpolation_scale=scale,
                return_dict=False,
            )[0]
            .float()
            .numpy()
        )

    pipeline = diffusers.LTXConditionPipeline
    coords = pipeline._scale_video_ids(pipeline._prepare_video_ids(1, *GRID), CELL[1], CELL[0]).float()
    coords[:, 0] = coords[:, 0] * (1.0 / FPS["velocity_by_token"])
    by_token = torch.full((1, tokens.shape[1]), TIMESTEP)
    by_token[:, : height * width] = 0  # the first latent frame is given
    call = {"timestep": by_token, "encoder_attention_mask": mask, "video_coords": coords}
    arrays = {
        "latent": latent,
        "text": text[0, :WORDS],
        "velocity": plain(model, torch.float32)[0].reshape(latent.shape),
        "velocity_by_token": model(tokens, torch.from_numpy(text), **call, return_dict=False)[0]
        .numpy()[0]
        .reshape(latent.shape),
        "velocity_bfloat16": plain(model.to(torch.bfloat16), torch.bfloat16)[0].reshape(latent.shape),
    }
    kept = {key: value for key, value in model.config.items() if key[:1] != "_"}
    np.savez_compressed(path, config=json.dumps(kept), names=json.dumps(names), versions=versions(), **arrays)


def write_schedules(path: pathlib.Path) -> None:
    """Sigmas of LTXPipeline by tokens and steps, with the conversion script's scheduler and without its end.

    "linear_STEPS" are those of LTXConditionPipeline, whose scheduler doesn't shift.
    """
    from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift
    from diffusers.pipelines.ltx.pipeline_ltx_condition import linear_quadratic_schedule

    settings = {
        "use_dynamic_shifting": True,
        "base_shift": 0.95,
        "max_shift": 2.05,
        "base_image_seq_len": 1024,
        "max_image_seq_len": 4096,
        "shift_terminal": 0.1,
    }
    arrays = {}
    for kind, changes in {"stretched": {}, "plain": {"shift_terminal": None}}.items():
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**settings | changes)
        for tokens in (64, 1024, 7392, 20000):
            for steps in (2, 8, 50):
                mu = calculate_shift(tokens, 1024, 4096, 0.95, 2.05)
                scheduler.set_timesteps(steps, sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
                arrays[f"{kind}_{tokens}_{steps}"] = scheduler.sigmas.numpy()
    for steps in (1, 2, 3, 8, 50):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(timesteps=linear_quadratic_schedule(steps) * 1000)
        arrays[f"linear_{steps}"] = scheduler.sigmas.numpy()
    np.savez_compressed(path, versions=versions(), config=json.dumps(settings), **arrays)


if __name__ == "__main__":
    main()
