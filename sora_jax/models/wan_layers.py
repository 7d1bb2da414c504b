"""Layers of Wan's video autoencoders, channels last, each a stream: what is kept between chunks is `conv.ConvCache`'s.

A clip's first frame is alone wherever time is halved or doubled: it passes as it is, and groups begin after it. The
original runs frame 0 and then each group by itself and keeps a cache; a whole clip in one chunk gives the same.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from sora_jax.distributed.mesh import constrain
from sora_jax.models.conv import (
    CausalConv,
    ConvCache,
    Stride,
    by_onednn,
    causal_conv,
    conv3d,
    depth_to_space,
    frame_conv,
    time_taps,
)
from sora_jax.models.layers import Linear

QUERIES = 1024  # whose scores are computed at a time: large frames take no more memory for them


class RMSNorm(nnx.Module):
    """x / max(‖x‖₂, 1e-12) · √C · γ over channels, in float32."""

    def __init__(self, width: int) -> None:
        self.gamma = nnx.Param(jnp.ones(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        square = jnp.sum(jnp.square(x32), axis=-1, keepdims=True)
        # The maximum under the root: 0 has a finite gradient.
        scale = math.sqrt(x.shape[-1]) * self.gamma[...]
        return (x32 * jax.lax.rsqrt(jnp.maximum(square, 1e-24)) * scale).astype(x.dtype)


class WideConv(CausalConv):
    """A causal convolution of so many channels that arithmetic takes its time, not memory."""

    def __call__(self, x: jax.Array, cache: ConvCache) -> jax.Array:
        kernel = constrain(self.kernel[...], "TYXCC")
        x = cache.extend(x, 2)
        paired = x.dtype == jnp.float32 and x.shape[1] % 2 == 0 and by_onednn()
        conv = conv_in_pairs if paired else causal_conv
        return conv(x, kernel.astype(x.dtype)) + self.bias[...].astype(x.dtype)


def conv_in_pairs(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`vae.causal_conv` of an even number of frames, with two thirds of its multiplications.

    Winograd's F(2, 3) along time (Lavin and Gray 2016, section 4.1): two frames of the result are sums of four
    convolutions of single frames, in place of six. In float32 it rounds no more than the plain sum does.
    """
    B, T, Y, X, _ = x.shape
    a, b, c, d = (x[:, k : T - 2 + k : 2] for k in range(4))
    outer, inner = (kernel[0] + kernel[2]) / 2, kernel[1] / 2
    taps = (a - c, kernel[0]), (b + c, outer + inner), (c - b, outer - inner), (b - d, kernel[2])
    first, both, turned, last = (conv3d(frames, tap[None]) for frames, tap in taps)
    pairs = jnp.stack([first + both + turned, both - turned - last], axis=2)
    return pairs.reshape(B, T - 2, Y, X, -1)


class ResidualBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm x))))); x through a matrix where the widths differ."""

    def __init__(self, width_in: int, width_out: int, *, rngs: nnx.Rngs) -> None:
        self.norm1 = RMSNorm(width_in)
        self.conv1 = WideConv(width_in, width_out, 1.0, rngs=rngs)
        self.norm2 = RMSNorm(width_out)
        self.conv2 = WideConv(width_out, width_out, 1.0, rngs=rngs)
        self.conv_shortcut = None if width_in == width_out else Linear(width_in, width_out, rngs=rngs)

    def __call__(self, x: jax.Array, cache: ConvCache) -> jax.Array:
        h = self.conv1(jax.nn.silu(self.norm1(x)), cache)
        h = self.conv2(jax.nn.silu(self.norm2(h)), cache)
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class FrameAttention(nnx.Module):
    """x + attention of one head among the cells of each frame."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.norm = RMSNorm(width)
        self.to_qkv = Linear(width, 3 * width, rngs=rngs)
        self.proj = Linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array, cache: ConvCache) -> jax.Array:
        """[B,T,Y,X,C]; needs nothing of earlier frames, so nothing of the cache."""
        B, T, Y, X, C = x.shape
        qkv = self.to_qkv(self.norm(x)).reshape(B * T, Y * X, 3 * C)
        return x + self.proj(jax.lax.map(_attend, qkv).reshape(x.shape))


def _attend(qkv: jax.Array) -> jax.Array:
    """Of one frame: [N, 3C] → [N, C]."""
    q, k, v = jnp.split(qkv, 3, axis=-1)

    def one(query: jax.Array) -> jax.Array:
        scores = jnp.dot(k, query, preferred_element_type=jnp.float32) / math.sqrt(query.shape[-1])
        return jax.nn.softmax(scores).astype(v.dtype) @ v

    return jax.vmap(one)(q) if len(q) <= QUERIES else jax.lax.map(one, q, batch_size=QUERIES)


class MiddleBlock(nnx.Module):
    """A residual block, attention, a residual block."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.resnets = nnx.List([ResidualBlock(width, width, rngs=rngs) for _ in range(2)])
        self.attentions = nnx.List([FrameAttention(width, rngs=rngs)])

    def __call__(self, x: jax.Array, cache: ConvCache) -> jax.Array:
        x = self.attentions[0](self.resnets[0](x, cache), cache)
        return self.resnets[1](x, cache)


class FrameConv(nnx.Module):
    """The parameters of a 3×3 convolution of single frames."""

    def __init__(self, width_in: int, width_out: int, *, rngs: nnx.Rngs) -> None:
        std = 1 / math.sqrt(9 * width_in)
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (3, 3, width_in, width_out)))
        self.bias = nnx.Param(jnp.zeros(width_out))

    def down(self, x: jax.Array) -> jax.Array:
        """At every second place of a frame padded below and to the right only, as the original pads."""
        kernel = constrain(self.kernel[...].astype(x.dtype), "YXCC")
        return frame_conv(x, kernel, (2, 2), ((0, 1), (0, 1))) + self.bias[...].astype(x.dtype)

    def up(self, x: jax.Array) -> jax.Array:
        """Of a frame whose cells are doubled, padded on all sides."""
        return doubled_conv(x, constrain(self.kernel[...], "YXCC")) + self.bias[...].astype(x.dtype)


class Downsample(nnx.Module):
    """Half the sides, and half the frames but for the clip's first."""

    def __init__(self, width: int, in_time: bool, *, rngs: nnx.Rngs) -> None:
        self.resample = FrameConv(width, width, rngs=rngs)
        self.time_conv = Linear(3 * width, width, rngs=rngs) if in_time else None

    def __call__(self, x: jax.Array, cache: ConvCache) -> jax.Array:
        x = self.resample.down(x)
        if self.time_conv is None:
            return x
        with_last = cache.extend(x, 1)
        if not cache.first:
            return self.time_conv(time_taps(with_last, 2))
        return jnp.concatenate([x[:, :1], self.time_conv(time_taps(x, 2))], axis=1)


class Upsample(nnx.Module):
    """Twice the sides, and twice the frames but for the clip's first."""

    def __init__(self, width: int, width_out: int, in_time: bool, *, rngs: nnx.Rngs) -> None:
        self.resample = FrameConv(width, width_out, rngs=rngs)
        self.time_conv = Linear(3 * width, 2 * width, rngs=rngs) if in_time else None

    def __call__(self, x: jax.Array, cache: ConvCache) -> jax.Array:
        if self.time_conv is not None:
            alone = int(cache.first)
            pairs = self.time_conv(time_taps(cache.extend(x[:, alone:], 2), 1))
            x = jnp.concatenate([x[:, :alone], depth_to_space(pairs, (2, 1, 1))], axis=1)
        return self.resample.up(x)


def doubled_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Each cell as 2×2 equal ones, then a 3×3 convolution padded by 1: [B,T,Y,X,I], [3,3,I,O] → [B,T,2Y,2X,O].

    Of three doubled cells in a row two are one cell, so each of a cell's 2×2 places is a 2×2 convolution of the cells
    themselves, whose taps are sums of the kernel's: 4/9 of the operations.
    """
    # [place, tap, three]: the first place sees (before, own, own), the second (own, own, after).
    sums = jnp.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], kernel.dtype)
    taps = jnp.einsum("ajy,bkx,yxio->abjkio", sums, sums, kernel, precision="highest").astype(x.dtype)
    places = [frame_conv(x, taps[a, b], (1, 1), ((1 - a, a), (1 - b, b))) for a in (0, 1) for b in (0, 1)]
    return depth_to_space(jnp.concatenate(places, axis=-1), (1, 2, 2))


def average_down(x: jax.Array, width_out: int, stride: Stride) -> jax.Array:
    """The mean of equally many values for each channel of the result, of all values of a cell in the order (C,T,Y,X).

    A clip's first frame is a group with zeros before it, as the original has it.
    """
    a, b, c = stride
    x = jnp.pad(x, ((0, 0), (-x.shape[1] % a, 0), (0, 0), (0, 0), (0, 0)))
    B, T, Y, X, C = x.shape
    x = x.reshape(B, T // a, a, Y // b, b, X // c, c, C).transpose(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(B, T // a, Y // b, X // c, width_out, -1).mean(axis=-1)


def copy_up(x: jax.Array, width_out: int, stride: Stride, first: bool) -> jax.Array:
    """The other way: each value copied as often as it fits, in the same order."""
    (B, T, Y, X, C), (a, b, c) = x.shape, stride
    x = jnp.repeat(x, width_out * a * b * c // C, axis=-1).reshape(B, T, Y, X, width_out, a, b, c)
    x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4).reshape(B, T * a, Y * b, X * c, width_out)
    return x[:, a - 1 :] if first else x
