"""A model too small to know anything, whose every layer says something."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from sora_jax.checkpoints.components import Bundle, Limits
from sora_jax.models.dit import DiT
from sora_jax.models.dit_config import DiTConfig
from sora_jax.models.text import TextConfig
from sora_jax.models.vae import VAE, VAEConfig

TEXT = TextConfig(kind="hash", width=16, max_tokens=12)

# An autoencoder with few blocks: it is compiled for every shape of clip.
TINY_VAE: dict[str, Any] = {
    "channels": 4,
    "encoder_widths": (8, 8, 8),
    "encoder_blocks": (0, 0, 1),
    "decoder_widths": (8, 8, 8),
    "decoder_blocks": (0, 0, 1),
}
SHORT = Limits(tokens=40, text=12, text_len=24)


def measured_bundle() -> Bundle:
    """An autoencoder alone, as if its latents were measured: a run would measure them on its own clips."""
    return Bundle("vae", VAE(VAEConfig(**TINY_VAE, latent_std=(0.4,)), rngs=nnx.Rngs(0)))


def tiny_bundle(limits: Limits = SHORT, **dit: Any) -> Bundle:
    """A bundle whose `DiTConfig` is tiny but for `dit`; a token spans 16×16 pixels."""
    vae = VAE(VAEConfig(**TINY_VAE), rngs=nnx.Rngs(0))
    own = {"size": "", "width": 32, "layers": 2, "heads": 2, "channels": 4, "text_width": 16}
    model = DiT(DiTConfig(**own | {"dtype": "float32"} | dit), rngs=nnx.Rngs(1))
    # A fresh DiT answers 0 to everything (adaLN-Zero): give every parameter something to say.
    leaves, tree = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noisy = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return Bundle("tiny", vae, jax.tree.unflatten(tree, noisy), TEXT, limits)
