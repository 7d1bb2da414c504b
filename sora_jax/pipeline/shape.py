"""The shape of a result: duration, rate, size. What is not named is the input's own."""

from __future__ import annotations

import dataclasses
import math

from sora_jax.errors import UserError
from sora_jax.media.video import frame_size
from sora_jax.pipeline.budget import frames_of
from sora_jax.pipeline.checks import check_int, check_number, short_repr
from sora_jax.pipeline.keywords import check_conflicts

MAX_SIDE = 1 << 20  # pixels
MAX_FPS = 1000.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The shape of a video that is made of an input; None keeps the input's own.

    An input of another size is scaled first, and cropped evenly where its aspect ratio is another.

    Attributes:
      duration: seconds of the whole result.
      frames: the same as a number of frames.
      fps: frames a second.
      resolution: pixels of the short side.
      aspect: width to height, "16:9" or a number.
      size: (height, width) in pixels, instead of resolution and aspect.

    Raises:
      UserError: a value makes no sense, or two of them say the same thing twice.
    """

    duration: float | None = None
    frames: int | None = None
    fps: float | None = None
    resolution: int | None = None
    aspect: str | float | None = None
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_shape(self.duration, self.frames, self.fps, self.resolution, self.aspect, self.size)
        check_conflicts(vars(self))

    @property
    def has_size(self) -> bool:
        """Whether the size of a frame is named."""
        return (self.resolution, self.aspect, self.size) != (None, None, None)

    @property
    def has_duration(self) -> bool:
        """Whether the duration is named."""
        return (self.duration, self.frames) != (None, None)

    def num_frames(self, fps: float) -> int:
        """The frames that it names, at a rate."""
        if self.frames is not None:
            return self.frames
        assert self.duration is not None
        return frames_of(self.duration, fps)

    def resolve_size(self, own: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the result for an input of the size `own`."""
        if self.size is not None:
            return self.size
        if not self.has_size:
            return own
        aspect = own[1] / own[0] if self.aspect is None else self.aspect
        return frame_size(min(own) if self.resolution is None else self.resolution, aspect)

    def without_duration(self) -> Shape:
        """The same without its duration."""
        return dataclasses.replace(self, duration=None, frames=None)


SHAPE_FIELDS = frozenset(field.name for field in dataclasses.fields(Shape))


def check_shape(
    duration: float | None,
    frames: int | None,
    fps: float | None,
    resolution: int | None,
    aspect: str | float | None,
    size: tuple[int, int] | None,
) -> None:
    """Raises UserError where one of them is neither None nor what it should be."""
    if duration is not None:
        check_number("duration", duration, above=0)
    if fps is not None:
        check_number("fps", fps, above=0, maximum=MAX_FPS)
    if frames is not None:
        check_int("frames", frames, 1)
    if resolution is not None:
        check_int("resolution", resolution, 1, MAX_SIDE)
    if aspect is not None:
        check_aspect(aspect)
    if size is not None:
        try:
            height, width = size
        except (TypeError, ValueError):
            raise UserError(
                f"size={short_repr(size)} can't be used: give (height, width) in pixels."
            ) from None
        check_int("size's height", height, 1, MAX_SIDE)
        check_int("size's width", width, 1, MAX_SIDE)


def check_aspect(aspect: str | float) -> None:
    """Raises UserError where it is no aspect ratio, or one that no screen has."""
    if isinstance(aspect, bool) or not isinstance(aspect, (str, int, float)):
        raise UserError(f"aspect={short_repr(aspect)} can't be used: write one like '16:9' or 1.78.")
    if isinstance(aspect, str) and len(aspect) > 40:
        raise UserError(f"aspect={short_repr(aspect)} can't be used: write one like '16:9' or 1.78.")
    if not (isinstance(aspect, str) or math.isfinite(aspect)):
        raise UserError(f"aspect={aspect} can't be used: write one like '16:9' or 1.78.")
    high, wide = frame_size(1000, aspect)
    if max(high, wide) > 100_000:
        raise UserError(f"aspect={short_repr(aspect)} is 100 times as long as wide: write one like '16:9'.")
