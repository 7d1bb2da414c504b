"""Frames of pixels laid over one another: what an ability does to its result outside of the model."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageFilter

from sora_jax.video import resample


def cover(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8[T,Y,X,3] scaled so that it fills `size` (height, width), what sticks out cut off evenly."""
    scale = max(size[0] / frames.shape[1], size[1] / frames.shape[2])
    sides = [max(round(side * scale), full) for side, full in zip(frames.shape[1:3], size, strict=True)]
    if tuple(sides) != frames.shape[1:3]:
        frames = np.stack([resample(frame, *sides) for frame in frames])
    top, left = ((side - full) // 2 for side, full in zip(sides, size, strict=True))
    return frames[:, top : top + size[0], left : left + size[1]]


def crop(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8[T,Y,X,3] cut evenly to the aspect ratio of `size` (height, width); as they are where it is theirs."""
    Y, X = frames.shape[1:3]
    scale = min(Y / size[0], X / size[1])
    high, wide = (min(round(side * scale), own) for side, own in zip(size, (Y, X), strict=True))
    if Y - high <= 1 and X - wide <= 1:
        return frames
    top, left = (Y - high) // 2, (X - wide) // 2
    return frames[:, top : top + high, left : left + wide]


def paste(frames: np.ndarray, inside: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Keeps `frames` outside of `inside` as they are, and fades into what was painted within two pixels of it."""
    soft = [
        np.asarray(PIL.Image.fromarray((own * 255).astype(np.uint8)).filter(PIL.ImageFilter.BoxBlur(1)))
        for own in inside
    ]
    weight = np.where(inside, np.clip(np.stack(soft) / 127.5 - 1.0, 0, 1), 0).astype(np.float32)[..., None]
    own = frames.astype(np.float32) / 127.5 - 1.0
    return lambda painted: own + weight * (painted - own)


def detailed(frames: np.ndarray, contrast: int = 16, reach: int = 3) -> np.ndarray:
    """bool[T,Y,X]: where there is an edge near, and so detail that scaling up has lost; flat ground has none."""
    values = frames.astype(np.int16)
    rise = [np.abs(np.diff(values, axis=axis, append=values.take([-1], axis))).max(-1) for axis in (1, 2)]
    edges = (np.maximum(*rise) > contrast).astype(np.uint8) * 255
    near = [PIL.Image.fromarray(own).filter(PIL.ImageFilter.MaxFilter(2 * reach + 1)) for own in edges]
    return np.stack([np.asarray(own) for own in near]) > 0


def agree(painted: np.ndarray, small: np.ndarray, rounds: int = 3) -> np.ndarray:
    """What was painted, made to give the input when it is scaled down again (back-projection, Irani and Peleg 1991)."""
    wanted = jnp.asarray(small, jnp.float32) / 127.5 - 1.0
    scaled = lambda frames, like: jax.image.resize(
        frames, (*frames.shape[:1], *like.shape[1:3], 3), "lanczos3"
    )
    result = jnp.asarray(painted)
    for _ in range(rounds):
        result = result + scaled(wanted - scaled(result, wanted), result)
    return np.asarray(jnp.clip(result, -1.0, 1.0))


def overrule(painted: np.ndarray, plain: np.ndarray, sure: float = 0.06, unsure: float = 0.2) -> np.ndarray:
    """`plain` where the two hardly differ, `painted` where they do; both float32[T,Y,X,3] in [-1, 1].

    What stands still needs no painting, and the autoencoder's own noise should not show there.

    Args:
      sure, unsure: differences, as shares of the way from black to white, up to which `plain` is kept, and from
        which on it is overruled.
    """
    difference = np.abs(painted - plain).max(-1) / 2
    near = [
        np.asarray(
            PIL.Image.fromarray(own).filter(PIL.ImageFilter.MaxFilter(3)).filter(PIL.ImageFilter.BoxBlur(1))
        )
        for own in (np.clip(difference, 0, 1) * 255).astype(np.uint8)
    ]
    weight = np.clip((np.stack(near) / 255.0 - sure) / (unsure - sure), 0, 1)[..., None].astype(np.float32)
    return plain + weight * (painted - plain)
