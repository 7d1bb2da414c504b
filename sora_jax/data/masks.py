"""Canvases for training: drawn at random from the family that abilities make, so that one model learns them all.

Two draws make one. `draw_layout`, where clips are encoded, says which frames will be conditioning, since that decides
how they are cut into spans (`spans.split_into_spans`); `draw_canvas`, each time a record is read, draws the initial
σ, and takes a temporal crop with some probability.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np

from sora_jax.errors import UserError
from sora_jax.tokens.canvas import Canvas
from sora_jax.tokens.spans import FRAMES_PER_LATENT, split_into_spans

Rng: TypeAlias = np.random.Generator


def draw_layout(
    rng: Rng, frames: int, weights: Mapping[str, float], given: int = 0, stride: int = FRAMES_PER_LATENT
) -> np.ndarray:
    """Which of a clip's frames will be conditioning: bool[T], T ≤ `frames`, by a kind drawn from `weights`.

    "none": no frame; the clip is one span. "last": some frames at the end. "ends": some at both ends.
    "even": every second to fifth frame. "scattered": single frames anywhere. "middle": some in the middle.
    Where `given` isn't 0, nothing is drawn: the first so many frames are. A latent frame shows `stride` frames.
    Where spans would reach past the clip's end, the layout is shorter than the clip.

    Raises:
      UserError: there is no such kind.
    """
    conditioning = np.zeros(frames, bool)
    conditioning[:given] = True
    kind = _draw(rng, weights, _LAYOUTS, "latents.layouts")
    if frames > stride and not given:
        _LAYOUTS[kind](rng, conditioning, stride)
    length = frames
    while max(span.ends[-1] for span in split_into_spans(conditioning[:length], stride)) >= frames:
        length -= 1
    if conditioning[:length].all():  # nothing is left to generate: a clip of one span
        return np.zeros(1 + (frames - 1) // stride * stride, bool)
    return conditioning[:length]


def _last(rng: Rng, conditioning: np.ndarray, stride: int) -> None:
    conditioning[-_some(rng, len(conditioning), stride) :] = True


def _ends(rng: Rng, conditioning: np.ndarray, stride: int) -> None:
    conditioning[: _some(rng, len(conditioning) // 2, stride)] = True
    _last(rng, conditioning[len(conditioning) // 2 :], stride)


def _even(rng: Rng, conditioning: np.ndarray, stride: int) -> None:
    conditioning[:: rng.integers(2, 6)] = True


def _scattered(rng: Rng, conditioning: np.ndarray, stride: int) -> None:
    conditioning[rng.integers(len(conditioning), size=rng.integers(1, 4))] = True


def _middle(rng: Rng, conditioning: np.ndarray, stride: int) -> None:
    length = _some(rng, len(conditioning), stride)
    begin = rng.integers(1, max(len(conditioning) - length, 2))
    conditioning[begin : begin + length] = True


def _some(rng: Rng, frames: int, stride: int) -> int:
    """Mostly one frame, or 1 + k strides: what costs no single frames before it; less than all."""
    most = max((frames - 1 - 1) // stride, 0)
    choices = [1, 1 + stride * rng.integers(most + 1), rng.integers(1, max(frames - 1, 2))]
    return int(choices[rng.choice(3, p=(0.4, 0.45, 0.15))])


_LAYOUTS: dict[str, Callable[[Rng, np.ndarray, int], None]] = {
    "none": lambda rng, conditioning, stride: None,
    "last": _last,
    "ends": _ends,
    "even": _even,
    "scattered": _scattered,
    "middle": _middle,
}
LAYOUTS = tuple(_LAYOUTS)


def draw_canvas(
    rng: Rng, canvas: Canvas, weights: Mapping[str, float], temporal_crop_prob: float, most: int
) -> Canvas:
    """Draws the initial σ of an encoded clip, all of whose latents are known.

    The conditioning frames of its layout stay. Of a clip of one span, by a kind drawn from `weights`, conditioning is
    "none"; the "first" latent frame; some at the "begin"; all but a "box", or but the "margins" around it; or none,
    and some frames are partially noised ("levels"). Two kinds are as later windows of a long clip: "context", which
    begins in the middle of a span with frames at one low σ (diffusion forcing, Chen et al. 2024), and "anchor", such
    a window after the clip's first frame, which is conditioning; frames between them may be missing.

    Args:
      rng: the draw.
      canvas: `init_sigma` is 0 for the layout's conditioning frames, 1 elsewhere.
      weights: of the kinds; empty: no conditioning but the layout's.
      temporal_crop_prob: probability of a temporal crop, as the sampler's windows are.
      most: latent frames that may be kept.

    Raises:
      UserError: there is no such kind.
    """
    t = len(canvas)
    if t > most or (t > 2 and rng.random() < temporal_crop_prob):
        length = int(rng.integers(2, min(t, most) + 1)) if min(t, most) >= 2 else 1
        begin = int(rng.integers(t - length + 1))
        canvas = canvas.part(slice(begin, begin + length))
    conditioning = canvas.conditioning_frames
    if conditioning.any() and not conditioning.all():
        return canvas
    kind = _draw(rng, weights, _CANVASES, "pipeline.canvases") if weights else "none"
    init_sigma = np.ones_like(canvas.init_sigma)
    seen = _CANVASES[kind](rng, init_sigma)
    if seen is not None:
        canvas, init_sigma = canvas.part(seen), init_sigma[seen]
    return dataclasses.replace(
        canvas, init_sigma=init_sigma if init_sigma.any() else np.ones_like(init_sigma)
    )


def _first(rng: Rng, init_sigma: np.ndarray) -> None:
    init_sigma[0] = 0


def _begin(rng: Rng, init_sigma: np.ndarray) -> None:
    init_sigma[: rng.integers(1, max(len(init_sigma), 2))] = 0


def _box(rng: Rng, init_sigma: np.ndarray) -> None:
    inside = _rectangle(rng, init_sigma)
    init_sigma[:, ~inside] = 0


def _margins(rng: Rng, init_sigma: np.ndarray) -> None:
    init_sigma[:, _rectangle(rng, init_sigma)] = 0


def _levels(rng: Rng, init_sigma: np.ndarray) -> None:
    begin, last = sorted(rng.integers(len(init_sigma), size=2))
    init_sigma[begin : last + 1] = np.float32(rng.uniform(0.05, 0.95))


def _context(rng: Rng, init_sigma: np.ndarray) -> np.ndarray:
    """Leaves the first frame out: a later window doesn't begin with the one that shows a single video frame."""
    begin = min(1, max(len(init_sigma) - 2, 0))
    _noise_context(rng, init_sigma[begin:])
    return np.arange(begin, len(init_sigma))


def _anchor(rng: Rng, init_sigma: np.ndarray) -> np.ndarray:
    if len(init_sigma) < 3:
        return _context(rng, init_sigma)
    begin = int(rng.integers(1, len(init_sigma) - 1))
    init_sigma[0] = 0
    _noise_context(rng, init_sigma[begin:])
    return np.append(0, np.arange(begin, len(init_sigma)))


def _noise_context(rng: Rng, init_sigma: np.ndarray) -> None:
    """Some frames at the begin, less than all, at one σ up to 0.5; one time in four they are conditioning."""
    level = np.float32(rng.uniform(0.05, 0.5)) if rng.random() < 0.75 else 0
    init_sigma[: rng.integers(min(1, len(init_sigma) - 1), len(init_sigma))] = level


def _rectangle(rng: Rng, init_sigma: np.ndarray) -> np.ndarray:
    """bool[y,x], true inside; it reaches a side of the frame as often as not, and has one cell at least."""
    inside = np.ones(init_sigma.shape[1:], bool)
    for axis, size in enumerate(inside.shape):
        length = max(round(size * rng.uniform(0.3, 0.9)), 1)
        begin = rng.choice([0, int(rng.integers(size - length + 1)), size - length])
        outside = np.ones(size, bool)
        outside[begin : begin + length] = False
        inside[(outside, slice(None)) if axis == 0 else (slice(None), outside)] = False
    return inside


# Each changes `init_sigma` in place, and gives the latent frames that stay where they aren't all.
_CANVASES: dict[str, Callable[[Rng, np.ndarray], np.ndarray | None]] = {
    "none": lambda rng, init_sigma: None,
    "first": _first,
    "begin": _begin,
    "box": _box,
    "margins": _margins,
    "levels": _levels,
    "context": _context,
    "anchor": _anchor,
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
