"""What diffusers makes of our exports: a LoRA's velocity, a folder's frames, a decoder's clip.

    python tools/parity/finetune.py OUT

Run by the environment of torch and diffusers, after `wan.py`, `ltx.py`, `ltx_pipeline.py` and `finetune_write.py`.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable, Mapping

import diffusers
import numpy as np
import torch


def wan_velocity(transformer: torch.nn.Module, npz: Mapping[str, np.ndarray]) -> np.ndarray:
    """As `wan.py` asks for it: [c,t,y,x]."""
    text = np.pad(npz["text"], ((0, 0), (0, 512 - npz["text"].shape[1]), (0, 0)))
    given = torch.from_numpy(npz["latent"]), torch.tensor([750]), torch.from_numpy(text)
    return transformer(*given, return_dict=False)[0].numpy()[0]


def ltx_velocity(transformer: torch.nn.Module, npz: Mapping[str, np.ndarray]) -> np.ndarray:
    """As `ltx.py` asks for it: [t,y,x,c]."""
    latent, text = npz["latent"], torch.from_numpy(npz["text"][None])
    frames, height, width, channels = latent.shape
    velocity = transformer(
        hidden_states=torch.from_numpy(latent.reshape(1, -1, channels)),
        encoder_hidden_states=text,
        timestep=torch.tensor([731.25]),
        encoder_attention_mask=torch.ones(text.shape[:2]),
        num_frames=frames,
        height=height,
        width=width,
        rope_interpolation_scale=(8 / 25, 32, 32),
        return_dict=False,
    )[0]
    return velocity.numpy().reshape(latent.shape)


def check(
    out: pathlib.Path,
    model: str,
    kind: type[diffusers.DiffusionPipeline],
    base: str,
    golden: str,
    run: Callable[[torch.nn.Module, Mapping[str, np.ndarray]], np.ndarray],
) -> None:
    """Prints both figures of a model, with what was wanted; arguments as `finetune_write.write_all`."""
    place = out / f"finetune_{model}"
    with np.load(place / "ours.npz") as file:
        ours = dict(file)
    with np.load(out / f"{model}_tiny.npz") as file:
        npz = dict(file)
    with np.load(out / f"{golden}.npz") as file:
        noise, settings, before = file["noise"], json.loads(str(file["settings"])), file["frames"]

    pipeline = kind.from_pretrained(out / base)
    plain = run(pipeline.transformer, npz)
    pipeline.load_lora_weights(place / "lora")
    velocity = run(pipeline.transformer, npz)
    error = np.abs(ours["velocity"] - velocity).max() / velocity.std()
    moved = np.abs(plain - velocity).max() / velocity.std()
    print(
        f"{model}: LoRA: largest error of the velocity {error:.1e} of its deviation (bar 1e-4); it moved it by "
        f"{moved:.2f}"
    )

    pipeline = kind.from_pretrained(place / "full")
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(noise)
    if hasattr(pipeline, "_pack_latents"):  # LTX-Video's takes tokens
        latents = pipeline._pack_latents(latents)
    frames = np.asarray(pipeline(**settings, latents=latents, output_type="np").frames)[0]
    psnr = lambda other: -10 * np.log10(np.square(other - frames).mean())
    print(
        f"{model}: folder: frames {psnr(ours['frames'] / 255):.1f} dB (bar 50); the base's {psnr(before[0]):.1f} dB"
    )

    kinds = {"wan": diffusers.AutoencoderKLWan, "ltx": diffusers.AutoencoderKLLTXVideo}
    latent = torch.from_numpy(ours["latent"].transpose(3, 0, 1, 2).copy())[None]
    clips = []
    for folder in (place / "vae", out / base):
        vae = kinds[model].from_pretrained(folder / "vae")
        own = {"temb": torch.tensor([0.0])} if vae.config.get("timestep_conditioning") else {}
        clips.append(vae.decode(latent, **own).sample[0].permute(1, 2, 3, 0).clamp(-1, 1).numpy())
    error, moved = (np.abs(other - clips[0]).max() / clips[0].std() for other in (ours["clip"], clips[1]))
    print(
        f"{model}: decoder: largest error {error:.1e} of the clip's deviation (bar 1e-4); it moved it by {moved:.2f}"
    )


def main() -> None:
    """Of both models."""
    out = pathlib.Path(sys.argv[1])
    torch.set_grad_enabled(False)
    check(out, "wan", diffusers.WanPipeline, "pipeline_unipc", "wan_pipeline_unipc", wan_velocity)
    check(out, "ltx", diffusers.LTXPipeline, "ltx_text", "ltx_pipeline_text", ltx_velocity)


if __name__ == "__main__":
    main()
