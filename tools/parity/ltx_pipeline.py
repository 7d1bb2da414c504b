"""Reference results of a whole tiny LTX-Video pipeline, by diffusers: OUT/ltx_pipeline_VARIANT.npz.

    python tools/parity/ltx_pipeline.py OUT

Run by an environment with torch, diffusers and transformers; weights are `draw`'s. "text" is LTXPipeline with an
autoencoder of 0.9.0's kind, "given" LTXImageToVideoPipeline with one of 0.9.5's, whose decoder takes a timestep.
diffusers samples the latent of a picture; here it is the mean, given to the pipeline with the noise as its `latents`.
"condition" is LTXConditionPipeline with a picture, a keyframe and a clip at the places of GIVEN, all of them means and
without noise of their own, and another run without them, with a list of timesteps and no guidance.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import torch
import transformers
from diffusers.pipelines.ltx import pipeline_ltx_condition

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from ltx_vae import LATER, NEW, SMALL_LATER
from wan import fill, tokenizer, versions

TRANSFORMER: dict[str, Any] = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "num_layers": 2,
    "caption_channels": 16,
}
TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
}
# Cells of 8 frames of 32×32 pixels, which the pipeline needs.
VAES: dict[str, dict[str, Any]] = {
    "text": {
        "latent_channels": 8,
        "block_out_channels": (8, 12, 16, 16),
        "decoder_block_out_channels": (8, 8, 12, 16),
        "layers_per_block": (1, 1, 1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1, 1, 1),
        "patch_size": 4,
    },
    "given": SMALL_LATER
    | NEW
    | LATER
    | {
        "block_out_channels": (8, 8, 16, 16, 32),
        "patch_size": 4,
        "spatial_compression_ratio": 32,
        "temporal_compression_ratio": 8,
    },
}
# First frames of what is given to "condition", and how many there are of each; pixels are `random_frames`.
GIVEN = {0: 1, 8: 1, 16: 17}
SIGMAS = (1.0, 0.975, 0.725)  # of the run with a list
SCHEDULER: dict[str, Any] = {
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift_terminal": 0.1,
}
SETTINGS: dict[str, Any] = {
    "prompt": "a red circle moves left",
    "negative_prompt": "blue square",
    "height": 32,
    "width": 64,
    "num_frames": 17,
    "frame_rate": 25,
    "num_inference_steps": 4,
    "guidance_scale": 3.0,
}


def main() -> None:
    """Writes every variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=pathlib.Path)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    for variant in VAES:
        write_pipeline(out / f"ltx_pipeline_{variant}.npz", out / f"ltx_{variant}", variant)
    write_condition(out / "ltx_pipeline_condition.npz", out / "ltx_condition")


def random_frames(first: int, count: int) -> np.ndarray:
    """uint8[count,Y,X,3], as a test draws them too."""
    shape = (count, SETTINGS["height"], SETTINGS["width"], 3)
    return np.random.default_rng(first).integers(0, 256, shape, np.uint8)


def write_condition(path: pathlib.Path, folder: pathlib.Path) -> None:
    """LTXConditionPipeline's latents and every 16th frame, and the latents of the run with a list."""
    parts, names, vae = make_parts("given", diffusers.FlowMatchEulerDiscreteScheduler())
    pipeline = diffusers.LTXConditionPipeline(**parts)
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    # The latent of what is given is drawn there.
    pipeline_ltx_condition.retrieve_latents = lambda coded, generator=None: coded.latent_dist.mode()
    pictures = {
        first: [PIL.Image.fromarray(frame) for frame in random_frames(first, count)]
        for first, count in GIVEN.items()
    }
    conditions = [
        pipeline_ltx_condition.LTXVideoCondition(
            frame_index=first, **({"video": own} if len(own) > 1 else {"image": own[0]})
        )
        for first, own in pictures.items()
    ]
    settings = SETTINGS | {"num_frames": 33}
    grid = 5, SETTINGS["height"] // 32, SETTINGS["width"] // 32
    noise = torch.randn((1, 8, *grid), generator=torch.manual_seed(0))  # as the pipeline draws it first
    # Noise on given tokens, which diffusers adds in each step, would be drawn.
    run = lambda **own: (
        pipeline(
            **settings | {"generator": torch.Generator().manual_seed(0), "image_cond_noise_scale": 0.0} | own
        ).frames
    )
    frames = np.asarray(run(conditions=conditions, output_type="np"))
    listed = {"timesteps": [1000 * sigma for sigma in SIGMAS], "guidance_scale": 1.0}
    np.savez_compressed(
        path,
        settings=json.dumps(settings),
        given=json.dumps(list(GIVEN.items())),
        sigmas=json.dumps(SIGMAS),
        **saved(folder),
        names=json.dumps(names),
        versions=versions(),
        latents_std=vae.latents_std.numpy(),
        noise=noise.numpy(),
        latents=run(conditions=conditions, output_type="latent").numpy(),
        listed=run(**listed, output_type="latent").numpy(),
        frames=frames[:, ::16].astype(np.float16),
    )


def make_parts(variant: str, scheduler: Any) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """A pipeline's parts, names and shapes of their weights, and the autoencoder."""
    vae = diffusers.AutoencoderKLLTXVideo(**VAES[variant])
    models = {
        "transformer": diffusers.LTXVideoTransformer3DModel(**TRANSFORMER),
        "vae": vae,
        "text_encoder": transformers.T5EncoderModel(transformers.T5Config(**TEXT)),
    }
    names = {part: fill(model) for part, model in models.items()}
    # Deviations are positive; drawn ones may not be. They are the file's, so they are kept.
    vae.latents_std.copy_(vae.latents_std.abs() + 0.5)
    return models | {"tokenizer": tokenizer(), "scheduler": scheduler}, names, vae


def saved(folder: pathlib.Path) -> dict[str, str]:
    """The settings in a folder, as JSON."""
    read = lambda *name: json.loads(folder.joinpath(*name).read_text())
    files = {
        "model_index.json": read("model_index.json"),
        "scheduler": read("scheduler", "scheduler_config.json"),
        "tokenizer": read("tokenizer", "tokenizer.json"),
    }
    configs = {part: read(part, "config.json") for part in ("transformer", "vae", "text_encoder")}
    return {"config": json.dumps(configs), "files": json.dumps(files)}


def write_pipeline(path: pathlib.Path, folder: pathlib.Path, variant: str) -> None:
    """A tiny pipeline, saved by `save_pretrained` in a folder; its latents and frames for one noise."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    parts, names, vae = make_parts(variant, scheduler)
    pipeline = diffusers.LTXPipeline(**parts)
    pipeline.save_pretrained(folder)
    grid = 3, SETTINGS["height"] // 32, SETTINGS["width"] // 32
    noise = np.random.default_rng(1).standard_normal((1, 8, *grid), np.float32)
    picture = np.random.default_rng(2).integers(0, 256, (SETTINGS["height"], SETTINGS["width"], 3), np.uint8)
    latents = torch.from_numpy(noise)
    if variant == "given":
        pipeline = diffusers.LTXImageToVideoPipeline(**parts)
        pixels = torch.from_numpy(picture.transpose(2, 0, 1)[None, :, None] / np.float32(127.5) - 1)
        mean = vae.encode(pixels).latent_dist.mode()
        latents[:, :, :1] = pipeline._normalize_latents(mean, vae.latents_mean, vae.latents_std)
    pipeline.set_progress_bar_config(disable=True)
    given = {"image": torch.zeros((1, 3, 32, 64))} if variant == "given" else {}  # only its latent is used
    run = lambda kind: (
        pipeline(**SETTINGS, **given, latents=pipeline._pack_latents(latents), output_type=kind).frames
    )
    made, frames = run("latent"), np.asarray(run("np"))
    np.savez_compressed(
        path,
        settings=json.dumps(SETTINGS),
        **saved(folder),
        names=json.dumps(names),
        versions=versions(),
        sigmas=scheduler.sigmas.numpy(),
        latents_std=vae.latents_std.numpy(),
        noise=noise,
        picture=picture,
        latents=pipeline._unpack_latents(made, *grid).numpy(),
        frames=frames.astype(np.float16),
    )


if __name__ == "__main__":
    main()
