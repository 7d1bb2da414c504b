"""Training's canvases: drawn at random from the family that abilities paint, so that one model learns them all.

Two draws make one. `draw_layout`, where clips are encoded, says which frames will be given whole, since that
decides how they are cut into streams (`canvas.lay_streams`); `draw_canvas`, each time a record is read, says where σ
starts, and takes a window of it now and then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np

from sora_jax.errors import UserError
from sora_jax.tokens.canvas import GROUP, Canvas, lay_streams

Rng: TypeAlias = np.random.Generator


def draw_layout(rng: Rng, frames: int, weights: Mapping[str, float]) -> np.ndarray:
    """Which of a clip's frames will be given: bool[T], T ≤ `frames`, by a kind drawn from `weights`.

    "none": no frame; the clip is one stream. "last": some frames at the end. "ends": some at both ends.
    "even": every second to fifth frame. "scattered": single frames anywhere. "middle": some in the middle.
    Where streams would run over the clip's end, the layout is shorter than the clip.

    Raises:
      UserError: there is no such kind.
    """
    kind = _draw(rng, weights, _LAYOUTS, "latents.layouts")
    fixed = np.zeros(frames, bool)
    if frames > GROUP:
        _LAYOUTS[kind](rng, fixed)
    length = frames
    while max(stream.ends[-1] for stream in lay_streams(fixed[:length])) >= frames:
        length -= 1
    if fixed[:length].all():  # nothing is left to paint: a clip of one stream
        return np.zeros(1 + (frames - 1) // GROUP * GROUP, bool)
    return fixed[:length]


def _last(rng: Rng, fixed: np.ndarray) -> None:
    fixed[-_some(rng, len(fixed)) :] = True


def _ends(rng: Rng, fixed: np.ndarray) -> None:
    fixed[: _some(rng, len(fixed) // 2)] = True
    _last(rng, fixed[len(fixed) // 2 :])


def _even(rng: Rng, fixed: np.ndarray) -> None:
    fixed[:: rng.integers(2, 6)] = True


def _scattered(rng: Rng, fixed: np.ndarray) -> None:
    fixed[rng.integers(len(fixed), size=rng.integers(1, 4))] = True


def _middle(rng: Rng, fixed: np.ndarray) -> None:
    length = _some(rng, len(fixed))
    begin = rng.integers(1, max(len(fixed) - length, 2))
    fixed[begin : begin + length] = True


def _some(rng: Rng, frames: int) -> int:
    """Mostly one frame, or 1 + 4k: what costs no single frames before it; less than all."""
    most = max((frames - 1 - 1) // GROUP, 0)
    choices = [1, 1 + GROUP * rng.integers(most + 1), rng.integers(1, max(frames - 1, 2))]
    return int(choices[rng.choice(3, p=(0.4, 0.45, 0.15))])


_LAYOUTS: dict[str, Callable[[Rng, np.ndarray], None]] = {
    "none": lambda rng, fixed: None,
    "last": _last,
    "ends": _ends,
    "even": _even,
    "scattered": _scattered,
    "middle": _middle,
}
LAYOUTS = tuple(_LAYOUTS)


def draw_canvas(rng: Rng, canvas: Canvas, weights: Mapping[str, float], window: float, most: int) -> Canvas:
    """Says where σ starts in a clip that was encoded, all of whose latents are known.

    What its layout meant to give is given. Of a clip of one stream, by a kind drawn from `weights`: "none" is
    given; the "first" latent frame; some at the "begin"; all but a "box", or but the "margins" around it; or nothing,
    but some frames start at a lowered level ("levels").

    Args:
      rng: the draw.
      canvas: `start` is 0 where the layout meant frames to be given, 1 elsewhere.
      weights: of the kinds; empty: nothing is given.
      window: how often a part of the clip's time is taken, as the sampler's windows do.
      most: latent frames that may be kept.

    Raises:
      UserError: there is no such kind.
    """
    t = len(canvas)
    if t > most or (t > 2 and rng.random() < window):
        length = int(rng.integers(2, min(t, most) + 1)) if min(t, most) >= 2 else 1
        begin = int(rng.integers(t - length + 1))
        canvas = canvas.part(slice(begin, begin + length))
    fixed = canvas.fixed
    if fixed.any() and not fixed.all():
        return canvas
    kind = _draw(rng, weights, _CANVASES, "pipeline.canvases") if weights else "none"
    start = np.ones_like(canvas.init_sigma)
    _CANVASES[kind](rng, start)
    return dataclasses.replace(canvas, init_sigma=start if start.any() else np.ones_like(start))


def _first(rng: Rng, start: np.ndarray) -> None:
    start[0] = 0


def _begin(rng: Rng, start: np.ndarray) -> None:
    start[: rng.integers(1, max(len(start), 2))] = 0


def _box(rng: Rng, start: np.ndarray) -> None:
    inside = _rectangle(rng, start)
    start[:, ~inside] = 0


def _margins(rng: Rng, start: np.ndarray) -> None:
    start[:, _rectangle(rng, start)] = 0


def _levels(rng: Rng, start: np.ndarray) -> None:
    begin, last = sorted(rng.integers(len(start), size=2))
    start[begin : last + 1] = np.float32(rng.uniform(0.05, 0.95))


def _rectangle(rng: Rng, start: np.ndarray) -> np.ndarray:
    """bool[y,x], true inside; it reaches a side of the frame as often as not, and has one cell at least."""
    inside = np.ones(start.shape[1:], bool)
    for axis, size in enumerate(inside.shape):
        length = max(round(size * rng.uniform(0.3, 0.9)), 1)
        begin = rng.choice([0, int(rng.integers(size - length + 1)), size - length])
        outside = np.ones(size, bool)
        outside[begin : begin + length] = False
        inside[(outside, slice(None)) if axis == 0 else (slice(None), outside)] = False
    return inside


_CANVASES: dict[str, Callable[[Rng, np.ndarray], None]] = {
    "none": lambda rng, start: None,
    "first": _first,
    "begin": _begin,
    "box": _box,
    "margins": _margins,
    "levels": _levels,
}
CANVASES = tuple(_CANVASES)


def _draw(rng: Rng, weights: Mapping[str, float], known: Mapping[str, object], name: str) -> str:
    unknown = sorted(set(weights) - set(known))
    if unknown or not sum(weights.values()) > 0:
        what = f"{name}.{unknown[0]} is unknown" if unknown else f"{name} has no positive weight"
        raise UserError(f"{what}: choose from {', '.join(known)}.")
    kinds = sorted(weights)
    chances = np.array([weights[kind] for kind in kinds], float)
    return kinds[rng.choice(len(kinds), p=chances / chances.sum())]
