"""diffusers' LTX-Video autoencoders on drawn weights: what they encode and decode, as files to compare with.

    python tools/parity/ltx_vae.py OUT [VARIANT ...]

Run it where PyTorch and diffusers are. Writes OUT/ltx_vae_VARIANT.npz: "frames" (uint8[T,Y,X,3]) and "latent"
([t,y,x,c], raw) are inputs, "mean_N" and "logvar_N" (of one channel) what N frames are encoded as, "clip_N" what as
many latent frames as N frames have are decoded to at `TIMESTEP`; noise in layers is drawn by numpy's generator 5.
Of tiny ones "bfloat16" has the root mean square errors of diffusers' own bfloat16, relative to the deviation of its
float32: of encode, then of decode.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import diffusers
import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from seeded import draw

TIMESTEP = 300.0  # times the multiplier, which is drawn too
LATER: dict[str, Any] = {
    "decoder_spatio_temporal_scaling": (True, True, True),
    "upsample_residual": (True, True, True),
    "upsample_factor": (2, 2, 2),
    "timestep_conditioning": True,
}
NOISY: dict[str, Any] = LATER | {"decoder_inject_noise": (True, True, True, False)}
NEW: dict[str, Any] = LATER | {
    "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
    "spatio_temporal_scaling": (True,) * 4,
    "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
    "decoder_inject_noise": (False,) * 4,
}
SMALL: dict[str, Any] = {
    "latent_channels": 8,
    "block_out_channels": (8, 12, 16, 16),
    "decoder_block_out_channels": (8, 8, 12, 16),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1, 1),
    "patch_size": 2,
}
SMALL_LATER: dict[str, Any] = SMALL | {
    "decoder_block_out_channels": (8, 16, 32),
    "decoder_layers_per_block": (1, 1, 1, 1),
    "patch_size": 1,
}
SMALL_NEW: dict[str, Any] = {
    "block_out_channels": (8, 8, 16, 16, 32),
    "spatial_compression_ratio": 8,
    "temporal_compression_ratio": 8,
}
# Settings, then frames, height, width of the clip, then the numbers of frames to encode and decode.
VARIANTS: dict[str, tuple[dict[str, Any], tuple[int, int, int], tuple[int, ...]]] = {
    "tiny_0_9_0": (SMALL, (9, 16, 48), (1, 9)),
    "tiny_0_9_1": (SMALL_LATER | NOISY, (9, 16, 24), (1, 9)),
    "tiny_0_9_5": (SMALL_LATER | NEW | SMALL_NEW, (9, 16, 24), (1, 9)),
    "tiny_causal": (SMALL_LATER | NEW | SMALL_NEW | {"decoder_causal": True}, (17, 16, 16), (17,)),
    "true_0_9_0": ({}, (9, 64, 96), (9,)),
    "true_0_9_1": (
        NOISY | {"decoder_block_out_channels": (256, 512, 1024), "decoder_layers_per_block": (5, 6, 7, 8)},
        (9, 64, 96),
        (9,),
    ),
    "true_0_9_5": (
        NEW
        | {
            "block_out_channels": (128, 256, 512, 1024, 2048),
            "layers_per_block": (4, 6, 6, 2, 2),
            "decoder_block_out_channels": (256, 512, 1024),
            "decoder_layers_per_block": (5, 5, 5, 5),
            "spatial_compression_ratio": 32,
            "temporal_compression_ratio": 8,
        },
        (9, 64, 96),
        (9,),
    ),
}


def build(settings: dict[str, Any]) -> tuple[diffusers.AutoencoderKLLTXVideo, list[tuple[str, list[int]]]]:
    """The model with drawn weights, and the names and shapes of its tensors."""
    model = diffusers.AutoencoderKLLTXVideo(**settings).eval()
    names = [(name, list(tensor.shape)) for name, tensor in model.state_dict().items()]
    model.load_state_dict({name: torch.from_numpy(np.array(draw(name, shape))) for name, shape in names})
    return model, names


def channels_first(clip: np.ndarray) -> torch.Tensor:
    """[T,Y,X,C] to [1,C,T,Y,X]."""
    return torch.from_numpy(np.ascontiguousarray(clip.transpose(3, 0, 1, 2)[None]))


def channels_last(clip: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(clip[0].float().numpy().transpose(1, 2, 3, 0))


def decode(model: diffusers.AutoencoderKLLTXVideo, latent: torch.Tensor) -> np.ndarray:
    """At `TIMESTEP`, with noise of numpy's generator in the place of torch's."""
    generator, drawn = np.random.default_rng(5), torch.randn
    torch.randn = lambda shape, dtype=None, **_: torch.from_numpy(
        generator.standard_normal(tuple(shape), np.float32)
    ).to(dtype)
    try:
        time = torch.tensor([TIMESTEP]) if model.config.timestep_conditioning else None
        return channels_last(model.decode(latent, time).sample)
    finally:
        torch.randn = drawn


@torch.no_grad()
def run(
    settings: dict[str, Any], size: tuple[int, int, int], counts: tuple[int, ...], in_half: bool
) -> dict[str, np.ndarray]:
    """Every array of a file; those of bfloat16, which is slow on CPUs, where asked for."""
    model, names = build(settings)
    time, side = model.temporal_compression_ratio, model.spatial_compression_ratio
    frames = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    cells = 1 + (size[0] - 1) // time, size[1] // side, size[2] // side
    latent = np.random.default_rng(1).standard_normal((*cells, model.config.latent_channels), np.float32)
    out = {"frames": frames, "latent": latent}
    clip = channels_first(frames.astype(np.float32) / np.float32(127.5) - 1)
    for count in counts:
        posterior = model.encode(clip[:, :, :count]).latent_dist
        out[f"mean_{count}"] = channels_last(posterior.mode())
        logvar = channels_last(posterior.logvar)
        assert (logvar == logvar[..., :1]).all()
        out[f"logvar_{count}"] = logvar[..., :1]
        out[f"clip_{count}"] = decode(model, channels_first(latent[: 1 + (count - 1) // time]))
    if in_half:
        half, count = model.to(torch.bfloat16), counts[-1]
        mean = channels_last(half.encode(clip.bfloat16()).latent_dist.mode())
        decoded = decode(half, channels_first(latent).bfloat16())
        out["bfloat16"] = np.array(
            [
                np.sqrt(np.mean(np.square(theirs - exact))) / exact.std()
                for theirs, exact in ((mean, out[f"mean_{count}"]), (decoded, out[f"clip_{count}"]))
            ],
            np.float32,
        )
    texts = {
        "config": json.dumps({key: value for key, value in model.config.items() if key[:1] != "_"}),
        "names": json.dumps(names),
        "versions": json.dumps({"diffusers": diffusers.__version__, "torch": torch.__version__}),
    }
    return out | {k: np.array(v) for k, v in texts.items()}


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for variant in sys.argv[2:] or VARIANTS:
        arrays = run(*VARIANTS[variant], variant.startswith("tiny"))
        np.savez_compressed(folder / f"ltx_vae_{variant}.npz", **arrays)
        shown = {
            name: (array.shape, round(float(array.std()), 3)) for name, array in arrays.items() if array.ndim
        }
        print(variant, shown, arrays.get("bfloat16"), flush=True)
