"""When pictures are on show: an even rate for the uneven times of files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import numpy as np

Frame = TypeVar("Frame")

# Seconds. Every picture that is on show for at least so long is seen; models know no shorter frames.
SHORTEST = 1 / 24
# Rates this close are one rate: 30 and 30.01, 24 and 23.976.
SAME_RATE = 0.01
# Of pictures: a few that come at bad times don't make a file's rate.
NEARLY_ALL = 0.95
# Seconds by which a time may be off, by a container's rounding or a camera's clock, and at most that part of a frame.
JITTER, OF_A_FRAME = 0.02, 0.25


def even_rate(begins: np.ndarray, end: float, average: float) -> float:
    """The frames a second at which evenly sampled pictures show what is in a file.

    Args:
      begins: seconds at which the pictures begin, ascending.
      end: at which the last one ends.
      average: the rate that the file gives.

    Returns:
      The average where it shows every picture of at least `SHORTEST` seconds and nearly all shorter ones; else the
      rate of the shorter pictures, at most 1 / `SHORTEST`.
    """
    lengths = np.diff(begins, append=end)
    begins, lengths = begins[lengths > 0], lengths[lengths > 0]
    if average * SHORTEST >= 1 or not len(begins):
        return average
    instants = begins[0] + np.arange(math.ceil((end - begins[0]) * average - 1e-3)) / average
    ideal = begins[0] + ((begins - begins[0]) * average).round() / average
    begins = np.where(abs(begins - ideal) < _slack(average), ideal, begins)
    seen = np.zeros(len(begins), bool)
    seen[np.searchsorted(begins, instants + 1e-3 / average, "right") - 1] = True
    lasting = lengths >= SHORTEST * 0.999
    if seen[lasting].all() and seen.mean() >= NEARLY_ALL:
        return average
    # A single bad time among many says nothing of the others.
    usual = float(np.quantile(lengths, 1 - NEARLY_ALL))
    shortest = float(lengths[lasting].min()) if lasting.any() else math.inf
    return max(average, 1 / min(shortest, max(usual, SHORTEST)))


def frame_step(fps: float, most: float) -> int:
    """Of how many frames of a file at `fps` one is taken, so that at most `most` a second are left.

    What is faster by less than a hundredth counts as equal.
    """
    return max(1, math.ceil(fps / most / (1 + SAME_RATE)))


def first_instant(begin: float, start: float, fps: float) -> float:
    """The second at which reading from `start` begins, where the picture on show there began at `begin`.

    It is the picture's own begin, so that what follows comes at the file's own times, and `start` where the
    picture has been on show for longer than one of `fps` frames a second.
    """
    return begin if start - begin < 1 / fps else start


def snap(second: float, fps: float) -> float:
    """The time, or the even one of `fps` a second that it nearly is: containers round times, cameras' clocks jitter."""
    ideal = round(second * fps) / fps
    return ideal if abs(second - ideal) < _slack(fps) else second


class EvenSampler(Generic[Frame]):
    """Takes moments one by one and gives the frames at an even rate: at each instant the one that is then on show.

    Args:
      fps: of the result.
      source_fps: the rate that the moments have on the average; their times are snapped to it.
      start: seconds; the first instant is `first_instant`.
    """

    def __init__(self, fps: float, source_fps: float, start: float = 0.0) -> None:
        self.fps, self.source_fps, self.start = fps, source_fps, start
        self._grace = 1e-3 / max(fps, source_fps)  # against sums of floats
        self._base, self._count, self._begin, self._end = 0.0, 0, 0.0, 0.0
        self._shown: Frame | None = None

    def push(self, begin: float, end: float, frame: Frame) -> Iterator[tuple[float, float, Frame]]:
        """(start, end, frame) of the instants before `begin`; the first moment comes at once, however short it is."""
        begin, end = snap(begin, self.source_fps), snap(end, self.source_fps)
        if self._shown is None:
            self._base = first_instant(begin, self.start, self.source_fps)
            self._count = 1
            yield self._base, self._base + 1 / self.fps, frame
        else:
            yield from self._until(begin)
        self._shown, self._begin, self._end = frame, begin, end

    def rest(self, nearest: bool = False) -> Iterator[tuple[float, float, Frame]]:
        """The instants that are left once the last moment has come: each at which its frame is on show.

        Args:
          nearest: so many that the whole lasts as long as before, to the nearest frame; yet a last picture that lasts
            comes at least once.
        """
        if not nearest:
            yield from self._until(self._end)
            return
        last = self._base + (self._count - 1) / self.fps
        if self.fps >= self.source_fps and last + self._grace < self._begin:
            yield from self._until(self._end, most=1)
        yield from self._until(self._end - 0.5 / self.fps + 2 * self._grace)

    def _until(self, second: float, most: float = math.inf) -> Iterator[tuple[float, float, Frame]]:
        given = 0
        while self._shown is not None and given < most and self._next() + self._grace < second:
            at = self._next()
            yield at, at + 1 / self.fps, self._shown
            self._count, given = self._count + 1, given + 1

    def _next(self) -> float:
        return self._base + self._count / self.fps


def _slack(fps: float) -> float:
    return min(OF_A_FRAME / fps, JITTER)


def evenly(
    moments: Iterable[tuple[float, float, Frame]],
    fps: float,
    source_fps: float,
    start: float = 0.0,
    nearest: bool = True,
) -> Iterator[tuple[float, float, Frame]]:
    """(start, end, frame) at the even rate `fps`; see `EvenSampler`.

    Args:
      moments: (start, end, frame) in seconds, from the frame on show at `start` on.
      nearest: see `EvenSampler.rest`.
    """
    sampler: EvenSampler[Frame] = EvenSampler(fps, source_fps, start)
    for moment in moments:
        yield from sampler.push(*moment)
    yield from sampler.rest(nearest)
