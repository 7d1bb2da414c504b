"""From a thing's path to words: how it moves, and where to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from sora_jax.toyworld import scene as world
from sora_jax.toyworld.scene import Thing

MOVES = 0.13  # short sides that a centre must travel to count as moving; what moves goes 0.2 at least
_GROWS = 1.2  # the radius at the end over that at the start, or the inverse
_TURNS = math.radians(20)
_FALLING = Thing("circle", "red", motion="gravity")


def name_motion(
    t: np.ndarray, centre: np.ndarray, radius: np.ndarray, angle: np.ndarray
) -> tuple[str, str | None]:
    """How a thing moves, and where to: from seconds f64[n], centres f64[n, 2], radii and angles f64[n]."""
    if len(t) < 2:
        return "still", None
    travel = float(np.linalg.norm(np.ptp(centre, axis=0)))
    first, last = _ends(t, radius)
    ratio = last / first
    if travel < MOVES:
        if abs(angle[-1] - angle[0]) > _TURNS:
            return "spin", None
        if ratio > _GROWS or ratio < 1 / _GROWS:
            return ("grow" if ratio > 1 else "shrink"), None
        return "still", None
    straight, along = zip(*(_fit(axis, t[None]) for axis in centre.T), strict=True)
    miss = math.hypot(*straight)
    if miss < 0.008 + 0.03 * travel:
        return "straight", name_direction(along)
    fall, drop = _fit(centre[:, 0], _falls(t))
    bounce, out = zip(*(_fit(axis, _zigzags(t)) for axis in centre.T), strict=True)
    if np.ptp(centre[:, 1]) < 0.06 and drop > 0 and fall < bounce[0] + 0.004:
        return "gravity", "down"
    if math.hypot(*bounce) < 0.6 * miss:
        return "bounce", name_direction(out)
    return "straight", name_direction(along)


def name_direction(velocity: Sequence[float]) -> str:
    """The word of the grammar that is nearest to a velocity (y, x)."""
    return max(world.DIRECTIONS, key=lambda word: np.dot(velocity, world.DIRECTIONS[word]))


def _fit(path: np.ndarray, family: np.ndarray) -> tuple[float, float]:
    """Fits a + b f to a path f64[n] for each f of a family f64[F, n]: the least RMS that is left, and its b."""
    f = family - family.mean(1, keepdims=True)
    p = path - path.mean()
    power = np.maximum((f**2).sum(1), 1e-9)
    slope = f @ p / power
    left = np.sqrt(np.maximum((p**2).sum() - slope**2 * power, 0) / len(path))
    best = int(left.argmin())
    return float(left[best]), float(slope[best])


def _zigzags(t: np.ndarray) -> np.ndarray:
    """Paths of unit speed that turn round at no, one or two times: f64[F, n]."""
    turns = np.append(np.linspace(t[0], t[-1], 33)[1:-1], t[-1])
    first, second = (turns[i][:, None] for i in np.triu_indices(len(turns)))
    back = np.clip(t, first, second) - first
    again = np.maximum(t, second) - second
    return np.minimum(t, first) - back + again


def _falls(t: np.ndarray) -> np.ndarray:
    """Falls from rest by one short side, and the hops that follow: f64[F, n].

    They last up to twice the time that is seen, and begin up to most of a frame before it.
    """
    floor = world.room(_FALLING, 1.0)[0][1]
    thing = dataclasses.replace(_FALLING, start=(floor - 1.0, 0.0))
    lengths = np.linspace(0.1, 2.0, 48) * (t[-1] - t[0])
    starts = t[0] - np.array([0.0, 0.35, 0.7]) * (t[1] - t[0])
    falls = [dataclasses.replace(thing, gravity=2 / length**2) for length in lengths]
    return np.stack([world.position(fall, t - start)[:, 0] for fall in falls for start in starts])


def start_radius(t: np.ndarray, radius: np.ndarray) -> float:
    """The radius at t = 0 of what grows or shrinks, else the one that it has in most frames."""
    start, end = _ends(t, radius)
    steady = 1 / _GROWS < end / start < _GROWS
    return float(np.median(radius)) if steady else start - (end - start) * t[0] / max(t[-1] - t[0], 1e-6)


def _ends(t: np.ndarray, radius: np.ndarray) -> tuple[float, float]:
    """The first and the last radius on the straight line through f64[n] radii."""
    if len(t) < 2:
        return float(radius[0]), float(radius[0])
    start, end = np.polyval(np.polyfit(t, radius, 1), t[[0, -1]])
    return max(float(start), 1e-3), max(float(end), 1e-3)
