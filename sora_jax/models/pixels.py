"""Pixels as latents: an autoencoder without parameters, for transformers that learn pixels themselves.

It has `vae.VAE`'s face and its groups in time (1 + 4k frames are 1 + k latent frames, the first frame repeated), so
canvases, tiles, bundles and training take it as they take a learned one: `autoencoder = "pixels"`, or "grey". Its
latents' mean and deviation are measured where training begins, as a learned one's are. The transformer's patch then
says how many pixels a token has: `dit.patch = (1, 8, 8)` is 8×8 pixels of four frames, and `dit.channels` are 12, or 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from sora_jax.axes import Latent, Pixels
from sora_jax.models.conv import depth_to_space, space_to_depth
from sora_jax.models.vae import VAE, VAEConfig

# By name, wherever the name of an autoencoder is taken.
PIXELS = {
    "pixels": VAEConfig(kind="pixels", strides=((4, 1, 1),), channels=12),
    "grey": VAEConfig(kind="pixels", strides=((4, 1, 1),), channels=4),
}
_LOG_VARIANCE = -20.0  # of what is exact: the least that `VAE.encode` gives


class PixelVAE(VAE):
    """A cell's pixels as its channels, in colour, or the mean of the colours where `channels` has room for one."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config

    def encode_chunk(
        self, chunk_btyxc: Pixels, cache: Sequence[jax.Array] | None = None
    ) -> tuple[Latent, Latent, tuple[jax.Array, ...]]:
        """As `VAE.encode_chunk`; nothing has to be kept between chunks."""
        x = self._whole_groups(chunk_btyxc, first=cache is None).astype(jnp.float32)
        if self._grey:
            x = jnp.mean(x, axis=-1, keepdims=True)
        cells = space_to_depth(x, self.config.compression)
        return cells, jnp.full_like(cells, _LOG_VARIANCE), ()

    def decode_chunk(
        self, latent_btyxc: Latent, cache: Sequence[jax.Array] | None = None
    ) -> tuple[Pixels, tuple[jax.Array, ...]]:
        """As `VAE.decode_chunk`."""
        x = depth_to_space(latent_btyxc.astype(jnp.float32), self.config.compression)
        if cache is None:
            x = x[:, self.config.compression[0] - 1 :]
        return jnp.repeat(x, 3, axis=-1) if self._grey else x, ()

    @property
    def _grey(self) -> bool:
        time, height, width = self.config.compression
        return self.config.channels == time * height * width


def make_vae(config: VAEConfig, *, rngs: nnx.Rngs) -> VAE:
    """The autoencoder of a configuration, of either kind."""
    return (PixelVAE if config.kind == "pixels" else VAE)(config, rngs=rngs)
