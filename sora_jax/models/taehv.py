"""TAEHV's decoder (Ollin Boer Bohan, github.com/madebyollin/taehv): a small network that decodes latents for a preview.

Convolutions of single frames, and in each block one frame of memory. It decodes the normalised latents of the
autoencoder that it was distilled from, such as taew2_1's of Wan 2.1, at a small part of its cost. It streams as the
package's own does: one latent frame gives `compression[0]` frames, of which the first latent frame keeps the last one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from sora_jax.axes import Latent, Pixels
from sora_jax.models.conv import ConvCache, Stride, depth_to_space, frame_conv
from sora_jax.models.tiles import Tiles
from sora_jax.models.wan_layers import doubled_conv

BLOCKS = 3  # with memory, in each of the three stages
Cache = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class TAEHVConfig:
    """A decoder's shape.

    Attributes:
      channels: of a latent cell.
      widths: of the three stages, and after them.
      strides: frames that a stage makes of one.
      patch: side of the squares of pixels that the last layer makes.
      dtype: of the arithmetic.
    """

    channels: int = 16
    widths: tuple[int, int, int, int] = (256, 128, 64, 64)
    strides: tuple[int, int, int] = (1, 2, 2)
    patch: int = 1
    dtype: str = "float32"

    @property
    def compression(self) -> Stride:
        """Frames, height and width of a latent cell."""
        return math.prod(self.strides), 8 * self.patch, 8 * self.patch

    @property
    def latent_mean(self) -> tuple[float, ...]:
        """Zeros: it takes normalised latents."""
        return (0.0,) * self.channels

    @property
    def latent_std(self) -> tuple[float, ...]:
        """Ones."""
        return (1.0,) * self.channels


class FrameConv(nnx.Module):
    """A convolution of each frame, with as many cells as before."""

    def __init__(
        self, width_in: int, width_out: int, side: int = 3, bias: bool = True, *, rngs: nnx.Rngs
    ) -> None:
        std = 1 / math.sqrt(side * side * width_in)
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (side, side, width_in, width_out)))
        self.bias = nnx.Param(jnp.zeros(width_out)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        pad = self.kernel.shape[0] // 2
        out = frame_conv(x, self.kernel[...].astype(x.dtype), (1, 1), ((pad, pad), (pad, pad)))
        return out if self.bias is None else out + self.bias[...].astype(x.dtype)


class MemoryBlock(nnx.Module):
    """relu(x + three convolutions of x and the frame before it)."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.convs = nnx.List(
            [FrameConv(2 * width if first else width, width, rngs=rngs) for first in (True, False, False)]
        )

    def __call__(self, x: jax.Array, cache: ConvCache) -> jax.Array:
        before = cache.extend(x, 1)[:, :-1]
        first, second, third = self.convs
        h = jax.nn.relu(first(jnp.concatenate([x, before], axis=-1)))
        return jax.nn.relu(x + third(jax.nn.relu(second(h))))


class Stage(nnx.Module):
    """Blocks, then `stride` frames of each and twice their sides."""

    def __init__(self, width_in: int, width_out: int, stride: int, *, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([MemoryBlock(width_in, rngs=rngs) for _ in range(BLOCKS)])
        self.grow = FrameConv(width_in, width_in * stride, side=1, bias=False, rngs=rngs)
        self.conv = FrameConv(width_in, width_out, bias=False, rngs=rngs)

    def __call__(self, x: jax.Array, cache: ConvCache) -> jax.Array:
        for block in self.blocks:
            x = block(x, cache)
        B, T, Y, X, C = x.shape
        # The original repeats cells first; a matrix of single cells gives the same before that.
        x = self.grow(x).reshape(B, T, Y, X, -1, C).transpose(0, 1, 4, 2, 3, 5).reshape(B, -1, Y, X, C)
        return doubled_conv(x, self.conv.kernel[...].astype(x.dtype))


class TAEHV(nnx.Module):
    """The decoder, as `models.tiles` takes one."""

    def __init__(self, config: TAEHVConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.conv_in = FrameConv(config.channels, config.widths[0], rngs=rngs)
        shapes = zip(config.widths, config.widths[1:], config.strides, strict=False)
        self.stages = nnx.List([Stage(*shape, rngs=rngs) for shape in shapes])
        self.conv_out = FrameConv(config.widths[-1], 3 * config.patch**2, rngs=rngs)

    @property
    def tiles(self) -> Tiles:
        """How `models.tiles` cuts frames where nothing else is asked for.

        The finest activation of a tile is 270 MB in float32 with a patch of 1. A cell sees 18 cells around it, most of
        them hardly: with a halo of 6 tiles differ from the whole by 79 dB with drawn weights.
        """
        return Tiles(size=64, halo=6, blend=2, chunk=1)

    def decode(self, latent_btyxc: Latent) -> Pixels:
        """The clip, in [-1, 1], of a normalised latent: 1 + k latent frames give 1 + 4k frames."""
        return self.decode_chunk(latent_btyxc)[0]

    def decode_chunk(
        self, latent_btyxc: Latent, cache: Sequence[jax.Array] | None = None
    ) -> tuple[Pixels, Cache]:
        """One chunk of a stream of latents: the first gives 1 + 4(t-1) frames, later ones 4t each."""
        kept = ConvCache(cache)
        x = jnp.tanh(latent_btyxc.astype(self.config.dtype) / 3) * 3
        x = jax.nn.relu(self.conv_in(x))
        for stage in self.stages:
            x = stage(x, kept)
        x = self.conv_out(jax.nn.relu(x)).astype(jnp.float32)
        if kept.first:
            x = x[:, self.config.compression[0] - 1 :]
        side = self.config.patch
        B, T, Y, X, _ = x.shape
        # The original's order of channels is colours, then places in the square.
        x = x.reshape(B, T, Y, X, 3, side * side).swapaxes(-1, -2).reshape(x.shape)
        return 2 * jnp.clip(depth_to_space(x, (1, side, side)), 0.0, 1.0) - 1, tuple(kept.new)
