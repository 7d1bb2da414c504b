"""The video autoencoder: a clip of pixels to a small grid of latents and back, causal in time.

Time is downsampled in groups (of four, by default), and the first group is the clip's first frame repeated four times:
1 + 4k frames become 1 + k latent frames, an image is a clip of one frame, and no layer treats it as a special case.
Space-to-depth moves space and time to channels (first as a Haar wavelet, directly followed by one of space, so most
work is at a 32nd of the pixels), with residual blocks of causal 3-D convolutions in between. Every block begins as the
identity, so training begins at a linear autoencoder, that is, near PCA.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from sora_jax.axes import Latent, Pixels
from sora_jax.backend import onednn
from sora_jax.distributed.mesh import constrain, platform
from sora_jax.errors import UserError
from sora_jax.models.layers import Linear

Stride = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Shape of the autoencoder. Stage i follows stride i; `decoder_*` are listed from fine to coarse too.

    Attributes:
      kind: "learned", or "pixels": no network, a latent cell is the pixels it spans (`models.pixels`); of the other
        fields only `strides`, `channels`, `latent_mean` and `latent_std` then mean something.
      strides: of space-to-depth in (time, height, width); the first must be (2, 2, 2), the Haar wavelet.
      channels: numbers a latent cell.
      encoder_widths, encoder_blocks: channels and residual blocks of each stage.
      decoder_widths, decoder_blocks: the same for the way back.
      latent_mean, latent_std: per channel, measured after training; `to_latent` uses them.
      dtype: of the arithmetic; parameters stay float32. Accelerators round the factors of float32 products, to
        bfloat16 (TPUs) or TF32 (GPUs), except the wavelet's.
    """

    # Not in the repr, which identifies latents that are stored already.
    kind: Literal["learned", "pixels"] = dataclasses.field(default="learned", repr=False)
    strides: tuple[Stride, ...] = ((2, 2, 2), (1, 2, 2), (2, 2, 2))
    channels: int = 16
    encoder_widths: tuple[int, ...] = (24, 64, 160)
    encoder_blocks: tuple[int, ...] = (0, 1, 2)
    decoder_widths: tuple[int, ...] = (32, 96, 160)
    decoder_blocks: tuple[int, ...] = (1, 2, 3)
    latent_mean: tuple[float, ...] = (0.0,)
    latent_std: tuple[float, ...] = (1.0,)
    dtype: Literal["bfloat16", "float16", "float32"] = "float32"

    def __post_init__(self) -> None:
        if self.kind == "pixels":
            pixels = math.prod(self.compression)
            if self.channels not in (pixels, 3 * pixels):
                raise UserError(
                    f"vae.channels={self.channels} can't hold the {pixels} pixels of a cell of vae.strides: set "
                    f"{3 * pixels} (colour) or {pixels} (grey)."
                )
            return
        if tuple(self.strides[0]) != (2, 2, 2):
            raise UserError(
                f"vae.strides begins with {self.strides[0]}, but the first stride must be (2, 2, 2)."
            )
        for name in ("encoder_widths", "encoder_blocks", "decoder_widths", "decoder_blocks"):
            if len(getattr(self, name)) != len(self.strides):
                raise UserError(
                    f"vae.{name} needs one number for each of the {len(self.strides)} vae.strides."
                )

    @property
    def compression(self) -> Stride:
        """Pixels a latent cell spans: (frames, height, width)."""
        time, height, width = (math.prod(axis) for axis in zip(*self.strides, strict=True))
        return time, height, width


class ConvCache:
    """The last two inputs of each causal convolution, kept between the chunks of a stream.

    A whole clip is a stream of one chunk, whose cache is zeros. `first`: whether this is a stream's first chunk.
    """

    def __init__(self, steps: Sequence[jax.Array] | None = None) -> None:
        self.first = steps is None
        self._old: Iterator[jax.Array] | None = None if steps is None else iter(steps)
        self.new: list[jax.Array] = []

    def extend(self, x: jax.Array, steps: int) -> jax.Array:
        """Puts the last `steps` inputs before x [B,T,Y,X,C], and caches x's own."""
        shape = x.shape[0], steps, *x.shape[2:]
        before = jnp.zeros_like(x, shape=shape) if self._old is None else next(self._old)
        x = jnp.concatenate([before, x], axis=1)
        self.new.append(x[:, -steps:])
        return x


def space_to_depth(x: jax.Array, stride: Stride) -> jax.Array:
    """Space and time to depth: [B, T, Y, X, C] → [B, T/a, Y/b, X/c, abc·C]."""
    (B, T, Y, X, C), (a, b, c) = x.shape, stride
    x = x.reshape(B, T // a, a, Y // b, b, X // c, c, C).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(B, T // a, Y // b, X // c, a * b * c * C)


def depth_to_space(x: jax.Array, stride: Stride) -> jax.Array:
    """The inverse of `space_to_depth`."""
    (B, T, Y, X, C), (a, b, c) = x.shape, stride
    x = x.reshape(B, T, Y, X, a, b, c, C // (a * b * c)).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(B, T * a, Y * b, X * c, C // (a * b * c))


def haar(x: jax.Array) -> jax.Array:
    """Orthonormal Haar wavelet over the eight values of each 2×2×2 cube: [..., 8C] → [..., 8C].

    Symmetric and its own inverse (the Hadamard matrix of order 8 over √8).
    """
    h2 = jnp.array([[1.0, 1.0], [1.0, -1.0]], x.dtype) / math.sqrt(2.0)
    h8 = jnp.kron(jnp.kron(h2, h2), h2)
    cubes = x.reshape(*x.shape[:-1], 8, x.shape[-1] // 8)
    # Exact in float32: it is part of the parameters of the projections beside it.
    return jnp.einsum("...ic,ij->...jc", cubes, h8, precision="highest").reshape(x.shape)


def causal_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """3-D convolution that sees no later time step: x [B, T+2, Y, X, I], kernel [3,3,3,I,O] → [B,T,Y,X,O].

    The caller has put the two steps before x in front of it. XLA's CPU backend is slow at 3-D convolutions unless it
    may call oneDNN (`backend.onednn`); without, the three time taps are stacked as channels of one 2-D convolution,
    which is 1.4 to 6 times faster there (experiments/LOG.md).
    """
    if platform() != "cpu" or onednn():
        return conv3d(x, kernel)
    B, T, Y, X, C = x.shape
    T -= 2
    taps = jnp.concatenate([x[:, k : k + T] for k in range(3)], axis=-1).reshape(B * T, Y, X, 3 * C)
    flat = kernel.transpose(1, 2, 0, 3, 4).reshape(3, 3, 3 * C, -1)
    out = jax.lax.conv_general_dilated(taps, flat, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return out.reshape(B, T, Y, X, -1)


def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1, 1), ((0, 0), (1, 1), (1, 1)), dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )


conv3d = jax.custom_vjp(_convolve)
"""Valid along time, any number of taps [K,3,3,I,O] there; its gradient is in forms that CPUs are fast at."""


def _conv3d_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return conv3d(x, kernel), (x, kernel)


def _conv3d_backward(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    # The input's gradient is a convolution too, by the mirrored kernel. Written as one it is a plain forward
    # convolution: twice as fast on CPUs as the form that XLA derives, for which there is no library call.
    x, kernel = saved
    taps = kernel.shape[0] - 1
    padded = jnp.pad(grad, ((0, 0), (taps, taps), (0, 0), (0, 0), (0, 0)))
    grad_x = conv3d(padded, kernel[::-1, ::-1, ::-1].swapaxes(-1, -2))
    return grad_x, jax.linear_transpose(lambda k: _convolve(x, k), kernel)(grad)[0]


conv3d.defvjp(_conv3d_forward, _conv3d_backward)


class CausalConv(nnx.Module):
    """A causal 3×3×3 convolution; the caller keeps its cache."""

    def __init__(self, width_in: int, width_out: int, scale: float, *, rngs: nnx.Rngs) -> None:
        std = scale / math.sqrt(27 * width_in)
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (3, 3, 3, width_in, width_out)))
        self.bias = nnx.Param(jnp.zeros(width_out))

    def __call__(self, x: jax.Array, cache: ConvCache) -> jax.Array:
        kernel = constrain(self.kernel[...].astype(x.dtype), "TYXCC")
        return causal_conv(cache.extend(x, 2), kernel) + self.bias[...].astype(x.dtype)


class Block(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm x))))), the second convolution zero at first.

    The norm is root mean square over channels, cell by cell: statistics over time or space would break
    causality and make tiles differ from the whole.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.scale = nnx.Param(jnp.ones((2, width)))
        self.first = CausalConv(width, width, 1.0, rngs=rngs)
        self.second = CausalConv(width, width, 0.0, rngs=rngs)

    def __call__(self, x: jax.Array, cache: ConvCache) -> jax.Array:
        scale = self.scale[...].astype(x.dtype)
        h = self.first(jax.nn.silu(_normalise(x) * scale[0]), cache)
        return x + self.second(jax.nn.silu(_normalise(h) * scale[1]), cache)


class VAE(nnx.Module):
    """Encoder and decoder. See the module's docstring."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        factors = [math.prod(stride) for stride in config.strides]
        widths_in = [3, *config.encoder_widths[:-1]]
        down = zip(factors, widths_in, config.encoder_widths, strict=True)
        self.down = nnx.List([Linear(f * i, o, rngs=rngs) for f, i, o in down])
        self.encoder = _stages(config.encoder_widths, config.encoder_blocks, rngs)
        self.to_moments = Linear(config.encoder_widths[-1], 2 * config.channels, rngs=rngs)
        self.from_channels = Linear(config.channels, config.decoder_widths[-1], rngs=rngs)
        self.decoder = _stages(config.decoder_widths, config.decoder_blocks, rngs)
        widths_out = [3, *config.decoder_widths[:-1]]
        up = zip(factors, config.decoder_widths, widths_out, strict=True)
        self.up = nnx.List([Linear(i, f * o, rngs=rngs) for f, i, o in up])

    def encode(self, clip_btyxc: Pixels) -> tuple[Latent, Latent]:
        """Mean and log variance of the latent of a clip in [-1, 1] with 1 + 4k frames.

        Height and width must be multiples of `config.compression`.
        """
        return self.encode_chunk(clip_btyxc)[:2]

    def decode(self, latent_btyxc: Latent) -> Pixels:
        """The clip (not clipped to [-1, 1]) of a raw latent: 1 + k latent frames give 1 + 4k frames."""
        return self.decode_chunk(latent_btyxc)[0]

    def encode_chunk(
        self, chunk_btyxc: Pixels, cache: Sequence[jax.Array] | None = None
    ) -> tuple[Latent, Latent, tuple[jax.Array, ...]]:
        """One chunk of a stream: the first has 1 + 4k frames and no cache, later ones 4k and the last one's cache.

        Returns the mean, the log variance and the cache for the next chunk.

        Raises:
          UserError: the chunk's frames or pixels don't fill whole latent cells.
        """
        x = self._whole_groups(chunk_btyxc, first=cache is None).astype(self.config.dtype)
        conv_cache = ConvCache(cache)
        stages = zip(self.config.strides, self.down, self.encoder, strict=True)
        for i, (stride, down, blocks) in enumerate(stages):
            x = space_to_depth(x, stride)
            x = down(x, before=haar if i == 0 else None)
            for block in blocks:
                x = block(x, conv_cache)
        mean, logvar = jnp.split(self.to_moments(x).astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -20.0, 10.0), tuple(conv_cache.new)

    def decode_chunk(
        self, latent_btyxc: Latent, cache: Sequence[jax.Array] | None = None
    ) -> tuple[Pixels, tuple[jax.Array, ...]]:
        """One chunk of a stream of latents: the first gives 1 + 4(t-1) frames, later ones 4t each."""
        conv_cache = ConvCache(cache)
        x = self.from_channels(latent_btyxc.astype(self.config.dtype))
        stages = list(zip(self.config.strides, self.up, self.decoder, strict=True))
        for i, (stride, up, blocks) in reversed(list(enumerate(stages))):
            for block in blocks:
                x = block(x, conv_cache)
            x = depth_to_space(up(x, after=haar if i == 0 else None), stride)
        if cache is None:
            x = x[:, self.config.compression[0] - 1 :]
        return x.astype(jnp.float32), tuple(conv_cache.new)

    def to_latent(self, clip_btyxc: Pixels) -> Latent:
        """The latent as the DiT sees it: the mean, each channel at mean 0 and deviation 1."""
        mean, std = jnp.array(self.config.latent_mean), jnp.array(self.config.latent_std)
        return (self.encode(clip_btyxc)[0] - mean) / std

    def _whole_groups(self, chunk_btyxc: Pixels, first: bool) -> Pixels:
        """The chunk, a clip's first one with its first frame repeated until it is a group."""
        time = self.config.compression[0]
        check_clip(chunk_btyxc.shape, self.config.compression, first)
        if not first:
            return chunk_btyxc
        return jnp.concatenate([jnp.repeat(chunk_btyxc[:, :1], time - 1, axis=1), chunk_btyxc], axis=1)


def check_clip(shape: Sequence[int], compression: Stride, first: bool = True) -> None:
    """Raises UserError where a chunk of pixels of this shape [B,T,Y,X,C] doesn't fill whole latent cells.

    `first`: whether it is a stream's first chunk, whose first frame is a latent frame of its own.
    """
    time, height, width = compression
    if shape[2] % height or shape[3] % width:
        raise UserError(
            f"A clip of {shape[2]}×{shape[3]} pixels is no multiple of {height}×{width}: pad it first."
        )
    if shape[1] < 1 or (shape[1] - first) % time:
        allowed = (
            f"1, {1 + time}, {1 + 2 * time}, …" if first else f"a multiple of {time}, since it continues one"
        )
        raise UserError(f"A clip of {shape[1]} frames can't be encoded: their number must be {allowed}.")


def reconstruction_flops(config: VAEConfig, clips: int, frames: int, height: int, width: int) -> float:
    """Floating-point operations (2 per multiply-add) of one encode and decode, convolutions and linears."""
    size = clips, frames, height, width
    encoding = _one_way_flops(config, size, config.encoder_widths, config.encoder_blocks, 2)
    return encoding + decoding_flops(config, *size)


def decoding_flops(config: VAEConfig, clips: int, frames: int, height: int, width: int) -> float:
    """Of one decode, as above."""
    size = clips, frames, height, width
    return _one_way_flops(config, size, config.decoder_widths, config.decoder_blocks, 1)


def _one_way_flops(
    config: VAEConfig,
    size: tuple[int, int, int, int],
    widths: Sequence[int],
    blocks: Sequence[int],
    ends: int,
) -> float:
    """`ends`: how many numbers a channel of the latent has there: a mean and a variance, or a value."""
    if config.kind == "pixels":
        return 0.0
    clips, frames, height, width = size
    cells = float(clips * (frames + config.compression[0] - 1) * height * width)
    total, before = 0.0, 3
    for stride, stage, count in zip(config.strides, widths, blocks, strict=True):
        factor = math.prod(stride)
        cells /= factor
        total += 2 * cells * (factor * before * stage + 2 * 27 * count * stage * stage)
        before = stage
    return total + 2 * cells * config.channels * ends * before


def _stages(widths: Sequence[int], blocks: Sequence[int], rngs: nnx.Rngs) -> nnx.List:
    return nnx.List(
        [nnx.List([Block(w, rngs=rngs) for _ in range(n)]) for w, n in zip(widths, blocks, strict=True)]
    )


def _normalise(x: jax.Array) -> jax.Array:
    square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(square + 1e-6).astype(x.dtype)
