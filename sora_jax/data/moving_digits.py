"""Moving MNIST (Srivastava et al. 2015): two digits that move straight on and bounce off the frame's sides.

Clips are made when they are asked for, by the rules of OpenSTL's training set (Tan et al. 2023;
openstl/datasets/dataloader_moving_mnist.py), from a file of digits.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Sequence

import numpy as np

from sora_jax.errors import UserError, user_path
from sora_jax.media.clip import Clip
from sora_jax.media.digests import array_digest
from sora_jax.media.video import Video
from sora_jax.toyworld.scene import check_split

STEP = 0.1  # a digit's way from frame to frame, in the length that its corner can move along a side
HELD_OUT = 10  # every tenth digit is in no training clip


class MovingDigits:
    """A source of clips without words (see `clip.ClipSource`).

    Args:
      path: a NumPy file `.npz` with `digits`, uint8[n,h,w].
      split: "train", or any other: made of the digits held out of training.
      seed: another seed, other clips.
      clips: how many; clip i does not depend on it.
      shapes: (frames, height, width, fps) options, of which each clip draws one.
      count: digits a clip.

    Raises:
      UserError: the file holds no such array, or fewer than `HELD_OUT` digits, or frames are smaller than a digit.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        split: str = "train",
        seed: int = 0,
        clips: int = 1_000_000,
        shapes: Sequence[tuple[int, int, int, float]] = ((20, 64, 64, 8.0),),
        count: int = 2,
    ):
        self.split, self.seed, self.clips, self.shapes, self.count = split, seed, clips, tuple(shapes), count
        digits = _read_digits(path)
        for frames, height, width, fps in self.shapes:
            if height < digits.shape[1] or width < digits.shape[2]:
                raise UserError(
                    f"Digits of {digits.shape[1:]} pixels don't fit frames of {(height, width)}: enlarge these."
                )
        held_out = np.arange(len(digits)) % HELD_OUT == HELD_OUT - 1
        self.digits = digits[~held_out if split == "train" else held_out]

    def __len__(self) -> int:
        return self.clips

    def __getitem__(self, index: int) -> Clip:
        if not 0 <= index < self.clips:
            raise IndexError(f"clip {index} of {self.clips}")
        rng = np.random.default_rng((self.seed, check_split(self.split), index))
        frames, height, width, fps = self.shapes[rng.integers(len(self.shapes))]
        video = np.zeros((frames, height, width), np.uint8)
        for digit in self.digits[rng.integers(len(self.digits), size=self.count)]:
            high, wide = digit.shape
            room = np.array([height - high, width - wide])
            corners = (room * draw_path(rng, frames)).astype(int)  # whole pixels, cut off as OpenSTL's
            for frame, (top, left) in zip(video, corners, strict=True):
                part = frame[top : top + high, left : left + wide]
                np.maximum(part, digit, out=part)
        colours = np.repeat(video[..., None], 3, axis=-1)
        return Clip(Video(colours, fps), {"short": ""}, (), f"digits-{self.split}-{self.seed}-{index}")

    def contents(self) -> dict[str, str]:
        """What clips are made of, by content."""
        return {"files": array_digest([self.digits])}


def draw_path(rng: np.random.Generator, frames: int) -> np.ndarray:
    """A digit's way, float[frames, 2] (y, x) in [0, 1]: from anywhere, in any direction, one step before each frame.

    What would leave the square stays at its side for that frame and turns round there.
    """
    place, angle = rng.random(2), 2 * math.pi * rng.random()
    velocity = STEP * np.array([math.sin(angle), math.cos(angle)])
    path = np.empty((frames, 2))
    for frame in range(frames):
        place = place + velocity
        velocity = np.where((place <= 0) | (place >= 1), -velocity, velocity)
        path[frame] = place = np.clip(place, 0, 1)
    return path


def _read_digits(path: str | os.PathLike[str]) -> np.ndarray:
    try:
        with np.load(user_path(path)) as file:
            digits = file["digits"]
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} can't be read as a file of digits ({error}): write one with np.savez(digits=…)."
        ) from error
    if digits.dtype != np.uint8 or digits.ndim != 3 or len(digits) < HELD_OUT:
        raise UserError(
            f"{path} holds digits of shape {digits.shape} and type {digits.dtype}: they must be uint8[n,h,w], "
            f"{HELD_OUT} or more."
        )
    return digits
