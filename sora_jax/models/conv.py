"""Causal 3-D convolutions, what a stream keeps of them, and space to depth: what autoencoders are made of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sora_jax.backend import onednn
from sora_jax.distributed.mesh import constrain, platform
from sora_jax.errors import UserError

Stride = tuple[int, int, int]


class ConvCache:
    """The last two inputs of each causal convolution, kept between the chunks of a stream.

    A whole clip is a stream of one chunk, whose cache is zeros. `first`: whether this is a stream's first chunk.
    `remat`: whether blocks that `run_block` runs keep nothing; then there are no chunks after the first.
    """

    def __init__(self, steps: Sequence[jax.Array] | None = None, remat: bool = False) -> None:
        self.first, self.remat = steps is None, remat
        self._old: Iterator[jax.Array] | None = None if steps is None else iter(steps)
        self.new: list[jax.Array] = []

    def extend(self, x: jax.Array, steps: int, repeat: bool = False) -> jax.Array:
        """Puts the last `steps` inputs before x [B,T,Y,X,C], and caches x's own.

        `repeat`: whether a stream's first input is before it, instead of zeros.
        """
        shape = x.shape[0], steps, *x.shape[2:]
        if self._old is not None:
            before = next(self._old)
        elif repeat:
            before = jnp.broadcast_to(x[:, :1], shape)
        else:
            before = jnp.zeros_like(x, shape=shape)
        x = jnp.concatenate([before, x], axis=1)
        self.new.append(x[:, -steps:])
        return x


def run_block(
    block: Any, x: jax.Array, cache: ConvCache | None, *rest: Any, remat: bool = False
) -> jax.Array:
    """block(x, cache, *rest); with `remat` of a whole clip, and what is inside it is computed again for gradients."""
    if not (remat or (cache is not None and cache.remat)):
        return block(x, cache, *rest)
    inside = lambda block, x: block(x, None if cache is None else ConvCache(), *rest)
    return jax.checkpoint(inside)(block, x)


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


def patchify(x: jax.Array, size: int) -> jax.Array:
    """Squares of pixels as channels in the original's order (C, X, Y): [B,T,Y,X,C] → [B,T,Y/size,X/size,C·size²]."""
    B, T, Y, X, C = x.shape
    x = x.reshape(B, T, Y // size, size, X // size, size, C).transpose(0, 1, 2, 4, 6, 5, 3)
    return x.reshape(B, T, Y // size, X // size, C * size * size)


def unpatchify(x: jax.Array, size: int) -> jax.Array:
    """The inverse of `patchify`."""
    B, T, Y, X, C = x.shape
    x = x.reshape(B, T, Y, X, C // size**2, size, size).transpose(0, 1, 2, 6, 3, 5, 4)
    return x.reshape(B, T, Y * size, X * size, C // size**2)


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
    if x.dtype != jnp.float32 and by_onednn():
        # XLA would make zeros before x padding of the convolution, for which oneDNN reads beyond x: one frame of three
        # channels in bfloat16 gave other numbers each time, NaN among them (jaxlib 0.12.0).
        x = jax.lax.optimization_barrier(x)
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


def by_onednn() -> bool:
    """Whether convolutions of three axes are oneDNN's; for those of two XLA's CPU backend has a slower way only."""
    return platform() == "cpu" and onednn()


def frame_conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
) -> jax.Array:
    """2-D convolution of each frame: x [B,T,Y,X,I], kernel [a,b,I,O]."""
    if by_onednn():
        return jax.lax.conv_general_dilated(
            x, kernel[None], (1, *strides), ((0, 0), *padding), dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
        )
    frames = x.reshape(-1, *x.shape[2:])
    out = jax.lax.conv_general_dilated(
        frames, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return out.reshape(*x.shape[:2], *out.shape[1:])


def time_taps(x: jax.Array, stride: int) -> jax.Array:
    """Three frames in a row as channels, at every `stride`-th place: [B, T+2, Y, X, C] → [B, T/stride, Y, X, 3C]."""
    last = x.shape[1] - 2
    return jnp.concatenate([x[:, k : last + k : stride] for k in range(3)], axis=-1)


class CausalConv(nnx.Module):
    """A causal 3×3×3 convolution; the caller keeps its cache."""

    def __init__(self, width_in: int, width_out: int, scale: float, *, rngs: nnx.Rngs) -> None:
        std = scale / math.sqrt(27 * width_in)
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (3, 3, 3, width_in, width_out)))
        self.bias = nnx.Param(jnp.zeros(width_out))

    def __call__(self, x: jax.Array, cache: ConvCache) -> jax.Array:
        kernel = constrain(self.kernel[...].astype(x.dtype), "TYXCC")
        return causal_conv(cache.extend(x, 2), kernel) + self.bias[...].astype(x.dtype)


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
