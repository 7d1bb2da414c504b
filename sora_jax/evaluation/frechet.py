"""Fréchet distance of two sets of features, in float64: moments that merge, the distance, its bootstrap interval.

Heusel, Ramsauer, Unterthiner, Nessler, Hochreiter 2017, arXiv:1706.08500, eq. 6 (images, FID); Unterthiner, van
Steenkiste, Kurach, Marinier, Michalski, Gelly 2018, arXiv:1812.01717 (videos, FVD).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import linalg

from sora_jax.errors import UserError
from sora_jax.evaluation.intervals import percentiles, resamples

# What a bootstrap interval may cost; a distance of few numbers gets the most replicates within it.
_BUDGET = 2e12  # operations: a minute or so of two cores
MOST_REPLICATES, LEAST_REPLICATES = 200, 20


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Mean and scatter of features, which add up over parts of a set: `a + b` are those of both together.

    Sums of squares around the mean, not around zero, are kept: Chan, Golub, LeVeque 1979, "Updating formulae and a
    pairwise algorithm for computing sample variances". However a set is split, its moments agree but for float64's
    rounding.

    Attributes:
      count: rows.
      mean: f64[D].
      scatter: f64[D,D], the sum over rows of outer products of what is left without the mean.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray, weights: np.ndarray | None = None) -> Moments:
        """Moments of features f[N,D]; with weights i[N], row n counts `weights[n]` times.

        Raises:
          UserError: a feature is NaN or infinite.
        """
        rows = np.asarray(features, np.float64)
        if rows.ndim != 2 or not len(rows):
            raise UserError(f"Features are rows [N,D] of numbers and at least one, not {list(rows.shape)}.")
        if not np.isfinite(rows).all():
            bad = int((~np.isfinite(rows).all(1)).sum())
            raise UserError(
                f"{bad} of {len(rows)} rows of features have NaN or infinity: look at their clips."
            )
        counts = np.ones(len(rows)) if weights is None else np.asarray(weights, np.float64)
        total = counts.sum()
        mean = counts @ rows / total
        left = (rows - mean) * np.sqrt(counts)[:, None]
        return cls(int(total), mean, left.T @ left)

    def __add__(self, other: Moments) -> Moments:
        if len(self.mean) != len(other.mean):
            raise UserError(
                f"Features of {len(self.mean)} and {len(other.mean)} numbers don't belong together: take both from "
                "one extractor."
            )
        count = self.count + other.count
        apart = other.mean - self.mean
        between = np.outer(apart, apart) * (self.count * other.count / count)
        return Moments(
            count, self.mean + apart * (other.count / count), self.scatter + other.scatter + between
        )

    @property
    def covariance(self) -> np.ndarray:
        """f64[D,D], unbiased: the scatter over one less than the count.

        Raises:
          UserError: there is one row alone.
        """
        if self.count < 2:
            raise UserError(
                "A covariance needs at least 2 rows of features, and there is 1: measure more clips."
            )
        return self.scatter / (self.count - 1)


def merge(parts: Iterable[Moments]) -> Moments:
    """The moments of all parts together, in their order."""
    return functools.reduce(lambda one, other: one + other, parts)


def frechet_distance(a: Moments, b: Moments) -> float:
    """The squared Fréchet (Wasserstein-2) distance of two Gaussians with these moments.

    |m_a - m_b|² + tr C_a + tr C_b - 2 tr (C_a C_b)^½. The last trace is the sum of the singular values of F_aᵀ F_b
    where C = F Fᵀ. So no root is taken of a product that isn't symmetric, nor of eigenvalues that rounding made
    negative, and singular covariances need no multiple of the identity added. Exact to float64's rounding of the
    traces; the distance of a set to itself is about 1e-13 of them.

    Raises:
      UserError: the features have different widths, or a set has fewer than 2 rows.
    """
    if len(a.mean) != len(b.mean):
        raise UserError(
            f"Features of {len(a.mean)} and {len(b.mean)} numbers can't be compared: take both from one extractor."
        )
    cross = linalg.svdvals(_factor(a.covariance).T @ _factor(b.covariance)).sum()
    apart = a.mean - b.mean
    distance = apart @ apart + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return float(max(distance, 0.0))


def frechet_interval(
    features: np.ndarray,
    reference: Moments,
    seed: int = 0,
    replicates: int | None = None,
) -> tuple[float, float, int]:
    """95% bootstrap interval of a set's distance to a reference that is held fixed.

    Clips are drawn with replacement, all rows of one together. A drawn set has fewer distinct clips and is further
    from the reference by itself (the bias of Fréchet distances of few clips: Chong, Forsyth 2020, arXiv:1911.07023),
    so the interval is moved to lie around the measured distance: it tells how the distance would vary between sets
    of as many clips, not how far it is from that of infinitely many.

    Args:
      features: f[N,G,D], G rows of each of N clips.
      reference: what they are compared with.
      seed: the same seed gives the same interval.
      replicates: how many; None takes as many as are affordable, from 20 to 200.

    Returns:
      (low, high, replicates).
    """
    clips, group, width = features.shape
    rows = np.asarray(features, np.float64).reshape(-1, width)
    if replicates is None:
        cost = 2 * len(rows) * width**2 + 12 * width**3
        replicates = int(np.clip(_BUDGET / cost, LEAST_REPLICATES, MOST_REPLICATES))
    own = frechet_distance(Moments.of(rows), reference)
    factor = _factor(reference.covariance)
    drawn = [
        _quick_distance(Moments.of(rows, np.repeat(counts, group)), reference, factor)
        for counts in resamples(clips, seed, replicates)
    ]
    low, high = percentiles(drawn)
    shift = own - float(np.mean(drawn))
    return max(low + shift, 0.0), max(high + shift, 0.0), replicates


def _factor(covariance: np.ndarray) -> np.ndarray:
    """F with F Fᵀ the covariance, whose eigenvalues below zero are rounding."""
    values, vectors = linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0))


def _quick_distance(a: Moments, b: Moments, factor_b: np.ndarray) -> float:
    """`frechet_distance` to seven digits or so, by eigenvalues: a third of the time."""
    values = linalg.eigvalsh(factor_b.T @ a.covariance @ factor_b)
    cross = np.sqrt(np.maximum(values, 0)).sum()
    apart = a.mean - b.mean
    return float(apart @ apart + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def least_rows(width: int) -> int:
    """Rows from which on a covariance of so many numbers can be of full rank."""
    return width + 1


def in_blocks(features: Sequence[np.ndarray] | np.ndarray, size: int = 256) -> Moments:
    """Moments of rows f[N,D] taken `size` at a time, so that the products held are few."""
    return merge(Moments.of(features[i : i + size]) for i in range(0, len(features), size))
