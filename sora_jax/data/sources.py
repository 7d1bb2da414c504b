"""Data sets by name: one config field says what a model is trained on, toyworld or anybody's video files."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax

from sora_jax.config import COUNT, FROM_ZERO, SEED, check_ranges, component
from sora_jax.data.cuts import NATIVE
from sora_jax.data.footage import EmptySplit, Footage
from sora_jax.data.survey import Summaries
from sora_jax.distributed.hosts import assert_equal_across_hosts
from sora_jax.errors import UserError
from sora_jax.media.clip import ClipSource
from sora_jax.media.video import frame_size
from sora_jax.toyworld.render import Toyworld
from sora_jax.toyworld.scene import WorldConfig, check_split

TOYWORLD = "toyworld"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which clips, and of what shapes.

    Attributes:
      source: "toyworld", a video file, or a folder of videos and pictures, each with its caption in a `.txt` of the
        same name; or several of these with weights, "toyworld:0.7,movies:0.3".
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
            height, width = (
                math.ceil(side / multiple) * multiple
                for side, multiple in zip(
                    frame_size(resolution, "1:1" if aspect == NATIVE else aspect), self.grid[1:], strict=True
                )
            )
            groups = round(seconds * fps / self.grid[0])
            if self.max_frames:
                groups = min(groups, (self.max_frames - 1) // self.grid[0])
            shapes.append((1 + self.grid[0] * groups, height, width, fps))
        return tuple(shapes)


def make_sources(
    config: DataConfig, crop: tuple[int, int, int] | None = None
) -> list[tuple[ClipSource, float]]:
    """The data sets that `config.source` names, with their weights.

    Args:
      crop: (frames, height, width) that files are cut to, for training on windows of one shape.

    Raises:
      UserError: a name is neither toyworld nor a path that exists, a weight is no number, or a data set can't be used.
    """
    return [(_make_source(config, name, crop), weight) for name, weight in read_mixture(config.source)]


def make_sheet_sources(
    config: DataConfig, clips: int, crop: tuple[int, int, int] | None = None
) -> list[tuple[ClipSource, bool]]:
    """The data sets from which sheets of samples are drawn, and whether their clips are held out of training.

    Footage of which nothing is held out, because there is too little, gives clips of training.

    Args:
      clips: how many are wanted of each.
      crop: as `make_sources`.

    Raises:
      UserError: as `make_sources`.
    """
    sources: list[tuple[ClipSource, bool]] = []
    for name, _ in read_mixture(config.source):
        try:
            held_out = dataclasses.replace(config, split="validation", clips=clips)
            sources.append((_make_source(held_out, name, crop), True))
        except EmptySplit:
            shown = dataclasses.replace(config, split="train", clips=clips)
            sources.append((_make_source(shown, name, crop), False))
    return sources


def read_mixture(source: str) -> list[tuple[str, float]]:
    """The names in "toyworld:0.7,movies:0.3" and their weights, 1 where none is given.

    A path that exists is taken whole, even if its name has commas and colons.

    Raises:
      UserError: a name is missing or unknown, a weight is no number above 0, or all are 0.
    """
    parts, mixture = source.split(","), []
    while parts:
        # The longest sequence of parts that names something, so that a path may hold commas.
        for end in range(len(parts), 0, -1):
            if named := _read_name(",".join(parts[:end]).strip()):
                break
        else:
            if not (name := parts[0].strip()):
                raise UserError(
                    f"config.data.source={source!r} names nothing in one place: say toyworld or a path, and "
                    "put a comma only between two."
                )
            raise UserError(
                f"There is no data set {name!r}: say toyworld, or the path of a video file or a folder of them, each "
                'with a weight after a colon where there are several ("toyworld:0.7,movies:0.3").'
            )
        mixture.append(named)
        parts = parts[end:]
    if not any(weight for _, weight in mixture):
        raise UserError(f"config.data.source={source!r} gives every data set the weight 0: give one more.")
    return mixture


def summarise(sources: Sequence[tuple[ClipSource, float]]) -> Summaries | None:
    """What there is in the sources that are files, and what of it could not be read until now; None where none is."""
    parts = tuple(source.summary() for source, _ in sources if isinstance(source, Footage))
    return Summaries(parts) if parts else None


def announce(sources: Sequence[tuple[ClipSource, float]]) -> None:
    """Says on the first host's stderr what the files are that are trained on. All hosts must call it together.

    Raises:
      UserError: the hosts don't see the same files.
    """
    summary = str(summarise(sources) or "")
    assert_equal_across_hosts(
        summary, "The hosts see different files to train on: give all the same folder, with the same content."
    )
    if summary and jax.process_index() == 0:
        print(f"data: {summary}", file=sys.stderr, flush=True)


def natural_clips(sources: Sequence[tuple[ClipSource, float]], most: int) -> int:
    """How many clips of a mixture are worth encoding: as many as show nearly all of the footage in it.

    Args:
      most: never more than that; so many where there is no footage, since toyworld never ends.
    """
    total = sum(weight for _, weight in sources)
    wanted = [
        source.natural_clips * total / weight
        for source, weight in sources
        if isinstance(source, Footage) and weight > 0
    ]
    return min(most, math.ceil(max(wanted, default=most)))


def _read_name(item: str) -> tuple[str, float] | None:
    """A data set's name and its weight; None where the words are neither toyworld nor a path."""
    before, _, after = item.rpartition(":")
    for name, weight in ((item, "1"), (before.strip(), after)):
        name = os.path.expanduser(name)
        if name and "," not in weight and (name == TOYWORLD or os.path.exists(name)):
            try:
                number = float(weight)
            except ValueError:
                number = math.nan
            if not 0 <= number < math.inf:
                raise UserError(
                    f"config.data.source: the weight {weight!r} of {name} is no number, 0 or more: write one like 0.3."
                )
            return name, number
    return None


def _make_source(config: DataConfig, name: str, crop: tuple[int, int, int] | None) -> ClipSource:
    if name == TOYWORLD:
        world = component(WorldConfig, config.world, "data.world")
        return Toyworld(world, config.split, config.seed, config.clips, config.shapes())
    return Footage(
        name,
        resolution=config.resolutions,
        aspects=config.aspects,
        durations=config.durations,
        rates=config.rates,
        max_frames=config.max_frames,
        split="validation" if config.split != "train" else "train",
        clips=config.clips,
        seed=config.seed,
        multiple=math.lcm(*config.grid[1:]),
        crop=crop,
        cache=config.cache,
        damaged=config.damaged,
    )
