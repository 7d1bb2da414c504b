"""Inputs of abilities: parts of files, videos, arrays and pictures, at a size and rate that the model can hold."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any, TypeAlias

import numpy as np

from sora_jax.errors import UserError
from sora_jax.media.compositing import resize_and_crop
from sora_jax.media.reader import Media, MediaLike, read_media
from sora_jax.media.timing import frame_step
from sora_jax.media.video import Video, frame_size
from sora_jax.pipeline.budget import check_pixels
from sora_jax.pipeline.checks import check_number
from sora_jax.pipeline.job import Sound
from sora_jax.pipeline.model import VideoModel
from sora_jax.pipeline.settings import Settings
from sora_jax.pipeline.shape import Shape

STILL_FPS = 8.0  # of what is made from a picture, which has no rate
AS_IT_IS = Shape()


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of an input, from one time to another.

    Attributes:
      source: a file, a video, an array or a picture.
      start, end: seconds into it; without an end, to its own.

    Raises:
      UserError: the end is not after the start.
    """

    source: MediaLike
    start: float = 0.0
    end: float | None = None

    def __post_init__(self) -> None:
        check_number("start", self.start, minimum=0)
        if self.end is not None:
            check_number("end", self.end, above=0)
        if self.end is not None and not self.end > self.start:
            raise UserError(
                f"The end, {self.end:g} s, is not after the start, {self.start:g} s: nothing would be left."
            )

    def read(self, seconds: float | None = None, **options: Any) -> Media:
        """Reads it, or at most so many `seconds` of it; see `reader.read_media`."""
        if self.end is not None:
            seconds = min(self.end - self.start, math.inf if seconds is None else seconds)
        return read_media(self.source, start=self.start, seconds=seconds, **options)


MediaInput: TypeAlias = MediaLike | Part


def read_input(
    model: VideoModel, source: MediaInput, shape: Shape = AS_IT_IS, seconds: float | None = None
) -> Media:
    """Reads an input, in the shape that is asked for; what is not named is its own where the model can hold it.

    Args:
      model: the model.
      source: the input.
      shape: of the result. Where it names a size, the picture is scaled to it, what sticks out cut off.
      seconds: at most so many, besides the shape's duration.

    Raises:
      UserError: it can't be read, or is too large.
    """
    part, fps = as_part(source), shape.fps
    first = part.read(1e-6, fps=fps)  # before the model is needed
    limits = model.bundle.limits
    Y, X = own = first.video.size
    picture = first.source_frames == 1 and first.source_fps <= 1  # a still GIF may last longer than a second
    slower = fps is None and limits.fps > 0 and frame_step(first.video.fps, limits.fps) > 1
    if fps is None and (picture or slower):
        fps = limits.fps if slower else min(STILL_FPS, limits.fps or STILL_FPS)
    high, wide = size = output_size(model, own, shape)
    scale = max(high / Y, wide / X) if shape.has_size else min(high, wide) / min(own)
    short = round(min(own) * scale)
    if shape.has_duration:
        rate = first.video.fps if fps is None else fps
        lasts = shape.num_frames(rate) / rate
        seconds = lasts if seconds is None else min(seconds, lasts)
    media = part.read(seconds, fps=fps, resolution=None if short == min(own) else short)
    notes = media.notes
    if slower or (not shape.has_size and short < min(own)):
        high, wide = media.video.size
        notes += (
            f"{wide}×{high} at {media.video.fps:g} fps is the nearest that the model {model.name!r} holds.",
        )
    if not shape.has_size or media.video.size == size:
        return dataclasses.replace(media, notes=notes)
    if max(np.subtract(media.video.size, size)) > 3:
        notes += (f"{name_of(part.source)} was cropped to the shape of {size[1]}×{size[0]}.",)
    return dataclasses.replace(
        media, video=Video(resize_and_crop(media.video.frames, size), media.video.fps), notes=notes
    )


def output_size(model: VideoModel, own: tuple[int, int], shape: Shape) -> tuple[int, int]:
    """(height, width) of what is made of an input of the size `own`: as asked for, else what the model can hold.

    Raises:
      UserError: a frame of that size doesn't fit into memory.
    """
    if shape.resolution is None and shape.size is None:
        return nearest_supported(model, shape.resolve_size(own))
    size = shape.resolve_size(own)
    check_pixels(model.cost(1, size, Settings()))
    return size


def read_full_size(source: MediaInput, shape: Shape) -> Media:
    """Reads an input at its own size, whether the model can hold it or not, at the shape's rate, up to its duration."""
    part, seconds = as_part(source), None
    if shape.has_duration:
        rate = shape.fps or part.read(1e-6).video.fps
        seconds = shape.num_frames(rate) / rate
    return part.read(seconds, fps=shape.fps)


def nearest_supported(model: VideoModel, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) itself where the model holds such frames, else the nearest of that shape that it does."""
    short = most = min(size)
    if model.bundle.limits.resolution:
        most = min(most, model.bundle.limits.resolution)
    for smaller in (most, *range(most - 1 - (most - 1) % 2, 0, -2)):
        fitting = size if smaller == short else frame_size(smaller, size[1] / size[0])
        if model.max_latent_frames(model.frame_tokens(*fitting)) >= 2:
            return fitting
    raise UserError(
        f"Pictures of {size[1]}×{size[0]} are too long for the model {model.name!r}: crop them to another shape."
    )


def as_part(source: MediaInput) -> Part:
    """The whole of a source that isn't a part already."""
    return source if isinstance(source, Part) else Part(source)


def name_of(source: MediaLike) -> str:
    """What it is called in sentences."""
    return str(source) if isinstance(source, (str, os.PathLike)) else "The input"


def sound_of(video: MediaInput, at: float = 0.0) -> Sound | None:
    """The input's sound from where its pictures begin, `at` seconds into the result."""
    part = as_part(video)
    return (part.source, part.start, at) if isinstance(part.source, (str, os.PathLike)) else None


def read_pair(
    model: VideoModel, a: MediaInput, b: MediaInput, shape: Shape = AS_IT_IS
) -> tuple[Video, Video, tuple[str, ...]]:
    """Both videos, the second at the first one's rate and size."""
    first = read_input(model, a, shape)
    second = read_input(model, b, dataclasses.replace(AS_IT_IS, fps=first.video.fps, size=first.video.size))
    return first.video, second.video, first.notes + second.notes
