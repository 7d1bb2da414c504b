"""Positions of clips in files: which parts are held out, how a file's rate and shape become a clip's."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from sora_jax.media.timing import SAME_RATE

NATIVE = "native"  # the aspect ratio that a file has
# Each file is cut into blocks of ten seconds, and of every ten blocks one is held out for validation: time
# apart, not clips apart, so that no frame of the one split is seen in the other. Files shorter than that are one block.
BLOCK_SECONDS = 10.0
BLOCKS_PER_HELD_OUT = 10
HELD_OUT = 4
MIN_HELD_OUT_SECONDS = 1.0
SAME_ASPECT = 0.01  # difference of logarithms: 480×270 and 854×480 are 16:9
OTHER_SPLIT = {"train": "validation", "validation": "train"}


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A video or picture that was opened and could be decoded at its start and its end.

    Attributes:
      path: the file.
      name: its path within the folder.
      fps: frames a second; a picture has one frame of one second.
      seconds: how long it is.
      height, width: pixels of its first frame, upright.
      caption: of the `.txt` of the same name; empty where there is none.
      remarks: what of it is left out or looks otherwise here, sentences without the file's name at their beginning.
      picture: whether it is a still.
    """

    path: str
    name: str
    fps: float
    seconds: float
    height: int
    width: int
    caption: str = ""
    picture: bool = False
    remarks: tuple[str, ...] = ()

    @property
    def frames(self) -> int:
        return max(1, math.floor(self.seconds * self.fps + 1e-3))


@dataclasses.dataclass(frozen=True)
class Span:
    """A run of frames of one file that belongs wholly to one split: native frames first ... stop - 1."""

    source_file: SourceFile
    first: int
    stop: int

    @property
    def frames(self) -> int:
        return self.stop - self.first

    @property
    def seconds(self) -> float:
        return self.frames / self.source_file.fps

    @property
    def name(self) -> str:
        """The file's, with the seconds where it is only a part of the file."""
        if self.frames >= self.source_file.frames:
            return self.source_file.name
        first, stop = self.first / self.source_file.fps, self.stop / self.source_file.fps
        return f"{self.source_file.name} ({first:.0f} to {stop:.0f} seconds)"


@dataclasses.dataclass(frozen=True)
class Cut:
    """Position of a clip: `count` frames of a span from native frame `first` on, `ratio` native ones to each."""

    span: Span
    first: int
    count: int
    ratio: float

    @property
    def start(self) -> float:
        """In seconds from the file's first frame."""
        return self.first / self.span.source_file.fps

    @property
    def fps(self) -> float:
        return self.span.source_file.fps / self.ratio


class Spans:
    """Spans, of which one is drawn in proportion to its seconds."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = tuple(spans)
        self._ends = tuple(itertools.accumulate(span.seconds for span in spans))

    @property
    def seconds(self) -> float:
        return self._ends[-1] if self._ends else 0.0

    def draw(self, rng: np.random.Generator) -> Span:
        place = bisect.bisect_right(self._ends, rng.random() * self.seconds)
        return self.spans[min(place, len(self.spans) - 1)]


def split_source_files(source_files: Sequence[SourceFile], split: str) -> Iterator[Span]:
    """The runs of blocks that belong to `split`; blocks are numbered through all files, pictures by themselves.

    Every tenth block is held out, from the fifth on; of fewer than five the last one, and of one none. Blocks of less
    than a second are all for training, and aren't counted.
    """
    blocks = [
        (source_file, first, stop) for source_file in source_files for first, stop in _blocks(source_file)
    ]
    held_out = set()
    for picture in (False, True):
        long = [
            (source_file, first, stop)
            for source_file, first, stop in blocks
            if source_file.picture == picture
            and (stop - first) / source_file.fps >= MIN_HELD_OUT_SECONDS - 1e-3
        ]
        held_out.update(long[HELD_OUT::BLOCKS_PER_HELD_OUT] or long[1:][-1:])
    for (source_file, held), group in itertools.groupby(
        blocks, key=lambda block: (block[0], block in held_out)
    ):
        if held == (split == "validation"):
            run = list(group)
            yield Span(source_file, run[0][1], run[-1][2])


def rate_ratio(native: float, rate: float) -> float:
    """Native frames to each one at `rate`: at least one, and a whole number where it is nearly one."""
    ratio = native / rate
    whole = max(round(ratio), 1)
    return float(whole) if ratio < 1 or abs(ratio / whole - 1) <= SAME_RATE else ratio


def crop_to_aspect(height: int, width: int, aspects: Sequence[str]) -> tuple[float, float]:
    """(height, width) of the largest part of a frame that has the nearest of `aspects`; "native" is the frame's own."""
    own = width / height

    def distance(aspect: float) -> float:
        return abs(math.log(aspect / own))

    aspect = min((own if name == NATIVE else _as_number(name) for name in aspects), key=distance)
    if distance(aspect) <= SAME_ASPECT:
        return height, width
    return (height, height * aspect) if aspect < own else (width / aspect, width)


def _as_number(aspect: str) -> float:
    across, _, down = str(aspect).partition(":")
    return float(across) / float(down or 1)


def _blocks(source_file: SourceFile) -> Iterator[tuple[int, int]]:
    """Native frames at which a file's blocks begin and end; a rest of less than half a block joins the one before."""
    blocks = max(1, math.floor(source_file.seconds / BLOCK_SECONDS + 0.5))
    bounds = [round(block * BLOCK_SECONDS * source_file.fps) for block in range(blocks)] + [
        source_file.frames
    ]
    return itertools.pairwise(bounds)


def native_frames(count: int, ratio: float) -> int:
    """Native frames that a clip of `count` frames takes."""
    return math.floor((count - 1) * ratio + 1e-6) + 1


def most_frames(frames: int, ratio: float) -> int:
    """The most frames of a clip for which so many native ones suffice."""
    return 1 + math.floor((frames - 1e-3) / ratio)
