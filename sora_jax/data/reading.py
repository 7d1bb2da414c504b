"""Clips of one file read together, in order of time: what they share is decoded and scaled once."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from sora_jax.data.cuts import Cut
from sora_jax.errors import UserError
from sora_jax.media.timing import EvenSampler
from sora_jax.media.video import Reader, Report, open_reader, resample

CropBox = tuple[int, int, tuple[float, float, float, float]]
"""Height and width of a clip, and the box (left, top, right, bottom) of the frame that it shows."""

# Seconds that no clip shows, from which on a jump to the keyframe before the next clip costs less than to go on.
JUMP_SECONDS = 5.0


class Wanted:
    """A clip that is to be read.

    Args:
      index: its number in the data set.
      cut: its position in a file.
      crop_box: from height and width of a frame, what of it is shown.

    Attributes:
      frames: uint8[Y,X,3] each, those that have come.
    """

    def __init__(self, index: int, cut: Cut, crop_box: Callable[[int, int], CropBox]) -> None:
        self.index, self.cut, self.frames = index, cut, list[np.ndarray]()
        self._draw = crop_box
        self._crop_box: CropBox | None = None
        self._sampler: EvenSampler[_Frame] = EvenSampler(cut.fps, cut.span.source_file.fps, cut.start)

    @property
    def complete(self) -> bool:
        return len(self.frames) == self.cut.count

    def push(self, begin: float, end: float, frame: _Frame) -> None:
        """Takes the next moment of the file."""
        self._take(self._sampler.push(begin, end, frame))

    def finish(self) -> None:
        """Takes what is left on show when the file has ended."""
        self._take(self._sampler.rest())

    def _take(self, shown: Iterator[tuple[float, float, _Frame]]) -> None:
        for _, _, frame in shown:
            if not self.complete:
                self._crop_box = self._crop_box or self._draw(*frame.pixels.shape[:2])
                self.frames.append(frame.scaled(self._crop_box))


class _Frame:
    """A decoded frame whose pixels are made when a clip shows it, once for all of the same crop box."""

    def __init__(self, reader: Reader, raw: Any) -> None:
        self._reader, self._raw = reader, raw
        self._pixels: np.ndarray | None = None
        self._scaled: dict[CropBox, np.ndarray] = {}

    @property
    def pixels(self) -> np.ndarray:
        if self._pixels is None:
            self._pixels, self._raw = self._reader.displayed(self._raw), None
        return self._pixels

    def scaled(self, crop_box: CropBox) -> np.ndarray:
        if crop_box not in self._scaled:
            self._scaled[crop_box] = resample(self.pixels, *crop_box)
        return self._scaled[crop_box]


def read_together(clips: Sequence[Wanted]) -> Iterator[tuple[Wanted, bool]]:
    """The clips of one file, each as soon as it is whole, and whether it is: all its frames came undamaged.

    What is held are the frames of the clips that have begun, scaled, and one frame as it was decoded.
    """
    waiting = collections.deque(sorted(clips, key=lambda clip: (clip.cut.first, clip.index)))
    while waiting:
        begun: list[Wanted] = []
        try:
            yield from _read_on(waiting, begun)
        except (UserError, OSError):
            # Read alone, each of them raises its own error.
            yield from ((clip, False) for clip in [*begun, *waiting])
            return


def _read_on(waiting: collections.deque[Wanted], begun: list[Wanted]) -> Iterator[tuple[Wanted, bool]]:
    """Reads from the first clip that waits to the file's end, or to where it is better to jump."""
    report = Report()
    reader = open_reader(waiting[0].cut.span.source_file.path, waiting[0].cut.start, report)
    grace, before = reader.header.grace, None
    for begin, end, raw in reader.watched():
        moment = begin, end, _Frame(reader, raw)
        while before and waiting and waiting[0].cut.start + grace < begin:
            begun.append(waiting.popleft())
            begun[-1].push(*before)
        for clip in begun:
            clip.push(*moment)
        yield from _take_whole(begun, report)
        if not begun and waiting and waiting[0].cut.start > end + JUMP_SECONDS:
            return
        before = moment
    while before and waiting:
        begun.append(waiting.popleft())
        begun[-1].push(*before)
    for clip in begun:
        clip.finish()
    yield from _take_whole(begun, report)
    yield from ((clip, False) for clip in [*begun, *waiting])
    waiting.clear()


def _take_whole(begun: list[Wanted], report: Report) -> Iterator[tuple[Wanted, bool]]:
    for clip in [clip for clip in begun if clip.complete]:
        begun.remove(clip)
        lasts = clip.cut.start, clip.cut.start + (clip.cut.count - 1) / clip.cut.fps
        # Frames that change their size are all scaled to the first one's, and another clip has another first one.
        yield clip, not report.damage(*lasts) and len(report.sizes) == 1
