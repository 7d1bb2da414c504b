"""How far a figure would move with other clips: bootstrap intervals of means, Wilson's of shares."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

LEVEL = 0.95
REPLICATES = 1000


def share_interval(right: int, of: int, z: float = 1.959964) -> tuple[float, float]:
    """95% interval of a share, `right` of `of`: Wilson 1927, "Probable inference, the law of succession"."""
    share, weight = right / of, 1 + z * z / of
    middle = (share + z * z / (2 * of)) / weight
    half = z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of)) / weight
    return round(max(0.0, middle - half), 9), round(min(1.0, middle + half), 9)


def mean_interval(
    values: Sequence[float] | np.ndarray, seed: int = 0, replicates: int = REPLICATES
) -> tuple[float, float] | None:
    """95% percentile bootstrap interval of a mean (Efron 1979, "Bootstrap methods: another look at the jackknife").

    Args:
      values: one for each clip.
      seed: the same seed gives the same interval.
      replicates: sets drawn, with replacement, from the values.

    Returns:
      (low, high), or None of fewer than two values, which tell nothing of how they vary.
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return None
    means = [counts @ values / len(values) for counts in resamples(len(values), seed, replicates)]
    return percentiles(means)


def resamples(count: int, seed: int, replicates: int) -> Iterator[np.ndarray]:
    """How often each of `count` clips is in a set of as many drawn with replacement: i[count], `replicates` times.

    Replicate k is the same whatever their number is.
    """
    for replicate in range(replicates):
        drawn = np.random.default_rng((seed, replicate)).integers(0, count, count)
        yield np.bincount(drawn, minlength=count)


def percentiles(figures: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """The middle `level` of what was drawn: (low, high)."""
    low, high = np.quantile(figures, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
