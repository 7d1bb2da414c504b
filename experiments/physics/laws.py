"""Laws of motion fitted to a track by least squares: a bounce off a wall, a fall with the hop that follows.

A track is seconds f64[n] and places f64[n, 2] (y, x; y down), in any unit of length. Where the motion turns is not
asked of the track: it is where the fit leaves the least, by a grid and then Brent's method.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from scipy.optimize import minimize_scalar

_GRID = 0.02  # seconds
_SIDE = 4  # measured places that each side of the turn must have


@dataclasses.dataclass(frozen=True)
class Bounce:
    """Two straight lines that meet.

    Attributes:
      time: seconds, when they meet. place: f64[2], where.
      before, after: f64[2], velocities.
      axis: 0 or 1, along which the velocity turned round most: across the wall.
      residual: what is left of the places, RMS of both axes together.
    """

    time: float
    place: np.ndarray
    before: np.ndarray
    after: np.ndarray
    axis: int
    residual: float

    @property
    def turned(self) -> bool:
        """Whether it came back from the wall, with a quarter of its speed at least."""
        across = self.before[self.axis], self.after[self.axis]
        return bool(across[0] * across[1] < 0 and abs(across[1]) > 0.25 * abs(across[0]))

    @property
    def speed_ratio(self) -> float:
        """Speed after the bounce over that before; 1 where none is lost."""
        return _length(self.after) / max(_length(self.before), 1e-9)

    @property
    def angle_in(self) -> float:
        """Degrees between the way to the wall and the wall's normal."""
        return _slant(self.before, self.axis)

    @property
    def angle_out(self) -> float:
        """Degrees between the way from the wall and the wall's normal; negative if it went back along the wall."""
        along = 1 - self.axis
        return math.copysign(1, self.before[along] * self.after[along]) * _slant(self.after, self.axis)


@dataclasses.dataclass(frozen=True)
class Fall:
    """Two parabolas that meet on the floor, and a straight line sideways.

    Attributes:
      time, height: when and where it meets the floor.
      before, after: vertical speeds there, downward.
      gravity, hop_gravity: accelerations, downward, of the fall and of the hop.
      drift: sideways speed.
      residual, sideways_residual: RMS of what is left of the heights, and of the places sideways.
    """

    time: float
    height: float
    before: float
    after: float
    gravity: float
    hop_gravity: float
    drift: float
    residual: float
    sideways_residual: float

    @property
    def restitution(self) -> float:
        """Speed with which it leaves the floor over that with which it came."""
        return -self.after / self.before if self.before > 1e-9 else math.nan


def fit_bounce(seconds: np.ndarray, places: np.ndarray) -> Bounce | None:
    """The bounce that the track shows best; None of a track too short to tell."""
    basis = lambda s: np.stack([np.ones_like(s), np.minimum(s, 0), np.maximum(s, 0)], -1)
    if (best := _best_turn(seconds, places, basis)) is None:
        return None
    time, (place, before, after), residual = best
    return Bounce(time, place, before, after, int(np.argmin(before * after)), _rms(residual))


def fit_fall(seconds: np.ndarray, places: np.ndarray) -> Fall | None:
    """The fall and the hop that the track shows best; None of a track too short to tell."""

    def basis(s: np.ndarray) -> np.ndarray:
        fall, hop = np.minimum(s, 0), np.maximum(s, 0)
        return np.stack([np.ones_like(s), fall, hop, fall**2 / 2, hop**2 / 2], -1)

    if (best := _best_turn(seconds, places[:, :1], basis)) is None:
        return None
    time, weights, residual = best
    height, before, after, gravity, hop_gravity = map(float, weights[:, 0])
    line = np.stack([np.ones_like(seconds), seconds], -1)
    across, left = _solve(line, places[:, 1:])
    return Fall(
        time, height, before, after, gravity, hop_gravity, float(across[1, 0]), _rms(residual), _rms(left)
    )


def _best_turn(
    seconds: np.ndarray, values: np.ndarray, basis: Callable[[np.ndarray], np.ndarray]
) -> tuple[float, np.ndarray, np.ndarray] | None:
    """(time, weights, what is left) of the turn that leaves the least squares."""
    if len(seconds) < 2 * _SIDE:
        return None
    times = np.arange(seconds[_SIDE - 1], seconds[-_SIDE] + _GRID / 2, _GRID)
    left = lambda time: float((_solve(basis(seconds - time), values)[1] ** 2).sum())
    best = min(times, key=left)
    near = minimize_scalar(left, bounds=(best - _GRID, best + _GRID), method="bounded").x
    time = float(min(best, near, key=left))
    return time, *_solve(basis(seconds - time), values)


def _solve(columns: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    weights = np.linalg.lstsq(columns, values, rcond=None)[0]
    return weights, values - columns @ weights


def _rms(left: np.ndarray) -> float:
    return float(np.sqrt((left**2).sum(-1).mean()))


def _length(vector: np.ndarray) -> float:
    return float(np.hypot(*vector))


def _slant(velocity: np.ndarray, axis: int) -> float:
    return math.degrees(math.atan2(abs(velocity[1 - axis]), abs(velocity[axis])))
