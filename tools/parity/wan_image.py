"""Reference results of Wan's image-to-video pipelines, by diffusers: OUT/wan_image_VARIANT.npz.

    python tools/parity/wan_image.py OUT

"pair" is of Wan2.2-A14B's kind (two transformers, and two guidance scales).
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

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from wan import TEXT, TINY, VAE, fill, scheduler, tokenizer, versions

CONFIG = TINY | {"in_channels": 12}  # 4 of the latent, 4 of the mask, 4 of the picture's latent
SETTINGS: dict[str, Any] = {
    "prompt": "a red circle moves left",
    "negative_prompt": "blue square",
    "height": 32,
    "width": 48,
    "num_frames": 5,
    "num_inference_steps": 4,
    "guidance_scale": 5.0,
}


def main() -> None:
    """Writes every variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=pathlib.Path)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    second = diffusers.WanTransformer3DModel(**CONFIG)
    own = {"transformer_2": second, "boundary_ratio": 0.9, "image_encoder": None, "image_processor": None}
    names = {"transformer_2": fill(second, "second.")}
    write(out, "pair", CONFIG, own, names, guidance_scale_2=2.0)


def write(
    out: pathlib.Path,
    variant: str,
    config: dict[str, Any],
    own: dict[str, Any],
    names: dict[str, Any],
    **settings: Any,
) -> None:
    """A tiny pipeline, saved in OUT/image_VARIANT; its latents and frames for one noise and picture."""
    parts = {
        "transformer": diffusers.WanTransformer3DModel(**config),
        "vae": diffusers.AutoencoderKLWan(**VAE),
        "text_encoder": transformers.UMT5EncoderModel(transformers.UMT5Config(**TEXT)),
    }
    names = {part: fill(model) for part, model in parts.items()} | names
    pipeline = diffusers.WanImageToVideoPipeline(
        **parts, tokenizer=tokenizer(), scheduler=scheduler("unipc"), **own
    )
    folder = out / f"image_{variant}"
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generator = np.random.default_rng(3)
    picture = generator.integers(0, 256, (32, 48, 3), np.uint8)
    noise = generator.standard_normal((1, 4, 2, 4, 6), np.float32)
    settings = SETTINGS | settings
    arrays = {
        kind: np.asarray(
            pipeline(
                **settings,
                image=PIL.Image.fromarray(picture),
                latents=torch.from_numpy(noise),
                output_type=kind,
            ).frames
        )
        for kind in ("latent", "np")
    }
    parts |= {name: part for name, part in own.items() if isinstance(part, torch.nn.Module)}
    read = lambda name: json.loads((folder / name).read_text())
    files = {
        "model_index.json": read("model_index.json"),
        "scheduler": read("scheduler/scheduler_config.json"),
        "tokenizer": read("tokenizer/tokenizer.json"),
    }
    np.savez_compressed(
        out / f"wan_image_{variant}.npz",
        settings=json.dumps(settings),
        config=json.dumps({part: read(f"{part}/config.json") for part in parts}),
        files=json.dumps(files),
        names=json.dumps(names),
        versions=versions(),
        noise=noise,
        picture=picture,
        latents=arrays["latent"],
        frames=np.round(255 * arrays["np"]).astype(np.uint8),
    )


if __name__ == "__main__":
    main()
