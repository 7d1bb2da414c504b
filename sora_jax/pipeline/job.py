"""A job: what is to be made, from an ability to the sampler; and helpers that abilities share."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from sora_jax.errors import UserError
from sora_jax.pipeline.budget import frames_of
from sora_jax.pipeline.checks import check_int, check_number, is_number, short_repr
from sora_jax.pipeline.keywords import explicit_keywords, option_name
from sora_jax.pipeline.settings import Settings
from sora_jax.pipeline.shape import SHAPE_FIELDS, Shape
from sora_jax.tokens.canvas import Sketch

Captions: TypeAlias = tuple[tuple[float, str], ...]  # (seconds from which it holds, prompt)
Sound: TypeAlias = tuple[str | os.PathLike[str], float, float]


@dataclasses.dataclass(frozen=True)
class Job:
    """A video to make: conditioning, captions, and how it is sampled.

    Attributes:
      sketch: conditioning frames and pixels, and what is to be generated.
      captions: (seconds from which it holds, prompt); none: generated without words.
      settings: of the sampler.
      keep: frames of the sketch that the result shows.
      finish: applied to all decoded frames of the sketch, float32[T,Y,X,3] in [-1, 1].
      notes: what was changed or left out of what was asked for, a sentence each.
      noise: float32[t,y,x,c] of the canvas, in place of what the seed draws.
      sound: (file, seconds into it, seconds into the result) whose sound is kept, where it has some.
    """

    sketch: Sketch
    captions: Captions = ()
    settings: Settings = dataclasses.field(default_factory=Settings)
    # Slices have no hash before Python 3.12.
    keep: slice = dataclasses.field(default_factory=lambda: slice(None))
    finish: Callable[[np.ndarray], np.ndarray] | None = None
    notes: tuple[str, ...] = ()
    noise: np.ndarray | None = None
    sound: Sound | None = None


ability = explicit_keywords(Shape, Settings)
"""A decorator for a function that builds a job: spells out its `**options`, fields of the shape and the settings."""


def parse_options(options: Mapping[str, Any]) -> tuple[Shape, Settings]:
    """Keywords as the shape and the settings that they are, checked."""
    shape = Shape(**{name: value for name, value in options.items() if name in SHAPE_FIELDS})
    settings = Settings(**{name: value for name, value in options.items() if name not in SHAPE_FIELDS})
    return shape, settings


def captions_of(prompt: str) -> Captions:
    """A prompt for the whole video; none where it is empty."""
    return ((0.0, prompt),) if not isinstance(prompt, str) or prompt.strip() else ()


def metadata_of(model: str, job: Job) -> dict[str, str]:
    """How a video is made: what is written into its file."""
    timed = len(job.captions) > 1
    prompt = " | ".join(f"{at:g} s: {text}" if timed else text for at, text in job.captions)
    settings = dataclasses.asdict(job.settings)
    del settings["strict"], settings["max_frames"]  # which don't change it
    low, high = settings.pop("guidance_interval")
    settings = {name: value for name, value in settings.items() if value is not None}
    made = {"software": "sora_jax", "model": model, "prompt": prompt, **settings}
    return {key: str(value) for key, value in made.items()} | {"guidance_interval": f"{low:g},{high:g}"}


def check_one(seconds: float | None, shape: Shape) -> None:
    """Raises UserError where not exactly one of `seconds` and the shape's duration is named."""
    if seconds is not None:
        check_number("seconds", seconds, above=0)
    if (seconds is None) != shape.has_duration:
        raise UserError(
            f"The length of the result is {'given twice' if shape.has_duration else 'missing'}: give "
            f"{option_name('seconds')} (of what is new) or {option_name('duration')} (of all)."
        )


def new_frames(seconds: float | None, shape: Shape, given: int, fps: float, default: float) -> int:
    """Frames to be generated besides `given` ones: those of `seconds`, or the rest of the shape's duration."""
    if not shape.has_duration:
        return frames_of(default if seconds is None else seconds, fps)
    if (new := shape.num_frames(fps) - given) < 1:
        raise UserError(f"The input lasts {given / fps:g} s already: ask for a longer duration.")
    return new


def transition_frames(wanted: int, fps: float, stride: int) -> tuple[int, tuple[str, ...]]:
    """Frames that lead to a conditioning clip, the nearest possible to `wanted`, and a note where that isn't it.

    The clip's first frame is generated too, so that the seam can be blended: one frame less than
    whole latent frames, of `stride` frames each.
    """
    frames = stride * max(round((wanted + 1) / stride), 1) - 1
    note = f"The transition takes {frames} frames ({frames / fps:.3g} s), the nearest to {wanted} that is possible."
    return frames, () if frames == wanted else (note,)


def check_pairs(name: str, values: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Pairs of numbers, checked."""
    try:
        out = [(a, b) for a, b in values]
    except (TypeError, ValueError):
        out = [(math.nan, math.nan)]
    if not all(is_number(a) and is_number(b) for a, b in out):
        raise UserError(f"{name}={short_repr(values)} can't be used: give a list of pairs of numbers.")
    return out


def check_box(box: Sequence[int]) -> None:
    """Raises UserError where it is not four whole numbers."""
    try:
        count = len(box)
    except TypeError:
        raise UserError(f"box={short_repr(box)} can't be used: give left, top, width and height.") from None
    if count != 4:
        raise UserError(f"The box is four numbers, left, top, width and height, not {count}.")
    for name, value in zip(("left", "top", "width", "height"), box, strict=True):
        check_int(f"box's {name}", value, -(2**31), 2**31)


def box_inside(
    box: Sequence[int], source: tuple[int, int], size: tuple[int, int], cropped: bool
) -> tuple[slice, slice]:
    """Rows and columns of a frame of `size` that show what lies in `box`, in pixels of the `source`.

    Raises:
      UserError: the box isn't inside the source, or is in what was cropped.
    """
    left, top, width, height = box
    high, wide = source
    if width < 1 or height < 1 or left < 0 or top < 0 or left + width > wide or top + height > high:
        raise UserError(
            f"The box {left},{top},{width},{height} (left, top, width, height) is not inside the picture of "
            f"{wide}×{high} pixels."
        )
    if not cropped:
        rows, columns = (
            slice(int(at * side / whole), -(-(at + length) * side // whole))
            for at, length, side, whole in zip((top, left), (height, width), size, source, strict=True)
        )
        return rows, columns
    scale = max(np.divide(size, source))
    ends = [
        np.clip(np.array([at, at + length]) * scale - (whole * scale - side) / 2, 0, side)
        for at, length, side, whole in zip((top, left), (height, width), size, source, strict=True)
    ]
    rows, columns = (slice(int(begin + 1e-6), int(np.ceil(end - 1e-6))) for begin, end in ends)
    if rows.start >= rows.stop or columns.start >= columns.stop:
        raise UserError(
            "The box is in what the new aspect ratio crops: choose another box, or keep the aspect."
        )
    return rows, columns
