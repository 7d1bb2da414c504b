"""Wan's autoencoder of `diffusers`: 4×8×8 pixels to 16 channels as ours, another architecture, random weights."""

from __future__ import annotations

from common import Request, Way, without_gradient
from diffusers import AutoencoderKLWan


def ways(request: Request) -> dict[str, Way]:
    """At each of the asked widths (`base_dim`; published models have 96)."""
    found = {}
    for width in request.settings["wan_widths"]:
        model = request.ready(AutoencoderKLWan(base_dim=width))
        x = request.tensor("input").movedim(-1, 1).contiguous()

        def forward(model=model, x=x):
            if request.work == "encode":
                return model.encode(x).latent_dist.mean
            return model.decode(x).sample

        found[f"diffusers Wan {width}"] = Way(model, without_gradient(forward))
    return found
