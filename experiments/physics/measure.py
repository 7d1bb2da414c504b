"""What a clip shows of a law: what the oracle tracks in it, fitted and compared with the scene."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from laws import fit_bounce, fit_fall
from scenes import FPS, SIZE

from sora_jax.evaluation.intervals import percentiles, resamples, share_interval
from sora_jax.media.video import Video
from sora_jax.toyworld import oracle, regions
from sora_jax.toyworld import scene as world
from sora_jax.toyworld.scene import Scene, Thing

LAST = 3  # frames at the end, in which what was hidden has come out
NEAR = 4.0  # pixels, up to which a place counts as where the motion leads
SMOOTH = 1.0  # pixels that a fit may leave, RMS

Row = dict[str, float | bool]


def permanence(frames: np.ndarray, scene: Scene) -> Row:
    """Whether what went behind the pillar comes out: `place` is its error in pixels in the last frames."""
    shot = scene.shots[0]
    thing = shot.things[0]
    seen = oracle.read(Video(frames[-LAST:], FPS)).things
    most = max(seen, key=oracle.prominence, default=None)
    row: Row = {
        "there": most is not None,
        "colour": most is not None and most.colour == thing.colour,
        "shape": most is not None and most.shape == thing.shape,
        "hidden": _shown(frames, scene) < 0.4,
        "place": math.nan,
    }
    if most is not None and row["colour"]:
        seconds, places, _ = _arrays(most)
        row["place"] = _error(seconds + (len(frames) - LAST) / FPS, places, thing)
    return row | {
        "holds": all(row[key] for key in ("colour", "shape", "hidden")) and row["place"] < NEAR,
    }


def bounce(frames: np.ndarray, scene: Scene) -> Row:
    """The bounce that the thing of the told colour shows; lengths in pixels, angles in degrees."""
    thing = scene.shots[0].things[0]
    row: Row = {"read": False, "turned": False, "holds": False}
    names = ("speed ratio", "angle in", "angle out", "angle error", "wall gap", "residual", "end")
    row |= dict.fromkeys(names, math.nan)
    seconds, places, radius = track(frames, thing)
    fit = fit_bounce(seconds, places)
    if fit is None:
        return row
    row |= {"read": True, "turned": fit.turned, "residual": SIZE * fit.residual}
    row["end"] = _end(frames, seconds, places, thing)
    if fit.turned:
        up, down, side, _ = world.EXTENTS[thing.shape]
        reach = side if fit.axis else (down if fit.before[0] > 0 else up)
        row |= {
            "speed ratio": fit.speed_ratio,
            "angle in": fit.angle_in,
            "angle out": fit.angle_out,
            "angle error": abs(fit.angle_out - fit.angle_in),
            "wall gap": SIZE * (0.5 - abs(float(fit.place[fit.axis])) - reach * radius),
        }
        row["holds"] = (
            0.8 < fit.speed_ratio < 1.25
            and row["angle error"] < 15
            and abs(row["wall gap"]) < NEAR
            and row["residual"] < SMOOTH
        )
    return row


def gravity(frames: np.ndarray, scene: Scene) -> Row:
    """The fall that the thing of the told colour shows; accelerations in short sides a second squared."""
    thing = scene.shots[0].things[0]
    row: Row = {"read": False, "turned": False, "holds": False}
    names = ("gravity", "gravity ratio", "hop over fall", "restitution", "floor gap", "drift")
    row |= dict.fromkeys((*names, "residual", "sideways residual", "end"), math.nan)
    seconds, places, radius = track(frames, thing)
    fit = fit_fall(seconds, places)
    if fit is None:
        return row
    down = world.EXTENTS[thing.shape][1]
    row |= {
        "read": True,
        "turned": fit.before > 0.2 and fit.after < -0.1 * fit.before,
        "gravity": fit.gravity,
        "gravity ratio": fit.gravity / thing.gravity,
        "residual": SIZE * fit.residual,
        "sideways residual": SIZE * fit.sideways_residual,
        "drift": SIZE * abs(fit.drift),
        "end": _end(frames, seconds, places, thing),
    }
    if row["turned"]:
        row |= {
            "hop over fall": fit.hop_gravity / max(fit.gravity, 1e-3),
            "restitution": fit.restitution,
            "floor gap": SIZE * (0.5 - fit.height - down * radius),
        }
        row["holds"] = (
            0.67 < fit.gravity / thing.gravity < 1.5
            and 0.5 < row["hop over fall"] < 2
            and abs(fit.restitution - world.RESTITUTION) < 0.2
            and abs(row["floor gap"]) < NEAR
            and max(row["residual"], row["sideways residual"]) < SMOOTH
        )
    return row


MEASURES: dict[str, Callable[[np.ndarray, Scene], Row]] = {
    "permanence": permanence,
    "bounce": bounce,
    "gravity": gravity,
}


def track(frames: np.ndarray, thing: Thing) -> tuple[np.ndarray, np.ndarray, float]:
    """(seconds, places, radius) of the most prominent thing of this one's colour; empty where there is none."""
    seen = [each for each in oracle.read(Video(frames, FPS)).things if each.colour == thing.colour]
    if not seen:
        return np.empty(0), np.empty((0, 2)), math.nan
    return _arrays(max(seen, key=oracle.prominence))


def summarize(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Shares with Wilson's interval; medians, over the clips that have the figure, with the bootstrap's."""
    return {key: _figure([row[key] for row in rows]) for key in rows[0]}


def _figure(values: Sequence[float | bool]) -> dict[str, Any]:
    if isinstance(values[0], (bool, np.bool_)):
        low, high = share_interval(int(sum(values)), len(values))
        return {"share": float(np.mean(values)), "low": low, "high": high, "of": len(values)}
    known = np.array([value for value in values if not math.isnan(value)], float)
    if len(known) < 2:
        return {"median": None, "low": None, "high": None, "of": len(known)}
    medians = [float(np.median(np.repeat(known, counts))) for counts in resamples(len(known), 0, 1000)]
    low, high = percentiles(medians)
    figures = {"median": float(np.median(known)), "low": low, "high": high}
    return {key: round(value, 4) for key, value in figures.items()} | {"of": len(known)}


def _arrays(thing: oracle.ReadThing) -> tuple[np.ndarray, np.ndarray, float]:
    seconds, y, x, radius = np.array(thing.track).T
    return seconds, np.stack([y, x], -1), float(np.median(radius))


def _error(seconds: np.ndarray, places: np.ndarray, thing: Thing) -> float:
    """Mean distance to where the scene has the thing, in pixels."""
    return float(SIZE * np.linalg.norm(places - world.position(thing, seconds), axis=-1).mean())


def _end(frames: np.ndarray, seconds: np.ndarray, places: np.ndarray, thing: Thing) -> float:
    late = seconds > (len(frames) - LAST - 0.5) / FPS
    return _error(seconds[late], places[late], thing) if late.any() else math.nan


def _shown(frames: np.ndarray, scene: Scene) -> float:
    """How much of the thing is seen where the pillar hides it most, as a share of what the first frame shows."""
    thing, pillar = scene.shots[0].things[0], scene.shots[0].occluder
    assert pillar is not None
    path = world.position(thing, np.arange(len(frames)) / FPS)[:, 1]
    middle = int(np.abs(path - pillar.x).argmin())
    area = (regions.segment(frames[[0, middle]]).colour > 0).sum((1, 2))
    return float(area[1] / max(area[0], 1))
