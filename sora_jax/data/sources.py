"""Data sets by name: one config field says what a model is trained on, toyworld or anybody's video files."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Sequence

import jax

from sora_jax.config import component
from sora_jax.data.data_config import TOYWORLD, DataConfig
from sora_jax.data.footage import EmptySplit, Footage
from sora_jax.data.moving_digits import MovingDigits
from sora_jax.data.survey import Summaries
from sora_jax.distributed.hosts import assert_equal_across_hosts
from sora_jax.errors import UserError
from sora_jax.media.clip import ClipSource
from sora_jax.toyworld.render import Toyworld
from sora_jax.toyworld.scene import WorldConfig


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
        return Toyworld(world, config.split, config.seed, config.clips, config.shapes(), config.crop)
    if name.endswith(".npz"):
        return MovingDigits(name, config.split, config.seed, config.clips, config.shapes())
    return Footage(
        name,
        resolution=config.resolutions,
        aspects=("1:1",) if config.crop == "square" else config.aspects,
        durations=config.durations,
        rates=config.rates,
        max_frames=config.max_frames,
        split="validation" if config.split != "train" else "train",
        clips=config.clips,
        seed=config.seed,
        multiple=math.lcm(*config.grid[1:]),
        crop=crop,
        letterboxed=config.crop == "letterbox" and crop is None,
        cache=config.cache,
        damaged=config.damaged,
    )


def heldout_sources(
    config: DataConfig, clips: int, crop: tuple[int, int, int] | None = None
) -> list[tuple[ClipSource, float]]:
    """Of the data sets of `config` the parts that training doesn't see, with their weights; some have none.

    Args:
      clips: the length of each.
      crop: as `make_sources`.
    """
    if config.split != "train":
        return []
    sources, names = make_sheet_sources(config, clips, crop), read_mixture(config.source)
    return [
        (source, weight)
        for (source, held_out), (_, weight) in zip(sources, names, strict=True)
        if held_out and weight > 0
    ]
