"""Which clips a run learns: the part of its configuration that says so."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, Literal

from sora_jax.config import COUNT, FROM_ZERO, SEED, check_ranges
from sora_jax.data.cuts import NATIVE
from sora_jax.errors import UserError
from sora_jax.media.video import frame_size
from sora_jax.toyworld.scene import WorldConfig, check_split

TOYWORLD = "toyworld"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which clips, and of what shapes.

    Attributes:
      source: "toyworld", a video file, or a folder of videos and pictures, each with its caption in a `.txt` of the
        same name; or several of these with weights, "toyworld:0.7,movies:0.3". A file `.npz` of digits is Moving MNIST
        made of them (`moving_digits`).
      split: of the data set.
      clips: how many an epoch.
      seed: another seed, other clips.
      resolutions: short sides in pixels, of which a clip draws one.
      aspects: width to height, "16:9". A toyworld clip draws one; a clip of files is cropped to the one nearest to the
        file's own. "native": files keep their own; toyworld's own is 1:1.
      durations: seconds, of which a clip draws one (0: an image); clips of files are shorter where the file is.
      rates: frames a second, of which a clip draws one. Clips of files have the frames on show at that rate; a file of
        a lower one (or within 1%) keeps its own.
      max_frames: longer clips end there (on the grid); 0: none does.
      grid: frames are 1 + a multiple of the first, height and width multiples of the others: toyworld's sides are
        rounded up, files' cropped.
      damaged: what is done with files and captions that can't be read: "skip" trains without them, names and counts
        them; "refuse" ends the run with a sentence that names them.
      cache: a folder in which files are kept decoded, see `Footage`.
      crop: how clips of one size are had of all: "square": the middle square of every clip alone is learned;
        "letterbox": all of it, scaled into such a square between black bars; "none": clips keep their shapes.
      world: fields of toyworld's `WorldConfig` that differ from its own.
    """

    source: str = TOYWORLD
    split: str = "train"
    clips: int = 1_000_000
    seed: int = 0
    resolutions: tuple[int, ...] = (64,)
    aspects: tuple[str, ...] = (NATIVE,)
    durations: tuple[float, ...] = (2.0,)
    rates: tuple[float, ...] = (8.0,)
    max_frames: int = 0
    grid: tuple[int, int, int] = (4, 16, 16)
    damaged: Literal["skip", "refuse"] = "skip"
    cache: str = ""
    crop: Literal["none", "square", "letterbox"] = "none"
    world: Mapping[str, Any] = dataclasses.field(default_factory=dict, metadata={"keys": WorldConfig})

    def __post_init__(self) -> None:
        for name in ("resolutions", "aspects", "durations", "rates"):
            if not getattr(self, name):
                raise UserError(f"config.data.{name} is empty: give at least one value.")
        for aspect in self.aspects:
            if aspect != NATIVE:
                frame_size(64, aspect)  # says what it takes
        check_split(self.split)
        ranges = {"clips": COUNT, "seed": SEED, "max_frames": FROM_ZERO, "grid": COUNT}
        check_ranges(self, "data", resolutions=COUNT, durations=FROM_ZERO, rates=(0.01, 1000), **ranges)

    def shapes(self) -> tuple[tuple[int, int, int, float], ...]:
        """(frames, height, width, rate) of every combination, on the grid (sides rounded up, as requests are)."""
        shapes = []
        for resolution, aspect, seconds, fps in itertools.product(
            self.resolutions, self.aspects, self.durations, self.rates
        ):
            sides = frame_size(resolution, "1:1" if aspect == NATIVE else aspect)
            height, width = (-(-side // by) * by for side, by in zip(sides, self.grid[1:], strict=True))
            groups = round(seconds * fps / self.grid[0])
            if self.max_frames:
                groups = min(groups, (self.max_frames - 1) // self.grid[0])
            shapes.append((1 + self.grid[0] * groups, height, width, fps))
        return tuple(shapes)
