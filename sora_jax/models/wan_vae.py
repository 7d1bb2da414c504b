"""Wan's video autoencoders, 2.1 and 2.2, as diffusers' AutoencoderKLWan computes them (Wan team 2025, section 4.1).

They have the face of `vae.VAE` and stream as it does: 1 + 4k frames are 1 + k latent frames. The middle of each half
has attention among all cells of a frame; what stands before it in the encoder and after it in the decoder has a finite
receptive field (9 latent cells, and 13). So each half is also there in two parts, `encode_local` and `encode_global`,
`decode_global` and `decode_local`: `models.tiles` runs the global one on whole frames, at latent resolution, which is
a hundredth of the work, and the local one tile by tile; with the full halo tiles then are the whole frame, up to
rounding, where the original's aren't.

Modules are named as in the original's files, but for their indices of layers without parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from sora_jax.axes import Latent, Pixels
from sora_jax.errors import UserError
from sora_jax.models.conv import CausalConv, ConvCache, Stride, check_clip, patchify, run_block, unpatchify
from sora_jax.models.layers import Linear
from sora_jax.models.tiles import Tiles
from sora_jax.models.wan_layers import (
    Downsample,
    FrameAttention,
    MiddleBlock,
    ResidualBlock,
    RMSNorm,
    Upsample,
    average_down,
    copy_up,
)
from sora_jax.models.wan_vae_config import WanVAEConfig

Cache = tuple[jax.Array, ...]
_LOG_VARIANCE = (-30.0, 20.0)  # the original's bounds


class WanVAE(nnx.Module):
    """Encoder and decoder. See the module's docstring."""

    def __init__(self, config: WanVAEConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.encoder = WanEncoder(config, rngs=rngs)
        self.quant_conv = Linear(2 * config.z_dim, 2 * config.z_dim, rngs=rngs)
        self.post_quant_conv = Linear(config.z_dim, config.z_dim, rngs=rngs)
        self.decoder = WanDecoder(config, rngs=rngs)

    @property
    def tiles(self) -> Tiles:
        """How `models.tiles` cuts frames where nothing else is asked for.

        The finest stage has 64 places a latent cell, four frames a latent frame. One latent frame at a time, and tiles
        of as many cells as make an activation there 400 MB in float32: 64 a side for Wan 2.1, 39 for 2.2. A halo of 5
        of 13 cells: tiles differ from the whole by 88 dB with drawn weights, less than a bit of a byte does.
        """
        return Tiles(
            size=max(24, int(64 * (96 / self.config.decoder_widths[-1]) ** 0.5)), halo=5, blend=2, chunk=1
        )

    def encode(self, clip_btyxc: Pixels) -> tuple[Latent, Latent]:
        """Mean and log variance of the raw latent of a clip in [-1, 1] with 1 + 4k frames.

        Height and width must be multiples of `config.compression`.
        """
        kept = ConvCache(remat=self.config.remat)
        return self._encode_global(self._encode_local(clip_btyxc, kept), kept)

    def decode(self, latent_btyxc: Latent) -> Pixels:
        """The clip (not clipped to [-1, 1]) of a raw latent: 1 + k latent frames give 1 + 4k frames."""
        kept = ConvCache(remat=self.config.remat)
        return self._decode_local(self._decode_global(latent_btyxc, kept), kept)

    def encode_chunk(
        self, chunk_btyxc: Pixels, cache: Sequence[jax.Array] | None = None
    ) -> tuple[Latent, Latent, Cache]:
        """One chunk of a stream: the first has 1 + 4k frames and no cache, later ones 4k and the last one's cache.

        Returns the mean, the log variance and the cache for the next chunk.

        Raises:
          UserError: the chunk's frames or pixels don't fill whole latent cells.
        """
        kept = ConvCache(cache)
        return *self._encode_global(self._encode_local(chunk_btyxc, kept), kept), tuple(kept.new)

    def decode_chunk(
        self, latent_btyxc: Latent, cache: Sequence[jax.Array] | None = None
    ) -> tuple[Pixels, Cache]:
        """One chunk of a stream of latents: the first gives 1 + 4(t-1) frames, later ones 4t each."""
        kept = ConvCache(cache)
        return self._decode_local(self._decode_global(latent_btyxc, kept), kept), tuple(kept.new)

    def to_latent(self, clip_btyxc: Pixels) -> Latent:
        """The latent as the DiT sees it: the mean, each channel at mean 0 and deviation 1."""
        mean, std = jnp.array(self.config.latent_mean), jnp.array(self.config.latent_std)
        return (self.encode(clip_btyxc)[0] - mean) / std

    def encode_local(
        self, chunk_btyxc: Pixels, cache: Sequence[jax.Array] | None = None
    ) -> tuple[Latent, Cache]:
        """The part of `encode_chunk` that tiles may do: features [B,t,y,x,width] at latent resolution."""
        kept = ConvCache(cache)
        return self._encode_local(chunk_btyxc, kept), tuple(kept.new)

    def encode_global(
        self, features_btyxc: Latent, cache: Sequence[jax.Array] | None = None
    ) -> tuple[Latent, Latent, Cache]:
        """The rest of it, of whole frames."""
        kept = ConvCache(cache)
        return *self._encode_global(features_btyxc, kept), tuple(kept.new)

    def decode_global(
        self, latent_btyxc: Latent, cache: Sequence[jax.Array] | None = None
    ) -> tuple[Latent, Cache]:
        """The part of `decode_chunk` that needs whole frames: features [B,t,y,x,width] at latent resolution."""
        kept = ConvCache(cache)
        return self._decode_global(latent_btyxc, kept), tuple(kept.new)

    def decode_local(
        self, features_btyxc: Latent, cache: Sequence[jax.Array] | None = None
    ) -> tuple[Pixels, Cache]:
        """The rest of it, which tiles may do."""
        kept = ConvCache(cache)
        return self._decode_local(features_btyxc, kept), tuple(kept.new)

    def _encode_local(self, chunk: jax.Array, kept: ConvCache) -> jax.Array:
        check_clip(chunk.shape, self.config.compression, kept.first)
        x = patchify(jnp.asarray(chunk).astype(self.config.dtype), self.config.patch_size or 1)
        return self.encoder.local(x, kept)

    def _encode_global(self, features: jax.Array, kept: ConvCache) -> tuple[jax.Array, jax.Array]:
        x = self.encoder.whole(features.astype(self.config.dtype), kept)
        mean, logvar = jnp.split(self.quant_conv(x).astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, *_LOG_VARIANCE)

    def _decode_global(self, latent: jax.Array, kept: ConvCache) -> jax.Array:
        if latent.shape[-1] != self.config.channels or latent.shape[1] < 1:
            raise UserError(
                f"A latent of {latent.shape[1]} frames and {latent.shape[-1]} channels can't be decoded: this "
                f"autoencoder's have at least 1, and {self.config.channels}."
            )
        x = self.post_quant_conv(jnp.asarray(latent).astype(self.config.dtype))
        return self.decoder.whole(x, kept)

    def _decode_local(self, features: jax.Array, kept: ConvCache) -> jax.Array:
        x = self.decoder.local(features.astype(self.config.dtype), kept)
        return unpatchify(x, self.config.patch_size or 1).astype(jnp.float32)


class WanEncoder(nnx.Module):
    """Patches of pixels to the features that `WanVAE.quant_conv` takes."""

    def __init__(self, config: WanVAEConfig, *, rngs: nnx.Rngs) -> None:
        widths = config.encoder_widths
        self.conv_in = CausalConv(config.in_channels, widths[0], 1.0, rngs=rngs)
        blocks: list[nnx.Module] = []
        strides = (*config.strides, None)
        for i, (width_in, width, stride) in enumerate(zip(widths, widths[1:], strides)):
            if config.is_residual:
                blocks.append(DownStage(width_in, width, stride, config.num_res_blocks, rngs=rngs))
                continue
            for _ in range(config.num_res_blocks):
                blocks.append(ResidualBlock(width_in, width, rngs=rngs))
                if 2.0**-i in config.attn_scales:
                    blocks.append(FrameAttention(width, rngs=rngs))
                width_in = width
            if stride is not None:
                blocks.append(Downsample(width, stride[0] > 1, rngs=rngs))
        self.down_blocks = nnx.List(blocks)
        self.mid_block = MiddleBlock(widths[-1], rngs=rngs)
        self.norm_out = RMSNorm(widths[-1])
        self.conv_out = CausalConv(widths[-1], 2 * config.z_dim, 1.0, rngs=rngs)

    def local(self, x: jax.Array, cache: ConvCache) -> jax.Array:
        x = self.conv_in(x, cache)
        for block in self.down_blocks:
            x = block(x, cache) if isinstance(block, DownStage) else run_block(block, x, cache)
        return x

    def whole(self, x: jax.Array, cache: ConvCache) -> jax.Array:
        x = self.mid_block(x, cache)
        return self.conv_out(jax.nn.silu(self.norm_out(x)), cache)


class WanDecoder(nnx.Module):
    """What `WanVAE.post_quant_conv` gives to patches of pixels."""

    def __init__(self, config: WanVAEConfig, *, rngs: nnx.Rngs) -> None:
        widths = config.decoder_widths
        self.conv_in = CausalConv(config.z_dim, widths[0], 1.0, rngs=rngs)
        self.mid_block = MiddleBlock(widths[0], rngs=rngs)
        blocks, before = [], widths[0]
        for width, stride in zip(widths[1:], (*config.strides[::-1], None)):
            after = width if config.is_residual else width // 2  # of the upsampling
            sizes = before, width, after
            blocks.append(UpStage(sizes, stride, config.num_res_blocks + 1, config.is_residual, rngs=rngs))
            before = after
        self.up_blocks = nnx.List(blocks)
        self.norm_out = RMSNorm(widths[-1])
        self.conv_out = CausalConv(widths[-1], config.out_channels, 1.0, rngs=rngs)

    def whole(self, x: jax.Array, cache: ConvCache) -> jax.Array:
        return self.mid_block(self.conv_in(x, cache), cache)

    def local(self, x: jax.Array, cache: ConvCache) -> jax.Array:
        for block in self.up_blocks:
            x = block(x, cache)
        return self.conv_out(jax.nn.silu(self.norm_out(x)), cache)


class DownStage(nnx.Module):
    """Wan 2.2's: residual blocks and downsampling, beside it averages of what came in."""

    def __init__(
        self, width_in: int, width: int, stride: Stride | None, blocks: int, *, rngs: nnx.Rngs
    ) -> None:
        self.width, self.stride = width, stride or (1, 1, 1)
        self.resnets = _blocks(width_in, width, blocks, rngs)
        self.downsampler = None if stride is None else Downsample(width, stride[0] > 1, rngs=rngs)

    def __call__(self, x: jax.Array, cache: ConvCache) -> jax.Array:
        short = average_down(x, self.width, self.stride)
        for block in self.resnets:
            x = run_block(block, x, cache)
        return short + (x if self.downsampler is None else run_block(self.downsampler, x, cache))


class UpStage(nnx.Module):
    """Residual blocks and upsampling; in Wan 2.2 copies of what came in are beside both."""

    def __init__(
        self,
        widths: tuple[int, int, int],
        stride: Stride | None,
        blocks: int,
        is_residual: bool,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        width_in, width, self.width_out = widths
        self.shortcut = stride if is_residual else None
        self.resnets = _blocks(width_in, width, blocks, rngs)
        self.upsampler = None if stride is None else Upsample(width, self.width_out, stride[0] > 1, rngs=rngs)

    def __call__(self, x: jax.Array, cache: ConvCache) -> jax.Array:
        came_in = x
        for block in self.resnets:
            x = run_block(block, x, cache)
        if self.upsampler is not None:
            x = run_block(self.upsampler, x, cache)
        return (
            x if self.shortcut is None else x + copy_up(came_in, self.width_out, self.shortcut, cache.first)
        )


def _blocks(width_in: int, width: int, count: int, rngs: nnx.Rngs) -> nnx.List:
    return nnx.List([ResidualBlock(width if i else width_in, width, rngs=rngs) for i in range(count)])
