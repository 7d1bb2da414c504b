"""What a video costs: refused before memory is allocated where it is too much, estimated where it is long."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from sora_jax.errors import UserError

LIMIT_SECONDS = 600  # of video, at the highest frame rate that the model saw in training
LIMIT_FPS = 24.0  # where that isn't known
MAX_GIBIBYTES = 4  # of the frames of a video whose input is held in memory
MAX_PIXELS = (MAX_GIBIBYTES << 30) // 3
LONG = 600.0  # seconds of computing from which an estimate is given
# Operations of the transformer and decoded pixels a second, all losses included, by platform, and seconds that a step
# takes at least: rough, for sentences only. Two cores, one H100, one v5p.
SPEED = {"cpu": (4e10, 3e6), "gpu": (2e13, 3e8), "tpu": (5e13, 3e8)}
MIN_STEP = 2e-3


@dataclasses.dataclass(frozen=True)
class VideoCost:
    """What is to be made.

    Attributes:
      frames: of the video.
      height, width: of a frame, in pixels.
      frame_tokens: of a latent frame; 0 where there is no transformer.
      latent_frames: all of them.
      max_latent_frames: that the model sees at once.
      steps: of the solver.
      passes: of the model, a step.
      parameters: of the transformer.
      anchor: whether later windows see an early frame too, in place of a new one.
    """

    frames: int
    height: int
    width: int
    frame_tokens: int
    latent_frames: int
    max_latent_frames: int
    steps: int
    passes: int
    parameters: int
    anchor: bool = False

    @property
    def windows(self) -> int:
        """In time; half of each is conditioning, generated before, and one frame more of those that have an anchor."""
        if self.latent_frames <= self.max_latent_frames:
            return 1
        new = max(self.max_latent_frames - max(self.max_latent_frames // 2, 1) - self.anchor, 1)
        return 1 + -(-(self.latent_frames - self.max_latent_frames) // new)

    @property
    def tokens(self) -> int:
        """Of all windows."""
        return self.windows * self.frame_tokens * min(self.max_latent_frames, self.latent_frames)

    def seconds(self, platform: str) -> float:
        """An estimate: two operations a parameter and token, and the decoding, at `SPEED`."""
        operations, pixels = SPEED.get(platform, SPEED["cpu"])
        transformer = _as_float(2 * self.parameters * self.passes * self.tokens * self.steps) / operations
        least = _as_float(self.windows * self.steps) * MIN_STEP
        return max(transformer, least) + _as_float(self.frames * self.height * self.width) / pixels

    def __str__(self) -> str:
        size = f"{_plural(self.frames, 'frame')} of {_count(self.width)}×{_count(self.height)}"
        if not self.frame_tokens:
            return size
        windows = f" in {_count(self.windows)} windows" if self.windows > 1 else ""
        return f"{size}, {_count(self.tokens)} tokens{windows}"


def check_frames(cost: VideoCost, limit: int, platform: str, fps: float) -> None:
    """Raises UserError where a video has more frames than `limit`."""
    if cost.frames > limit:
        raise UserError(
            f"That is a video of {cost}, which takes {in_words(cost.seconds(platform))} by a rough estimate, and "
            f"{_limit(limit)}: ask for at most {limit / fps:.4g} s at {fps:g} fps, or raise the limit "
            "with --max-frames (in Python max_frames)."
        )


def check_batch(batch: Sequence[VideoCost], limit: int, platform: str) -> None:
    """Raises UserError where the videos of a batch have more than `limit` frames together."""
    if (frames := sum(cost.frames for cost in batch)) > limit:
        fewer = max(limit * len(batch) // frames, 1)
        raise UserError(
            f"That is a batch of {summary(batch)}, which takes {in_words(seconds(batch, platform))} by a rough "
            f"estimate, and {_limit(limit)}: ask for at most {_plural(fewer, 'video')} of that length at once, or "
            "raise the limit with --max-frames (in Python max_frames)."
        )


def seconds(batch: Sequence[VideoCost], platform: str) -> float:
    """An estimate for all videos of a batch."""
    return sum(cost.seconds(platform) for cost in batch)


def summary(batch: Sequence[VideoCost]) -> str:
    """The videos of a batch and their frames: "3 videos with 90 frames together"; of a single one its own."""
    if len(batch) == 1:
        return str(batch[0])
    return (
        f"{_plural(len(batch), 'video')} with {_plural(sum(cost.frames for cost in batch), 'frame')} together"
    )


def check_pixels(cost: VideoCost) -> None:
    """Raises UserError where a video's frames don't fit into the memory that is set aside for them."""
    if cost.frames * cost.height * cost.width > MAX_PIXELS:
        most = MAX_PIXELS // max(cost.height * cost.width, 1)
        way = f"ask for at most {most:,} frames of that size" if most else "ask for a smaller size"
        raise UserError(
            f"That is a video of {cost}, which takes more than the {MAX_GIBIBYTES} GiB of memory that frames "
            f"may take: {way}, or for a lower resolution."
        )


def in_words(seconds: float) -> str:
    """An estimate for people: "about 3 hours"."""
    for size, unit in ((365.25 * 86400, "year"), (86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= 1.5 * size:
            return f"about {_count(round(seconds / size))} {unit}s"
    return f"about {max(round(seconds), 1)} seconds" if seconds >= 1.5 else "about a second"


def _count(number: float) -> str:
    return f"{number:,}" if abs(number) < 10**15 else f"{_as_float(number):.1e}"


def _plural(number: int, what: str) -> str:
    return f"{_count(number)} {what}{'s' * (number != 1)}"


def _limit(frames: int) -> str:
    return f"{_plural(frames, 'frame')} {'is' if frames == 1 else 'are'} the limit"


def _as_float(number: float) -> float:
    try:
        return float(number)
    except OverflowError:
        return 1e300


def frames_of(duration: float, fps: float) -> int:
    """As `video.frame_count`, for numbers too that no video has: a product beyond floats counts as 1e300."""
    frames = duration * fps
    return max(1, round(frames if math.isfinite(frames) else 1e300))
