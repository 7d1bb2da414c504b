"""The original TAEHV on drawn weights: what its decoder makes of latents, as files to compare with.

    python tools/parity/taehv.py TAEHV_PY OUT [VARIANT ...]

Run it where PyTorch is; TAEHV_PY is the original's module (github.com/madebyollin/taehv, MIT). Writes
OUT/taehv_VARIANT.npz: "latent" (float32[t,y,x,c], normalised) and "clip" (float32[T,Y,X,3], in [0, 1]).
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import sys

import numpy as np
import torch
from taehv_check import weights

# Arguments of the model, then latent frames, height and width. Its widths are fixed, so these are true weights' shapes.
VARIANTS = {
    "2_1": ({"latent_channels": 16, "patch_size": 1}, (3, 2, 3)),
    "2_2": ({"latent_channels": 48, "patch_size": 2}, (2, 1, 2)),
    "ltx_2": (
        {"latent_channels": 128, "patch_size": 4, "decoder_time_upscale": (True, True, True)},
        (2, 1, 2),
    ),
}


@torch.no_grad()
def run(module: object, arguments: dict, size: tuple[int, int, int]) -> dict[str, np.ndarray]:
    model = module.TAEHV(checkpoint_path=None, **arguments).eval()
    names = [(name, list(tensor.shape)) for name, tensor in model.state_dict().items() if "decoder" in name]
    model.load_state_dict(
        {name: torch.from_numpy(tensor) for name, tensor in weights(names).items()}, strict=False
    )
    latent = np.random.default_rng(0).standard_normal((*size, arguments["latent_channels"]), np.float32)
    clip = model.decode_video(torch.from_numpy(latent.transpose(0, 3, 1, 2)[None]), show_progress_bar=False)
    return {
        "latent": latent,
        "clip": clip[0].permute(0, 2, 3, 1).numpy(),
        "names": np.array(json.dumps(names)),
        "versions": np.array(json.dumps({"torch": torch.__version__})),
    }


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("taehv", sys.argv[1])
    assert spec is not None and spec.loader is not None
    original = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(original)
    folder = pathlib.Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    for variant in sys.argv[3:] or VARIANTS:
        arrays = run(original, *VARIANTS[variant])
        np.savez_compressed(folder / f"taehv_{variant}.npz", **arrays)
        print(variant, arrays["clip"].shape, arrays["clip"].mean(), arrays["clip"].std())
