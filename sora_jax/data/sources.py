"""Data sets by name: one config field says what a model is trained on, toyworld or anybody's video files."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from sora_jax.config import component
from sora_jax.data.clips import Source
from sora_jax.data.footage import Footage
from sora_jax.data.scene import WorldConfig
from sora_jax.data.toyworld import Toyworld
from sora_jax.errors import UserError
from sora_jax.video import frame_size


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which clips, and of what shapes.

    Attributes:
      source: "toyworld", a video file, or a folder of them; or several with weights, "toyworld:0.7,movies:0.3".
      split: of the data set.
      clips: how many an epoch.
      seed: another seed, other clips.
      resolutions: short sides in pixels, of which a clip draws one.
      aspects: width to height, of which a toyworld clip draws one; files keep their own.
      durations: seconds, of which a toyworld clip draws one (0: an image); files give clips between the least
        above 0 and the greatest, and images in the share of zeros.
      rates: frames a second, of which a toyworld clip draws one; files keep their own up to the greatest.
      max_frames: longer toyworld clips end there (on the grid); 0: none does.
      grid: frames are 1 + a multiple of the first, height and width multiples of the others.
      cache: a folder in which files are kept decoded, see `Footage`.
      world: fields of toyworld's `WorldConfig` that differ from its own.
    """

    source: str = "toyworld"
    split: str = "train"
    clips: int = 1_000_000
    seed: int = 0
    resolutions: tuple[int, ...] = (64,)
    aspects: tuple[str, ...] = ("1:1",)
    durations: tuple[float, ...] = (2.0,)
    rates: tuple[float, ...] = (8.0,)
    max_frames: int = 0
    grid: tuple[int, int, int] = (4, 16, 16)
    cache: str = ""
    world: Mapping[str, Any] = dataclasses.field(default_factory=dict, metadata={"keys": WorldConfig})

    def __post_init__(self) -> None:
        for name in ("resolutions", "aspects", "durations", "rates"):
            if not getattr(self, name):
                raise UserError(f"config.data.{name} is empty: give at least one value.")

    def shapes(self) -> tuple[tuple[int, int, int, float], ...]:
        """(frames, height, width, rate) of every combination, on the grid (sides rounded up, as requests are)."""
        shapes = []
        for resolution, aspect, seconds, fps in itertools.product(
            self.resolutions, self.aspects, self.durations, self.rates
        ):
            height, width = (
                math.ceil(side / multiple) * multiple
                for side, multiple in zip(frame_size(resolution, aspect), self.grid[1:], strict=True)
            )
            groups = round(seconds * fps / self.grid[0])
            if self.max_frames:
                groups = min(groups, (self.max_frames - 1) // self.grid[0])
            shapes.append((1 + self.grid[0] * groups, height, width, fps))
        return tuple(shapes)


def make_sources(config: DataConfig, crop: tuple[int, int, int] | None = None) -> list[tuple[Source, float]]:
    """The data sets that `config.source` names, with their weights.

    Args:
      crop: (frames, height, width) that files are cut to, for training on windows of one shape.

    Raises:
      UserError: a name is neither toyworld nor a path that exists.
    """
    sources = []
    for item in config.source.split(","):
        name, _, weight = item.strip().rpartition(":")
        if not name or not weight.replace(".", "", 1).isdigit():
            name, weight = item.strip(), "1"
        sources.append((_make_source(config, name, crop), float(weight)))
    return sources


def _make_source(config: DataConfig, name: str, crop: tuple[int, int, int] | None) -> Source:
    if name == "toyworld":
        world = component(WorldConfig, config.world, "data.world")
        return Toyworld(world, config.split, config.seed, config.clips, config.shapes())
    if not pathlib.Path(name).exists():
        raise UserError(
            f"There is no data set {name!r}: say toyworld, or the path of a video file or a folder of them."
        )
    moving = [seconds for seconds in config.durations if seconds > 0] or [0.0]
    return Footage(
        name,
        split="validation" if config.split != "train" else "train",
        seed=config.seed,
        clips=config.clips,
        resolution=min(config.resolutions),
        min_seconds=min(moving),
        max_seconds=max(moving),
        max_fps=max(config.rates),
        share_of_images=config.durations.count(0.0) / len(config.durations),
        multiple=config.grid[1],
        crop=crop,
        crop_short_side=(min(config.resolutions), max(config.resolutions)) if crop else None,
        cache=config.cache,
    )
