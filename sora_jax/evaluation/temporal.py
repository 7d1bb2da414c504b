"""How a clip changes over time: flicker, error of warping, motion, and whether what is seen stays the same.

Flicker, dynamic degree and consistency are VBench's (Huang et al. 2023, arXiv:2311.17982, and its code of 2025), the
error of warping is that of Lai, Huang, Wang, Shechtman, Yumer, Yang 2018, arXiv:1808.00449. Flow is
`optical_flow`'s, where these take RAFT's and FlowNet2's.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.errors import UserError
from sora_jax.evaluation.metrics import frame_blocks
from sora_jax.evaluation.optical_flow import warp

SAMPLED_FPS = 8.0  # at which VBench looks for motion
_THRESHOLD = 6.0  # pixels a frame at 8 frames a second, for a short side of 256
_LARGEST = 0.05  # of the pixels, those that move most


def temporal_flicker(clip: np.ndarray) -> float:
    """1 less the mean absolute difference of neighbouring frames in parts of 255; 1 is a still.

    VBench takes it of clips that should stand still alone: what moves counts as flicker here too.

    Args:
      clip: uint8[T,Y,X,3], at least 2 frames.
    """
    _check_frames(clip, 2, "Temporal flicker")
    change = np.abs(np.diff(clip.astype(np.int16), axis=0))
    return 1 - float(change.mean(dtype=np.float64)) / 255


def warping_error(clip: np.ndarray, forward: np.ndarray, backward: np.ndarray) -> float:
    """Mean squared difference, of values in 0..1, of each frame and the next one warped to it.

    Pixels that are hidden in the next frame, or at boundaries of motion, are left out: those whose forward and
    backward flow disagree (Ruder, Dosovitskiy, Brox 2016, eq. 5 and 6).

    Args:
      clip: uint8[T,Y,X,3], at least 2 frames.
      forward, backward: f[T-1,Y,X,2], the flow of each frame to the next and back, in pixels (down, right).
    """
    _check_frames(clip, 2, "The error of warping")
    errors = [
        np.asarray(_block_error(*block))[:count]
        for count, block in frame_blocks([clip[:-1], clip[1:], forward, backward])
    ]
    return float(np.concatenate(errors).mean(dtype=np.float64))


@jax.jit
def _block_error(
    frames: jax.Array, following: jax.Array, forward: jax.Array, backward: jax.Array
) -> jax.Array:
    one, other = (each.astype(jnp.float32) / 255 for each in (frames, following))
    warped = warp(jnp.concatenate([other, backward], -1), forward)
    seen, returned = warped[..., :3], warped[..., 3:]
    sizes = _squared(returned) + _squared(forward)
    hidden = _squared(returned + forward) > 0.01 * sizes + 0.5
    slopes = [
        jnp.diff(forward, axis=axis, append=jax.lax.slice_in_dim(forward, -1, None, axis=axis))
        for axis in (1, 2)
    ]
    boundary = sum(map(_squared, slopes)) > 0.01 * _squared(forward) + 0.002
    kept = ~(hidden | boundary)
    kept = kept | ~kept.any((1, 2), keepdims=True)  # of a pair without any such pixel all count
    error = jnp.mean((seen - one) ** 2, -1) * kept
    return error.sum((1, 2)) / kept.sum((1, 2))


def motion_step(fps: float) -> int:
    """From each frame to which later one motion is measured: about an eighth of a second."""
    return max(1, round(fps / SAMPLED_FPS))


def motion_magnitude(flow: np.ndarray, fps: float) -> float:
    """How fast pixels move on the average, in short sides of the frame a second.

    Args:
      flow: f[P,Y,X,2] of pairs of frames in pixels.
      fps: pairs a second.
    """
    return float(_lengths(flow).mean(dtype=np.float64)) / min(flow.shape[1:3]) * fps


def dynamic_degree(flow: np.ndarray, fps: float) -> bool:
    """Whether a clip moves: the twentieth of the pixels that moves most does so fast, in a quarter of the pairs or so.

    VBench's threshold is 6 pixels of 256 between frames an eighth of a second apart, and more where fewer frames
    are there; of n frames, round(n / 4) pairs must reach it, at least one.

    Args:
      flow: f[P,Y,X,2] of pairs of frames in pixels.
      fps: pairs a second.
    """
    pairs, height, width, _ = flow.shape
    most = max(1, int(height * width * _LARGEST))
    lengths = _lengths(flow).reshape(pairs, -1)
    largest = np.partition(lengths, -most, axis=1)[:, -most:].mean(1)
    threshold = _THRESHOLD * max(1.0, SAMPLED_FPS / fps) * min(height, width) / 256
    return int((largest > threshold).sum()) >= max(1, round((pairs + 1) / 4))


def consistency(features: np.ndarray) -> float:
    """How much frames look like the first and like the one before, from 0 to 1: the mean of their cosines.

    Args:
      features: f[T,D], a row a frame, at least 2.
    """
    _check_frames(features, 2, "Consistency")
    rows = np.asarray(features, np.float64)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    before, first = (rows[1:] * rows[:-1]).sum(1), rows[1:] @ rows[0]
    return float((np.maximum(before, 0) + np.maximum(first, 0)).mean() / 2)


def _squared(vectors: jax.Array) -> jax.Array:
    return (vectors**2).sum(-1)


def _lengths(flow: np.ndarray) -> np.ndarray:
    return np.hypot(flow[..., 0], flow[..., 1])


def _check_frames(clip: np.ndarray, least: int, name: str) -> None:
    if len(clip) < least:
        raise UserError(f"{name} needs clips of at least {least} frames, and one has {len(clip)}.")
