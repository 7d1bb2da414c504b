"""How likely each shape is to look like what was seen, however it was degraded.

A generated shape is rarely perfect: it is blurred, its corners are filled, its hole half closed. So what is seen is
compared with templates of every shape on its way to every other, as far as a person would still name it, each at
several blurs. Polygons meet half way; a circle ends where the eye begins to see corners, when the edge's farthest
point is some 13% farther out than its nearest. A shape's likelihood is the mean over its templates, so that none is
likelier for having more of them.

Both are compared as polar pictures: cover over distance from the centroid, in radii of the disc of the same area,
and angle, in which a turn is a shift.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from scipy import ndimage, special

from sora_jax.toyworld import scene as world

HOLE = 0.56 / 1.08  # a ring's hole, in its outer radii
# Of the polygons: symmetry under rotation, radius of corners, radius midway between them, angle of the first corner.
_CORNERS = {
    "square": (4, 0.88 * math.sqrt(2), 0.88, math.pi / 4),
    "triangle": (3, 1.3, 0.65, 0.0),
    "star": (5, 1.3, 0.6, 0.0),
}
_SHARES = (0.2, 0.4)  # of the way from polygon to polygon; at a half it is as much the one as the other
_BULGES = (0.05, 0.1)  # of what is still a circle
_LEAST_BULGE = 0.16  # of what still has corners, reached in _STEPS
_STEPS = (0.25, 0.5, 0.75, 1.0)
_FILLED = (0.3, 0.6)  # of a star's notches
_CLOSED = (0.0, 0.3, 0.6)  # of a ring's hole
_BLURS = (0.08, 0.18, 0.28, 0.38)  # standard deviations, in radii of the disc of the same area
_REACH, _RINGS, _ANGLES = 1.9, 19, 60  # of polar pictures; all symmetries divide the number of angles
_PACES = np.arange(-25, 26) / 5  # of turning: angles of a polar picture a frame, 30 degrees at most
_FINE = 12.0  # pixels that a template's unit has


def outline(shape: str, angle: np.ndarray, filled: float = 0.0) -> np.ndarray:
    """Distance f64[...] of the shape's edge from its centre, at angles clockwise from up; its area is pi.

    Args:
      shape: of `scene.SHAPES`; of a ring the outer edge.
      filled: share by which the notches of a star are filled: at 1 it is a pentagon.
    """
    if shape not in _CORNERS:
        return np.ones_like(angle)
    fold, outer, inner, first = _CORNERS[shape]
    half = math.pi / fold
    inner += filled * (outer * math.cos(half) - inner)
    area = fold * outer * inner * math.sin(half)
    off = np.abs((angle - first + half) % (2 * half) - half)  # from the nearest corner
    edge = outer * inner * math.sin(half) / (outer * np.sin(off) + inner * np.sin(half - off))
    return edge / math.sqrt(area / math.pi)


def between(shape: str, other: str, share: float, angle: np.ndarray) -> np.ndarray:
    """The outline that has gone a share of the way from one shape to another."""
    return (1 - share) * outline(shape, angle) + share * outline(other, angle)


def bulging(shape: str, bulge: float) -> float:
    """Share of the way from circle to polygon at which the farthest of the edge is 1 + `bulge` times the nearest."""
    edge = outline(shape, np.linspace(0, 2 * math.pi, 721))
    most, least = edge.max() - 1, edge.min() - 1
    return float(bulge / (most - (1 + bulge) * least))


def polar(seen: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Polar pictures f64[n, rings, angles] of covers [n, P, P] around centres f64[n, 2], (y, x) in pixels of them."""
    unit = np.sqrt(np.maximum(seen.sum((1, 2)), 1.0) / math.pi)[:, None, None]
    angle = np.arange(_ANGLES) * (2 * math.pi / _ANGLES)
    distance = unit * _distances()[:, None]
    y, x = (
        centre[:, i, None, None] - 0.5 + distance * wave
        for i, wave in enumerate((-np.cos(angle), np.sin(angle)))
    )
    frame = np.broadcast_to(np.arange(len(seen))[:, None, None], y.shape)
    return ndimage.map_coordinates(np.clip(seen, 0, 1), (frame, y, x), order=1, mode="constant")


def log_likelihoods(
    pictures: np.ndarray, frames: np.ndarray, noise: float = 1e-4, turned: float = 1.5
) -> dict[str, float]:
    """Of each shape, up to a constant all have in common: upright, or, if it has corners, turning at an even pace.

    Args:
      pictures: f64[n, rings, angles] of one thing in n frames, from `polar`.
      frames: i[n], their numbers.
      noise: mean square by which templates and the mean picture differ where both show the same, twice.
      turned: by how much worse what is left counts where the shape is other than upright.
    """
    weight = _distances()[:, None] / (_distances().sum() * _ANGLES)
    square = (pictures**2 * weight).sum((1, 2)).mean()
    waves = np.fft.rfft(pictures * weight, axis=-1)
    # The mean picture, each frame first turned back: by nothing, and at every pace.
    back = np.exp(2j * np.pi / _ANGLES * frames[:, None, None] * _PACES[:, None] * np.arange(waves.shape[-1]))
    mean = np.einsum("frk,fpk->prk", waves, back, optimize=True) / len(frames)
    out = {}
    for shape, bank in _templates().items():
        own = square + (bank**2 * weight).sum((1, 2))
        alike = np.einsum("ra,vra->v", pictures.mean(0) * weight, bank)
        scores = [-(own - 2 * alike) / noise]
        if shape in _CORNERS:
            cross = np.einsum("prk,vrk->pvk", mean, np.fft.rfft(bank, axis=-1).conj(), optimize=True)
            alike = np.fft.irfft(cross, _ANGLES).max((0, 2))
            scores.append(-turned * (own - 2 * alike) / noise)
        out[shape] = float(special.logsumexp(np.concatenate(scores)) - math.log(len(bank)))
    return out


def _distances() -> np.ndarray:
    return np.arange(_RINGS) * (_REACH / (_RINGS - 1))


@functools.cache
def _templates() -> dict[str, np.ndarray]:
    """Polar pictures of each shape, degraded: f64[v, rings, angles]."""
    half = math.ceil(_FINE * (_REACH + 2 * _BLURS[-1]))
    steps = (np.arange(2 * half + 1) - half) / _FINE
    distance, angle = np.hypot(steps[:, None], steps), np.arctan2(steps, -steps[:, None])
    out = {}
    for shape in world.SHAPES:
        covers = [
            np.clip(0.5 + (edge - distance) * _FINE, 0, 1)
            * np.clip(0.5 + (distance - hole) * _FINE, hole == 0, 1)
            for edge, hole in _variants(shape, angle)
        ]
        blurred = np.stack([ndimage.gaussian_filter(c, blur * _FINE) for c in covers for blur in _BLURS])
        blurred[blurred < 0.1] = 0
        mass = blurred.sum((1, 2))
        rows = np.arange(2 * half + 1) + 0.5
        centre = np.stack([(blurred.sum(axis) @ rows) / mass for axis in (2, 1)], -1)
        out[shape] = polar(blurred, centre)
    return out


def _variants(shape: str, angle: np.ndarray) -> list[tuple[np.ndarray, float]]:
    """(edge, radius of the hole) of the shape, and of it on its way to every other."""
    edges = [outline(shape, angle)]
    for other in _CORNERS:
        if shape not in _CORNERS:  # round ones, which bulge
            shares = [bulging(other, bulge) for bulge in _BULGES]
            edges += [between("circle", other, share, angle) for share in shares]
        elif shape == other:  # corners, which round
            most = 1 - bulging(shape, _LEAST_BULGE)
            edges += [between(shape, "circle", most * step, angle) for step in _STEPS]
        else:
            edges += [between(shape, other, share, angle) for share in _SHARES]
    if shape == "star":
        edges += [outline(shape, angle, filled) for filled in _FILLED]
    holes = [HOLE * (1 - closed) for closed in _CLOSED] if shape == "ring" else [0.0]
    return [(edge, hole) for edge in edges for hole in holes]
