"""In tests, public functions check their arrays against the shapes that their annotations name (`sora_jax.axes`)."""

from __future__ import annotations

import importlib

from beartype import beartype
from jaxtyping import jaxtyped

# In the order of imports: who imports a function later gets the one that checks.
BOUNDARIES = {
    "sora_jax.tokens.patches": ("patchify", "unpatchify", "reference_patches"),
    "sora_jax.diffusion.flow": ("gather_sigmas",),
    "sora_jax.models.layers": ("rotate",),
    "sora_jax.models.attention.dispatch": ("attend",),
    "sora_jax.models.vae": (
        *(
            "VAE.encode",
            "VAE.decode",
            "VAE.encode_chunk",
            "VAE.decode_chunk",
            "VAE.to_latent",
        ),
    ),
    "sora_jax.models.dit": ("DiT.__call__",),
}


def turn_on() -> None:
    """Makes each of `BOUNDARIES` raise `jaxtyping.TypeCheckError` where an array has another shape or kind."""
    for module, names in BOUNDARIES.items():
        for name in names:
            *path, last = name.split(".")
            place = importlib.import_module(module)
            for part in path:
                place = getattr(place, part)
            setattr(place, last, jaxtyped(typechecker=beartype)(getattr(place, last)))
