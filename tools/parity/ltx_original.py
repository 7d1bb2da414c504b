"""The original LTX-Video code: names and shapes of its autoencoders' and its transformer's tensors, as files have them.

    python tools/parity/ltx_original.py LTX OUT [--numbers]

Run it where PyTorch and diffusers are; LTX is a checkout of github.com/Lightricks/LTX-Video (made of commit 5260738).
Writes OUT/ltx_original.npz: of each version a list of (name, shape), true shapes without numbers. With --numbers also
OUT/ltx_original_VERSION.npz: what the original's decoder of true width makes of a small latent, at its own timestep,
weights drawn (gigabytes, minutes).
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import numpy as np
import torch
from seeded import draw

COMMON: dict[str, Any] = {
    "_class_name": "CausalVideoAutoencoder",
    "dims": 3,
    "latent_channels": 128,
    "norm_layer": "pixel_norm",
    "patch_size": 4,
    "latent_log_var": "uniform",
    "use_quant_conv": False,
    "causal_decoder": False,
}
OLD = [
    *[["res_x", 4], ["compress_all", 1], ["res_x_y", 1], ["res_x", 3], ["compress_all", 1], ["res_x_y", 1]],
    *[["res_x", 3], ["compress_all", 1], ["res_x", 3], ["res_x", 4]],
]
UP = ["compress_all", {"residual": True, "multiplier": 2}]


def residual(count: int, noisy: bool = False) -> list[Any]:
    """So many residual blocks of one width."""
    return ["res_x", {"num_layers": count, "inject_noise": noisy}]


# The files' own metadata; blocks of decoders are listed from fine to coarse.
VAES: dict[str, dict[str, Any]] = {
    "0_9_0": {"blocks": OLD},
    "0_9_1": {
        "encoder_blocks": OLD,
        "decoder_blocks": [
            *[residual(5, True), UP, residual(6, True), UP, residual(7, True), UP, residual(8)],
        ],
        "timestep_conditioning": True,
    },
    "0_9_5": {
        "encoder_blocks": [
            *[["res_x", 4], ["compress_space_res", {"multiplier": 2}], ["res_x", 6]],
            *[
                ["compress_time_res", {"multiplier": 2}],
                ["res_x", 6],
                ["compress_all_res", {"multiplier": 2}],
            ],
            *[["res_x", 2], ["compress_all_res", {"multiplier": 2}], ["res_x", 2]],
        ],
        "decoder_blocks": [residual(5), UP, residual(5), UP, residual(5), UP, residual(5)],
        "timestep_conditioning": True,
    },
}
STATISTICS = ("channel", "mean-of-means", "mean-of-stds", "mean-of-stds_over_std-of-means", "std-of-means")


def names_of(version: str) -> list[tuple[str, list[int]]]:
    """Of the autoencoder's part of a file."""
    from ltx_video.models.autoencoders.causal_video_autoencoder import CausalVideoAutoencoder

    with torch.device("meta"):
        model = CausalVideoAutoencoder.from_config(COMMON | VAES[version])
    names = [(f"vae.{name}", list(tensor.shape)) for name, tensor in model.state_dict().items()]
    return names + [(f"vae.per_channel_statistics.{name}", [128]) for name in STATISTICS]


def transformer_names(layers: int = 2) -> list[tuple[str, list[int]]]:
    """Of a transformer of 0.9's width."""
    from ltx_video.models.transformers.transformer3d import Transformer3DModel
    from ltx_video.utils.diffusers_config_mapping import OURS_TRANSFORMER_CONFIG

    with torch.device("meta"):
        model = Transformer3DModel.from_config(OURS_TRANSFORMER_CONFIG | {"num_layers": layers})
    return [
        (f"model.diffusion_model.{name}", list(tensor.shape)) for name, tensor in model.state_dict().items()
    ]


@torch.no_grad()
def decode(version: str) -> dict[str, Any]:
    """What a decoder makes of a latent, without noise in its layers."""
    from ltx_video.models.autoencoders.causal_video_autoencoder import CausalVideoAutoencoder

    model = CausalVideoAutoencoder.from_config(COMMON | VAES[version])
    decoder = model.decoder.eval()
    names = [(f"vae.decoder.{name}", list(tensor.shape)) for name, tensor in decoder.state_dict().items()]
    state = {
        name.removeprefix("vae.decoder."): torch.from_numpy(np.array(draw(name, shape)))
        for name, shape in names
    }
    decoder.load_state_dict(state)
    latent = np.random.default_rng(1).standard_normal((2, 2, 3, 128), np.float32)
    given = torch.from_numpy(latent.transpose(3, 0, 1, 2)[None])
    time = torch.tensor([0.05]) if "timestep_conditioning" in VAES[version] else None
    clip = decoder(given, target_shape=(1, 3, 9, 64, 96), timestep=time)
    return {"latent": latent, "clip": clip[0].permute(1, 2, 3, 0).numpy()}


if __name__ == "__main__":
    checkout, out = map(pathlib.Path, sys.argv[1:3])
    sys.path.insert(0, str(checkout))
    out.mkdir(parents=True, exist_ok=True)
    lists = {version: names_of(version) for version in VAES} | {"transformer": transformer_names()}
    np.savez_compressed(
        out / "ltx_original.npz", **{name: np.array(json.dumps(names)) for name, names in lists.items()}
    )
    print({name: len(names) for name, names in lists.items()})
    for version in VAES if "--numbers" in sys.argv else ():
        arrays = decode(version)
        np.savez_compressed(out / f"ltx_original_{version}.npz", **arrays)
        print(version, arrays["clip"].shape, arrays["clip"].std())
