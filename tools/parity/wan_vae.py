"""diffusers' Wan autoencoders on drawn weights: what they encode and decode, as files to compare with.

    python tools/parity/wan_vae.py OUT [VARIANT ...]

Run it where PyTorch and diffusers are. Writes OUT/wan_vae_VARIANT.npz: "frames" (uint8[T,Y,X,3]) and "latent"
([t,y,x,c], raw) are inputs, "mean_N" and "logvar_N" what N frames are encoded as, "clip_N" what as many latent frames
as N frames have are decoded to; "bfloat16" has the errors of diffusers' own bfloat16, relative to the deviation of its
float32: the largest and the root mean square of encode, then of decode (not of `SLOW`: minutes without AVX-512).
"""

from __future__ import annotations

import json
import pathlib
import sys

import diffusers
import numpy as np
import torch
from seeded import draw

TINY = {
    "base_dim": 8,
    "z_dim": 4,
    "num_res_blocks": 1,
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.5, 0.5, 2.0, 1.0],
}
RESIDUAL = {
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}
# Settings, then frames, height, width of the clip, then the numbers of frames to encode and decode.
VARIANTS = {
    "tiny_2_1": (TINY, (9, 16, 24), (1, 5, 9)),
    "tiny_2_2": (TINY | RESIDUAL | {"decoder_base_dim": 12}, (9, 32, 32), (1, 5, 9)),
    "true_2_1": ({}, (5, 32, 48), (5,)),
    "true_2_2": (
        RESIDUAL
        | {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48}
        | {"latents_mean": [0.0] * 48, "latents_std": [1.0] * 48},
        (5, 48, 64),
        (5,),
    ),
}
SLOW = ("true_2_2",)


def build(settings: dict) -> tuple[diffusers.AutoencoderKLWan, list[tuple[str, list[int]]]]:
    """The model with drawn weights, and the names and shapes of its tensors."""
    model = diffusers.AutoencoderKLWan(**settings).eval()
    names = [(name, list(tensor.shape)) for name, tensor in model.state_dict().items()]
    model.load_state_dict({name: torch.from_numpy(draw(name, shape)) for name, shape in names})
    return model, names


def channels_first(clip: np.ndarray) -> torch.Tensor:
    """[T,Y,X,C] to [1,C,T,Y,X]."""
    return torch.from_numpy(np.ascontiguousarray(clip.transpose(3, 0, 1, 2)[None]))


def channels_last(clip: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(clip[0].float().numpy().transpose(1, 2, 3, 0))


@torch.no_grad()
def run(
    settings: dict, size: tuple[int, int, int], counts: tuple[int, ...], in_half: bool = True
) -> dict[str, np.ndarray]:
    model, names = build(settings)
    time, side = model.config.scale_factor_temporal, model.config.scale_factor_spatial
    frames = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    cells = 1 + (size[0] - 1) // time, size[1] // side, size[2] // side
    latent = np.random.default_rng(1).standard_normal((*cells, model.config.z_dim), np.float32)
    out = {"frames": frames, "latent": latent}
    clip = channels_first(frames.astype(np.float32) / np.float32(127.5) - 1)
    for count in counts:
        posterior = model.encode(clip[:, :, :count]).latent_dist
        out[f"mean_{count}"] = channels_last(posterior.mode())
        out[f"logvar_{count}"] = channels_last(posterior.logvar)
        part = channels_first(latent[: 1 + (count - 1) // time])
        out[f"clip_{count}"] = channels_last(model.decode(part).sample)
    if in_half:
        half, count = model.to(torch.bfloat16), counts[-1]
        mean = channels_last(half.encode(clip.bfloat16()).latent_dist.mode())
        decoded = channels_last(half.decode(channels_first(latent).bfloat16()).sample)
        pairs = (mean, out[f"mean_{count}"]), (decoded, out[f"clip_{count}"])
        off = [np.abs(theirs - exact) / exact.std() for theirs, exact in pairs]
        errors = [value for each in off for value in (each.max(), np.sqrt(np.mean(each**2)))]
        out["bfloat16"] = np.array(errors, np.float32)
    texts = {
        "config": json.dumps({key: value for key, value in model.config.items() if key[:1] != "_"}),
        "names": json.dumps(names),
        "versions": json.dumps({"diffusers": diffusers.__version__, "torch": torch.__version__}),
    }
    return out | {name: np.array(text) for name, text in texts.items()}


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for variant in sys.argv[2:] or VARIANTS:
        arrays = run(*VARIANTS[variant], in_half=variant not in SLOW)
        np.savez_compressed(folder / f"wan_vae_{variant}.npz", **arrays)
        shown = {
            name: (array.shape, round(float(array.std()), 3)) for name, array in arrays.items() if array.ndim
        }
        print(variant, shown, "bfloat16", arrays.get("bfloat16"))
