"""What diffusers makes of our exports: a LoRA's velocity and a folder's frames, beside ours.

    python tools/parity/finetune.py OUT

Run by the environment of torch and diffusers, after `wan.py` and `finetune_write.py`.
"""

from __future__ import annotations

import json
import pathlib
import sys

import diffusers
import numpy as np
import torch


def main() -> None:
    """Prints both figures, with what was wanted."""
    out = pathlib.Path(sys.argv[1])
    place = out / "finetune"
    torch.set_grad_enabled(False)
    with np.load(place / "ours.npz") as file:
        ours = dict(file)
    with np.load(out / "wan_tiny.npz") as file:
        latent, text, plain = file["latent"], file["text"], file["velocity"]
    with np.load(out / "wan_pipeline_unipc.npz") as file:
        noise, settings, before = file["noise"], json.loads(str(file["settings"])), file["frames"]

    pipeline = diffusers.WanPipeline.from_pretrained(out / "pipeline_unipc")
    pipeline.load_lora_weights(place / "lora")
    padded = torch.from_numpy(np.pad(text, ((0, 0), (0, 512 - text.shape[1]), (0, 0))))
    given = torch.from_numpy(latent), torch.tensor([750]), padded
    velocity = pipeline.transformer(*given, return_dict=False)[0].numpy()[0]
    error = np.abs(ours["velocity"] - velocity).max() / velocity.std()
    moved = np.abs(plain[0] - velocity).max() / velocity.std()
    print(
        f"LoRA: largest error of the velocity {error:.1e} of its deviation (bar 1e-4); it moved it by {moved:.2f}"
    )

    pipeline = diffusers.WanPipeline.from_pretrained(place / "full")
    pipeline.set_progress_bar_config(disable=True)
    frames = np.asarray(pipeline(**settings, latents=torch.from_numpy(noise), output_type="np").frames)[0]
    psnr = lambda other: -10 * np.log10(np.square(other - frames).mean())
    print(f"folder: frames {psnr(ours['frames'] / 255):.1f} dB (bar 50); the base's {psnr(before[0]):.1f} dB")


if __name__ == "__main__":
    main()
