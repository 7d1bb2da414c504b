"""Gradients of diffusers' decoders on drawn weights, as numbers for each tensor.

    python tools/parity/vae_gradient.py OUT

Run it where PyTorch and diffusers are. Writes OUT/vae_gradients.npz: for each variant "norm_VARIANT" and
"along_VARIANT", of the gradient of the mean square of (clip - target) by each tensor of the decoder, in the order of
"names_VARIANT": its norm, and its scalar product with a drawn tensor. diffusers clips what Wan's decoder makes; here
that is left out.
"""

from __future__ import annotations

import json
import pathlib
import sys

import ltx_vae
import numpy as np
import torch
import wan_vae
from seeded import draw

# The module, its variant, and the shape of a latent.
VARIANTS = {
    "wan_2_1": (wan_vae, "tiny_2_1", (2, 2, 3)),
    "wan_2_2": (wan_vae, "tiny_2_2", (2, 2, 2)),
    "ltx_0_9_5": (ltx_vae, "tiny_0_9_5", (2, 2, 2)),
}
TIMESTEP = 0.05


def probe(name: str, shape: list[int]) -> np.ndarray:
    """A direction in the space of a tensor."""
    return draw(f"probe.{name}.bias", shape)


def latent_and_target(version: str, channels: int, clip: tuple[int, ...] = ()) -> np.ndarray:
    """A latent [t,y,x,c], or the target of the clip's shape."""
    generator = np.random.default_rng(3 + bool(clip))
    shape = clip or (*VARIANTS[version][2], channels)
    return generator.standard_normal(shape, np.float32)


def run(version: str) -> dict[str, np.ndarray]:
    module, variant, _ = VARIANTS[version]
    model, _ = module.build(module.VARIANTS[variant][0])
    channels = model.config.get("z_dim") or model.config.get("latent_channels")
    latent = module.channels_first(latent_and_target(version, channels))
    clamp, torch.clamp = torch.clamp, lambda x, **_: x
    try:
        own = {} if module is wan_vae else {"temb": torch.tensor([TIMESTEP])}
        clip = model.decode(latent, **own).sample[0].permute(1, 2, 3, 0)
    finally:
        torch.clamp = clamp
    target = torch.from_numpy(latent_and_target(version, channels, tuple(clip.shape)))
    torch.mean(torch.square(clip - target)).backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    along = [
        float((grad * torch.from_numpy(probe(name, list(grad.shape)))).sum())
        for name, grad in gradients.items()
    ]
    return {
        f"config_{version}": np.array(json.dumps({k: v for k, v in model.config.items() if k[:1] != "_"})),
        f"all_{version}": np.array(
            json.dumps([(name, list(value.shape)) for name, value in model.state_dict().items()])
        ),
        f"names_{version}": np.array(
            json.dumps([(name, list(grad.shape)) for name, grad in gradients.items()])
        ),
        f"norm_{version}": np.array([float(grad.norm()) for grad in gradients.values()], np.float32),
        f"along_{version}": np.array(along, np.float32),
    }


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {key: array for version in VARIANTS for key, array in run(version).items()}
    np.savez_compressed(folder / "vae_gradients.npz", **arrays)
    print({key: array.shape for key, array in arrays.items() if array.ndim})
