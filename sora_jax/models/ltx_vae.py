"""LTX-Video's autoencoders, 0.9.0 to 0.9.8, as diffusers' AutoencoderKLLTXVideo computes them (HaCohen et al. 2024).

A latent cell spans 8 frames of 32×32 pixels; 1 + 8k frames are 1 + k latent frames. From 0.9.1 on the decoder does the
last step of denoising: it is given a latent with a little noise (`add_noise`) and its timestep.

The encoder is causal and streams as `vae.VAE`'s does. Published decoders see later frames, so they take whole clips, or
windows of time that overlap (`LTXVAE.windows`); `decode_chunk` refuses where the configuration doesn't say
decoder_causal.

Modules are called as in diffusers' files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sora_jax.axes import Latent, Pixels
from sora_jax.errors import UserError
from sora_jax.models.conv import ConvCache, check_clip, patchify, run_block, unpatchify
from sora_jax.models.decode_windows import Windows
from sora_jax.models.layers import rms_norm
from sora_jax.models.ltx_layers import (
    EPSILON,
    Conv,
    DownStage,
    MiddleBlock,
    Noise,
    TimeEmbedder,
    UpStage,
    modulate,
)
from sora_jax.models.ltx_vae_config import DECODE_NOISE, LTXVAEConfig
from sora_jax.models.tiles import Tiles

Cache = tuple[jax.Array, ...]
TIMESTEPS = 1000.0  # a timestep of 1; a parameter of the files
_LOG_VARIANCE = (-30.0, 20.0)  # the original's bounds


class LTXVAE(nnx.Module):
    """Encoder and decoder. See the module's docstring."""

    def __init__(self, config: LTXVAEConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.encoder = LTXEncoder(config, rngs=rngs)
        self.decoder = LTXDecoder(config, rngs=rngs)

    @property
    def tiles(self) -> Tiles:
        """How `models.tiles` cuts frames that are encoded: at most 32 latent cells, 1024 pixels, a side at once."""
        return Tiles(size=32, halo=4, blend=2, chunk=1)

    @property
    def windows(self) -> Windows | None:
        """How latents of a decoder that sees later frames are cut in time; None of a causal one, which takes a stream.

        193 frames and fewer (diffusers' default is 161) are one window, decoded as diffusers does. Of longer clips the
        windows are 66 dB (at 0.9.0's depth) and 75 dB (0.9.5's) from the whole with drawn weights; with an overlap of 6
        they would be 47 and 55.
        """
        return None if self.config.decoder_causal else Windows(frames=8, overlap=8)

    def raw_latents(self, latents: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """What a decoder that sees later frames is given of normalised latents [y,x,c], one after another.

        Noise, `config.decode_noise` of it, is the same each time.
        """
        mean, std = (np.asarray(own, np.float32) for own in (self.config.latent_mean, self.config.latent_std))
        share = self.config.decode_noise if self.config.timestep_conditioning else 0.0
        generator = np.random.default_rng(0)
        for latent in latents:
            raw = latent * std + mean
            yield add_noise(raw, generator.standard_normal(raw.shape, np.float32), share) if share else raw

    def encode(self, clip_btyxc: Pixels) -> tuple[Latent, Latent]:
        """Mean and log variance of the raw latent of a clip in [-1, 1] with 1 + 8k frames.

        Height and width must be multiples of `config.compression`. The log variance is the same for all channels.

        Raises:
          UserError: the clip doesn't fill whole latent cells.
        """
        if self.config.encoder_causal:
            return self._encode(clip_btyxc, ConvCache(), self.config.remat)
        return self._encode(clip_btyxc, None, self.config.remat)

    def decode(
        self, latent_btyxc: Latent, timestep_b: jax.Array | float | None = None, noise: Noise | None = None
    ) -> Pixels:
        """The clip (not clipped to [-1, 1]) of a raw latent: 1 + k latent frames give 1 + 8k frames.

        Args:
          timestep_b: how noisy the latent is said to be, 0…1, of each clip or of all; None: `config.decode_timestep`.
            Only of models with `timestep_conditioning`.
          noise: gives the numbers that a model with `decoder_inject_noise` adds in its layers, in their order; None:
            nothing is added, and the result is the same each time. diffusers draws them from torch's own generator.

        Raises:
          UserError: the latent is of another autoencoder; or a timestep is given to a model that takes none.
        """
        kept = ConvCache() if self.config.decoder_causal else None
        return self._decode(latent_btyxc, timestep_b, noise, kept, self.config.remat)

    def encode_chunk(
        self, chunk_btyxc: Pixels, cache: Sequence[jax.Array] | None = None
    ) -> tuple[Latent, Latent, Cache]:
        """One chunk of a stream: the first has 1 + 8k frames and no cache, later ones 8k and the last one's cache.

        Returns the mean, the log variance and the cache for the next chunk.

        Raises:
          UserError: the chunk's frames or pixels don't fill whole latent cells; or the encoder isn't causal.
        """
        if not self.config.encoder_causal:
            raise _not_causal("encoder", "encode")
        kept = ConvCache(cache)
        return *self._encode(chunk_btyxc, kept), tuple(kept.new)

    def decode_chunk(
        self,
        latent_btyxc: Latent,
        cache: Sequence[jax.Array] | None = None,
        timestep_b: jax.Array | float | None = None,
        noise: Noise | None = None,
    ) -> tuple[Pixels, Cache]:
        """One chunk of a stream of latents: the first gives 1 + 8(t-1) frames, later ones 8t each.

        Raises:
          UserError: the decoder isn't causal, as none of the published ones is.
        """
        if not self.config.decoder_causal:
            raise _not_causal("decoder", "decode")
        kept = ConvCache(cache)
        return self._decode(latent_btyxc, timestep_b, noise, kept), tuple(kept.new)

    def to_latent(self, clip_btyxc: Pixels) -> Latent:
        """The latent as the transformer sees it: the mean, each channel at mean 0 and deviation 1."""
        mean, std = jnp.array(self.config.latent_mean), jnp.array(self.config.latent_std)
        return (self.encode(clip_btyxc)[0] - mean) / std

    def _encode(
        self, chunk: jax.Array, kept: ConvCache | None, remat: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        check_clip(chunk.shape, self.config.compression, kept is None or kept.first)
        x = patchify(jnp.asarray(chunk).astype(self.config.dtype), self.config.patch_size)
        x = self.encoder(x, kept, remat).astype(jnp.float32)
        mean, logvar = x[..., :-1], x[..., -1:]
        return mean, jnp.broadcast_to(jnp.clip(logvar, *_LOG_VARIANCE), mean.shape)

    def _decode(
        self,
        latent: jax.Array,
        timestep: jax.Array | float | None,
        noise: Noise | None,
        kept: ConvCache | None,
        remat: bool = False,
    ) -> jax.Array:
        if latent.shape[-1] != self.config.channels or latent.shape[1] < 1:
            raise UserError(
                f"A latent of {latent.shape[1]} frames and {latent.shape[-1]} channels can't be decoded: this "
                f"autoencoder's have at least 1, and {self.config.channels}."
            )
        if timestep is not None and not self.config.timestep_conditioning:
            raise UserError("This autoencoder's decoder takes no timestep (LTX-Video 0.9.0's): leave it out.")
        own = self.config.decode_timestep if timestep is None else timestep
        timestep_b = jnp.broadcast_to(jnp.asarray(own, jnp.float32), latent.shape[:1])
        x = self.decoder(jnp.asarray(latent).astype(self.config.dtype), kept, timestep_b, noise, remat)
        return unpatchify(x, self.config.patch_size).astype(jnp.float32)


def add_noise(latent: Latent, noise: Latent, scale: float = DECODE_NOISE) -> Latent:
    """What a decoder with `timestep_conditioning` is given: (1 − scale) z + scale ε, of a raw latent (LTXPipeline)."""
    return (1 - scale) * latent + scale * noise


def _not_causal(half: str, whole: str) -> UserError:
    return UserError(
        f"This autoencoder's {half} sees later frames, so it can't take a stream chunk by chunk: {whole} whole clips "
        f"(`{whole}`)."
    )


class LTXEncoder(nnx.Module):
    """Patches of pixels to the mean, and one log variance behind it."""

    def __init__(self, config: LTXVAEConfig, *, rngs: nnx.Rngs) -> None:
        downs, epsilon = config.downs, config.resnet_norm_eps
        self.conv_in = Conv(3 * config.patch_size**2, downs[0].width_in, rngs=rngs)
        self.down_blocks = nnx.List([DownStage(down, epsilon, rngs=rngs) for down in downs])
        width = downs[-1].width_out
        self.mid_block = MiddleBlock(width, config.layers_per_block[-1], epsilon, rngs=rngs)
        self.conv_out = Conv(width, config.latent_channels + 1, rngs=rngs)

    def __call__(self, x: jax.Array, cache: ConvCache | None, remat: bool = False) -> jax.Array:
        x = self.conv_in(x, cache)
        for block in (*self.down_blocks, self.mid_block):
            x = run_block(block, x, cache, remat=remat)
        x = rms_norm(x, epsilon=EPSILON)
        return self.conv_out(jax.nn.silu(x), cache)


class LTXDecoder(nnx.Module):
    """Latents to patches of pixels."""

    def __init__(self, config: LTXVAEConfig, *, rngs: nnx.Rngs) -> None:
        epsilon, timed = config.resnet_norm_eps, config.timestep_conditioning
        width = config.decoder_block_out_channels[-1]
        self.conv_in = Conv(config.latent_channels, width, rngs=rngs)
        blocks, noisy = config.decoder_layers_per_block[-1], config.decoder_inject_noise[-1]
        self.mid_block = MiddleBlock(width, blocks, epsilon, timed, noisy, rngs=rngs)
        self.up_blocks = nnx.List([UpStage(up, epsilon, timed, rngs=rngs) for up in config.ups])
        width = config.ups[-1].width_out
        self.conv_out = Conv(width, 3 * config.patch_size**2, rngs=rngs)
        self.timestep_scale_multiplier = nnx.Param(jnp.array(TIMESTEPS)) if timed else None
        self.time_embedder = TimeEmbedder(2 * width, rngs=rngs) if timed else None
        self.scale_shift_table = nnx.Param(jnp.zeros((2, width))) if timed else None

    def __call__(
        self,
        x: jax.Array,
        cache: ConvCache | None,
        timestep_b: jax.Array,
        noise: Noise | None,
        remat: bool = False,
    ) -> jax.Array:
        if self.timestep_scale_multiplier is not None:
            timestep_b = timestep_b * self.timestep_scale_multiplier[...]
        x = self.conv_in(x, cache)
        for block in (self.mid_block, *self.up_blocks):
            x = run_block(block, x, cache, timestep_b, noise, remat=remat)
        x = rms_norm(x, epsilon=EPSILON)
        if self.time_embedder is not None and self.scale_shift_table is not None:
            own = self.scale_shift_table[...]
            x = modulate(x, self.time_embedder(timestep_b).reshape(-1, *own.shape) + own, 0)
        return self.conv_out(jax.nn.silu(x), cache)
