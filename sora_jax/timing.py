"""When pictures are on show: an even rate for the uneven times of files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeVar

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


def snapped(
    moments: Iterator[tuple[float, float, Frame]], fps: float
) -> Iterator[tuple[float, float, Frame]]:
    """(start, end, frame) where times that nearly are those of `fps` even frames a second become these."""
    slack = _slack(fps)

    def near(second: float) -> float:
        ideal = round(second * fps) / fps
        return ideal if abs(second - ideal) < slack else second

    for begin, end, frame in moments:
        yield near(begin), near(end), frame


def _slack(fps: float) -> float:
    return min(OF_A_FRAME / fps, JITTER)


def evenly(
    moments: Iterator[tuple[float, float, Frame]], fps: float, source_fps: float, start: float = 0.0
) -> Iterator[tuple[float, float, Frame]]:
    """(start, end, frame) at the even rate `fps`: at each instant the frame that is then on show.

    Args:
      moments: (start, end, frame) in seconds, from the frame on show at `start` on.
      fps: of the result.
      source_fps: the rate that the moments have on the average.
      start: seconds; the first instant is `first_instant`.
    """
    # Against sums of floats.
    grace = 1e-3 / max(fps, source_fps)
    base, count, begin, end = 0.0, 0, 0.0, 0.0
    shown: Any = None
    for begin, until, frame in snapped(moments, source_fps):
        if shown is None:
            base = first_instant(begin, start, source_fps)
            # The first comes, however short it is.
            yield base, base + 1 / fps, frame
            count = 1
        while (at := base + count / fps) + grace < begin:
            yield at, at + 1 / fps, shown
            count += 1
        shown, end = frame, until
    # The whole lasts as long as before, to the nearest frame; yet a last picture that lasts comes at least once.
    unseen = (
        shown is not None and count > 0 and base + (count - 1) / fps + grace < begin and fps >= source_fps
    )
    while shown is not None and (at := base + count / fps) + (grace if unseen else 0.5 / fps - grace) < end:
        yield at, at + 1 / fps, shown
        count, unseen = count + 1, False
