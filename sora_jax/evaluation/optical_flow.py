"""Dense optical flow without a network: where each pixel of a frame goes in the next.

Lucas, Kanade 1981, "An iterative image registration technique with an application to stereo vision", solved at every
pixel, over a pyramid (Bouguet 1999). It finds what moves as a whole and is wrong where several things move within one
window; RAFT and FlowNet2, which benchmarks of video use, are networks whose weights no package brings.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.evaluation.metrics import frame_blocks, to_luma

COARSEST = 16  # pixels of the short side of the coarsest level, at least
LEVELS = 5
_STEPS = 3  # of Gauss and Newton a level
_WINDOW_SIGMA, _WINDOW_RADIUS = 2.5, 6
_PYRAMID = np.array([1, 4, 6, 4, 1]) / 16
# Gradients below this (squared, of luma in 0..1) say nothing: flow there is what coarser levels found.
_FLAT = 1e-5
_LONGEST = 2.0  # pixels a step


def optical_flow(frames: np.ndarray, following: np.ndarray) -> np.ndarray:
    """The flow f32[P,Y,X,2] of P pairs of frames: what is at (y, x) in `frames` is at (y, x) + flow in `following`.

    Args:
      frames: uint8[P,Y,X,3] or f[P,Y,X,1 or 3] in 0..255.
      following: the same shape.

    Returns:
      In pixels, (down, right).
    """
    blocks = frame_blocks([frames, following])
    return np.concatenate([np.asarray(_block_flow(*block))[:count] for count, block in blocks])


@jax.jit
def _block_flow(frames: jax.Array, following: jax.Array) -> jax.Array:
    one, other = (to_luma(each) / 255 for each in (frames, following))
    _, height, width = one.shape
    levels = 1 + max(0, min(LEVELS - 1, int(math.log2(max(min(height, width) / COARSEST, 1)))))
    pyramid = [(one, other)]
    for _ in range(levels - 1):
        pyramid.append(tuple(_halved(each) for each in pyramid[-1]))
    flow = jnp.zeros((*pyramid[-1][0].shape, 2))
    for one, other in reversed(pyramid):
        shape = (*one.shape, 2)
        if flow.shape != shape:
            scale = jnp.array([shape[1] / flow.shape[1], shape[2] / flow.shape[2]])
            flow = jax.image.resize(flow, shape, "bilinear") * scale
        flow = jax.lax.fori_loop(0, _STEPS, functools.partial(_step, one, other), flow)
    return flow


def _step(one: jax.Array, other: jax.Array, _: int, flow: jax.Array) -> jax.Array:
    """Flow after one step of least squares within each pixel's window; slopes are means of both frames'."""
    (warped,) = _together(warp(other[..., None], flow)[..., 0])
    down, right = _together(*((_slope(one, axis) + _slope(warped, axis)) / 2 for axis in (1, 2)))
    products = _together(
        down * down, right * right, down * right, down * (warped - one), right * (warped - one)
    )
    dd, rr, dr, dl, rl = _together(*_smoothed(jnp.stack(products), _gaussian(), (-2, -1)))
    dd, rr = dd + _FLAT, rr + _FLAT
    scale = 1 / (dd * rr - dr * dr)
    step = jnp.stack([(dr * rl - rr * dl) * scale, (dr * dl - dd * rl) * scale], -1)
    return flow + jnp.clip(step, -_LONGEST, _LONGEST)


def _together(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, each computed once: else what reads them computes them again for each of a window's pixels."""
    return jax.lax.optimization_barrier(arrays)


def warp(frames: jax.Array, flow: jax.Array) -> jax.Array:
    """Frames f[P,Y,X,C] read at each pixel's place plus its flow f[P,Y,X,2], bilinear, edges repeated outside."""
    _, height, width, _ = frames.shape

    def one(frame: jax.Array, moved: jax.Array) -> jax.Array:
        y = jnp.clip(jnp.arange(height)[:, None] + moved[..., 0], 0, height - 1)
        x = jnp.clip(jnp.arange(width) + moved[..., 1], 0, width - 1)
        top, left = jnp.floor(y).astype(jnp.int32), jnp.floor(x).astype(jnp.int32)
        low, right = jnp.minimum(top + 1, height - 1), jnp.minimum(left + 1, width - 1)
        down, across = (y - top)[..., None], (x - left)[..., None]
        flat = frame.reshape(height * width, -1)
        upper = flat[top * width + left] * (1 - across) + flat[top * width + right] * across
        lower = flat[low * width + left] * (1 - across) + flat[low * width + right] * across
        return upper * (1 - down) + lower * down

    return jax.vmap(one)(frames, flow)


def _halved(images: jax.Array) -> jax.Array:
    return _smoothed(images, _PYRAMID, (-2, -1))[:, ::2, ::2]


def _slope(images: jax.Array, axis: int) -> jax.Array:
    """Central differences along an axis, half as long at its ends."""
    pad = [(0, 0)] * images.ndim
    pad[axis] = (1, 1)
    padded, size = jnp.pad(images, pad, "edge"), images.shape[axis]
    ahead, behind = (jax.lax.slice_in_dim(padded, start, start + size, axis=axis) for start in (2, 0))
    return (ahead - behind) / 2


def _smoothed(images: jax.Array, kernel: np.ndarray, axes: tuple[int, ...]) -> jax.Array:
    """A weighted mean of neighbours along each axis, edges repeated."""
    radius = len(kernel) // 2
    for axis in axes:
        axis %= images.ndim
        pad = [(0, 0)] * images.ndim
        pad[axis] = (radius, radius)
        (padded,), size = _together(jnp.pad(images, pad, "edge")), images.shape[axis]
        shifted = [jax.lax.slice_in_dim(padded, k, k + size, axis=axis) for k in range(len(kernel))]
        images = sum((w * each for w, each in zip(kernel.tolist(), shifted, strict=True)), jnp.float32(0))
    return images


def _gaussian() -> np.ndarray:
    kernel = np.exp(-0.5 * (np.arange(-_WINDOW_RADIUS, _WINDOW_RADIUS + 1) / _WINDOW_SIGMA) ** 2)
    return kernel / kernel.sum()
