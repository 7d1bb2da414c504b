"""Compositing of frames: what an ability does to its result outside of the model."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageFilter

from sora_jax.media.video import resample

AT_ONCE = 4  # frames that `back_project` works on


def resize_and_crop(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8[T,Y,X,3] scaled so that it fills `size` (height, width), what sticks out cut off evenly."""
    scale = max(size[0] / frames.shape[1], size[1] / frames.shape[2])
    sides = [max(round(side * scale), full) for side, full in zip(frames.shape[1:3], size, strict=True)]
    if tuple(sides) != frames.shape[1:3]:
        frames = np.stack([resample(frame, *sides) for frame in frames])
    top, left = ((side - full) // 2 for side, full in zip(sides, size, strict=True))
    return frames[:, top : top + size[0], left : left + size[1]]


def center_crop(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8[T,Y,X,3] cut evenly to the aspect ratio of `size` (height, width); as they are where it is theirs."""
    Y, X = frames.shape[1:3]
    scale = min(Y / size[0], X / size[1])
    high, wide = (min(round(side * scale), own) for side, own in zip(size, (Y, X), strict=True))
    if Y - high <= 1 and X - wide <= 1:
        return frames
    top, left = (Y - high) // 2, (X - wide) // 2
    return frames[:, top : top + high, left : left + wide]


def paste(frames: np.ndarray, inside: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Keeps `frames` outside of `inside` as they are, and fades into what was generated within two pixels of it.

    The result is written over what was generated.
    """

    def composite(generated: np.ndarray) -> np.ndarray:
        for result, given, own in zip(generated, frames, inside, strict=True):
            mask = PIL.Image.fromarray((own * 255).astype(np.uint8)).filter(PIL.ImageFilter.BoxBlur(1))
            weight = np.where(own, np.clip(np.asarray(mask) / 127.5 - 1.0, 0, 1), 0).astype(np.float32)
            plain = given.astype(np.float32) / 127.5 - 1.0
            result[:] = plain + weight[..., None] * (result - plain)
        return generated

    return composite


def edge_mask(frames: np.ndarray, contrast: int = 16, reach: int = 3) -> np.ndarray:
    """bool[T,Y,X]: where there is an edge near, and so detail that scaling up has lost; flat ground has none."""
    near = np.empty(frames.shape[:3], bool)
    for result, frame in zip(near, frames, strict=True):
        values = frame.astype(np.int16)
        rise = [np.abs(np.diff(values, axis=axis, append=values.take([-1], axis))).max(-1) for axis in (0, 1)]
        edges = PIL.Image.fromarray((np.maximum(*rise) > contrast).astype(np.uint8) * 255)
        result[:] = np.asarray(edges.filter(PIL.ImageFilter.MaxFilter(2 * reach + 1))) > 0
    return near


def back_project(generated: np.ndarray, small: np.ndarray, rounds: int = 3) -> np.ndarray:
    """What was generated, made to give the input when it is scaled down again (back-projection, Irani and Peleg 1991).

    Args:
      generated: float32[T,Y,X,3] in [-1, 1].
      small: uint8[T,y,x,3], the input.
      rounds: of scaling down and correcting.

    Returns:
      float32[T,Y,X,3] in [-1, 1]. A few frames are worked on at a time.
    """
    result = np.empty(generated.shape, np.float32)
    for begin in range(0, len(generated), AT_ONCE):
        few = slice(begin, begin + AT_ONCE)
        count = len(generated[few])
        # Filled up, so that one program serves all.
        padding = [(0, AT_ONCE - count), (0, 0), (0, 0), (0, 0)]
        own, wanted = (np.pad(frames[few], padding, mode="edge") for frames in (generated, small))
        result[few] = _back_project_frames(own, wanted, rounds)[:count]
    return result


@functools.partial(jax.jit, static_argnames="rounds")
def _back_project_frames(generated: jax.Array, small: jax.Array, rounds: int) -> jax.Array:
    wanted = small.astype(jnp.float32) / 127.5 - 1.0
    scaled = lambda frames, like: jax.image.resize(
        frames, (*frames.shape[:1], *like.shape[1:3], 3), "lanczos3"
    )
    for _ in range(rounds):
        generated = generated + scaled(wanted - scaled(generated, wanted), generated)
    return jnp.clip(generated, -1.0, 1.0)


def keep_static(generated: np.ndarray, plain: np.ndarray, low: float = 0.06, high: float = 0.2) -> np.ndarray:
    """`plain` where the two hardly differ, `generated` where they do; both float32[T,Y,X,3] in [-1, 1].

    What stands still needs no generating, and the autoencoder's own noise should not show there.

    Args:
      low, high: differences, as shares of the way from black to white, up to which `plain` is kept, and from
        which on `generated` is taken.
    """
    difference = np.abs(generated - plain).max(-1) / 2
    images = map(PIL.Image.fromarray, (np.clip(difference, 0, 1) * 255).astype(np.uint8))
    wide = (image.filter(PIL.ImageFilter.MaxFilter(3)) for image in images)
    near = [np.asarray(image.filter(PIL.ImageFilter.BoxBlur(1))) for image in wide]
    weight = np.clip((np.stack(near) / 255.0 - low) / (high - low), 0, 1)[..., None].astype(np.float32)
    return plain + weight * (generated - plain)
