"""Every ability as a short pure function that makes a sketch: conditioning, generated and partially noised pixels.

Clips are uint8[T,Y,X,3]. No function here knows a model: `VaeProcessor` encodes a sketch, `denoise` generates the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sora_jax.errors import UserError
from sora_jax.tokens.canvas import Sketch


def all_noise(shape: tuple[int, int, int], fps: float, writable: bool = False) -> Sketch:
    """Everything is generated: text to video; with one frame, text to image. `shape` is (T, Y, X).

    Unless it is to be `writable`, it holds one number for all of its pixels, for any length.
    """
    if writable:
        return Sketch(np.zeros((*shape, 3), np.uint8), np.ones(shape, np.float32), fps)
    return Sketch(np.broadcast_to(np.uint8(0), (*shape, 3)), np.broadcast_to(np.float32(1), shape), fps)


def animate(pictures: Mapping[int, np.ndarray], shape: tuple[int, int, int], fps: float) -> Sketch:
    """Single frames are conditioning, by number; with frame 0, image to video.

    Raises:
      UserError: a frame lies outside of the clip.
    """
    sketch = all_noise(shape, fps, writable=True)
    for number, picture in pictures.items():
        if not 0 <= number < shape[0]:
            raise UserError(
                f"A picture can't be frame {number} of a video of {shape[0]} frames ({shape[0] / fps:g} s): place "
                "it inside, or make the video longer."
            )
        sketch.frames[number], sketch.strength[number] = picture, 0
    return sketch


def extend(clip: np.ndarray, new: int, fps: float, backward: bool = False) -> Sketch:
    """The clip is conditioning, `new` frames after it (or before it) are generated."""
    empty = all_noise((new, *clip.shape[1:3]), fps)
    frames, strength = [clip, empty.frames], [np.zeros(clip.shape[:3], np.float32), empty.strength]
    order = slice(None, None, -1 if backward else 1)
    return Sketch(np.concatenate(frames[order]), np.concatenate(strength[order]), fps)


def connect(a: np.ndarray, b: np.ndarray, new: int, fps: float, strength: float = 1.0) -> Sketch:
    """Both clips are conditioning; `new` frames between are generated, from a cross-fade if `strength` is below 1."""
    weight = np.arange(1, new + 1) / (new + 1)
    transition = mix(np.repeat(a[-1:], new, axis=0), np.repeat(b[:1], new, axis=0), weight)
    strengths = [
        np.full((len(part), *a.shape[1:3]), value, np.float32)
        for part, value in ((a, 0), (transition, strength), (b, 0))
    ]
    return Sketch(np.concatenate([a, transition, b]), np.concatenate(strengths), fps)


def loop(clip: np.ndarray, new: int, repeated: int, fps: float, strength: float = 1.0) -> Sketch:
    """`new` frames lead from the clip's end to its beginning, whose first frames are `repeated` as conditioning."""
    return connect(clip, clip[:repeated], new, fps, strength)


def fill(clip: np.ndarray, missing: np.ndarray, fps: float) -> Sketch:
    """Frames where `missing` bool[T] is true are generated.

    Raises:
      UserError: all are, or none is.
    """
    if missing.all() or not missing.any():
        which = "every frame is" if missing.all() else "no frame is"
        raise UserError(
            f"There is nothing to fill in: {which} missing; name some frames of the video, not all."
        )
    strength = np.broadcast_to(missing[:, None, None], clip.shape[:3]).astype(np.float32)
    return Sketch(clip, strength, fps)


def smooth(clip: np.ndarray, factor: int, fps: float) -> Sketch:
    """Every frame is conditioning, `factor` − 1 new ones between each two are generated; `fps` is the result's."""
    T = 1 + (len(clip) - 1) * factor
    frames = dict(zip(range(0, T, factor), clip, strict=True))
    return animate(frames, (T, *clip.shape[1:3]), fps)


def blend(a: np.ndarray, b: np.ndarray, weight: np.ndarray, fps: float, strength: float) -> Sketch:
    """From one clip to another by the `weight` float[T] of the second; mixed frames are partially noised.

    Frames of one clip alone are conditioning; the more evenly two are mixed, the higher their strength, up to
    `strength`.
    """
    strengths = strength * 4 * weight * (1 - weight)
    whole = np.broadcast_to(strengths[:, None, None], a.shape[:3]).astype(np.float32)
    return Sketch(mix(a, b, weight), whole, fps)


def inpaint(clip: np.ndarray, mask: np.ndarray, fps: float, strength: float = 1.0) -> Sketch:
    """Pixels under `mask` bool[T,Y,X] are generated, from the clip's own where `strength` is below 1."""
    return Sketch(clip, np.where(mask, np.float32(strength), np.float32(0)), fps)


def outpaint(clip: np.ndarray, size: tuple[int, int], fps: float) -> Sketch:
    """The clip in the middle of a larger frame (height, width), whose margins are generated.

    The margins hold the clip's edge colours, which the autoencoder sees next to the clip; nothing else uses them.
    """
    T, Y, X, _ = clip.shape
    margins = [
        ((full - have) // 2, full - have - (full - have) // 2)
        for full, have in zip(size, (Y, X), strict=True)
    ]
    strength = np.pad(np.zeros((T, Y, X), np.float32), [(0, 0), *margins], constant_values=1)
    return Sketch(np.pad(clip, [(0, 0), *margins, (0, 0)], mode="edge"), strength, fps)


def edit(clip: np.ndarray, strength: float, fps: float, motion: bool = False) -> Sketch:
    """The whole clip is partially noised (SDEdit, Meng et al. 2022).

    `motion` removes the colours first: positions and motion are kept, looks are free.
    """
    frames = np.repeat(_grey(clip)[..., None], 3, axis=-1) if motion else clip
    return Sketch(frames, np.full(clip.shape[:3], strength, np.float32), fps)


def mix(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Cross-fade: (1 − w) a + w b, frame by frame."""
    w = np.asarray(weight, np.float32)[:, None, None, None]
    return np.round((1 - w) * a + w * b).astype(np.uint8)


def cross_fades(frames: np.ndarray, factor: int) -> np.ndarray:
    """`factor` − 1 cross-fades between each two frames [T,...], which stay themselves."""
    place = np.arange(1 + (len(frames) - 1) * factor) / factor
    before = np.minimum(place.astype(int), len(frames) - 1)
    after = np.minimum(before + 1, len(frames) - 1)
    weight = (place - before).reshape(-1, *[1] * (frames.ndim - 1)).astype(np.float32)
    return (1 - weight) * frames[before] + weight * frames[after]


def curve(points: Sequence[tuple[float, float]], frames: int, fps: float) -> np.ndarray:
    """Weights float32[T] on straight lines between (seconds, weight) points.

    Raises:
      UserError: there is no point, times don't rise, or a weight is not between 0 and 1.
    """
    times, weights = np.array(points, float).reshape(-1, 2).T
    if not len(times) or (np.diff(times) <= 0).any():
        raise UserError("The curve's times must rise: give seconds:weight pairs, for example 0:0,2:1.")
    if ((weights < 0) | (weights > 1)).any():
        raise UserError("The curve's weights are shares of the second clip: give numbers from 0 to 1.")
    return np.interp(np.arange(frames) / fps, times, weights).astype(np.float32)


def _grey(clip: np.ndarray) -> np.ndarray:
    """Luma (ITU-R BT.709), uint8[T,Y,X]."""
    return np.round(clip @ np.array([0.2126, 0.7152, 0.0722], np.float32)).astype(np.uint8)
