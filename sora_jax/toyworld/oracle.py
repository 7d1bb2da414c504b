"""The oracle: reads Toyworld clips back without a neural network, and scores what it read against a scene.

`read` turns frames into words (shape, colour, size, direction, motion, inside or cut off, back after it was
hidden, cuts) and never sees the scene; `score` compares the words with a scene's truth. What a scene shows
on the screen is the truth: under a moving camera a thing goes where the frame sees it go. Where the truth itself lies
on a border (a thing that drifts just enough to be seen to, or that just touches the edge) either answer is right.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from sora_jax.errors import UserError
from sora_jax.media.video import Video, resize
from sora_jax.toyworld import regions, shapes
from sora_jax.toyworld import scene as world
from sora_jax.toyworld.motions import MOVES, name_direction, name_motion, start_radius
from sora_jax.toyworld.render import render
from sora_jax.toyworld.sampling import sample_scene
from sora_jax.toyworld.scene import Scene, Shot, Thing

ATTRIBUTES = ("count", "colour", "shape", "size", "direction", "motion", "inside", "reappears", "cuts")
SHAPE_READINGS = ("likelihood", "nearest")
CAPTIONED = ("colour", "shape", "direction")  # what "all" asks for: all three, of every thing

_HIDDEN, _SHOWN = 0.4, 0.6  # shares of a thing's area that is seen
_STICKS_OUT = 1.5  # pixels beyond the frame's edge
_FINE = 128  # pixels of short side; what is finer is read at three quarters of this
_SIZES = tuple(world.SIZES)


@dataclasses.dataclass(frozen=True)
class ReadThing:
    """What was read of one thing in one shot.

    Attributes:
      shape, colour, size, motion: words of the grammar; size as the shot begins.
      direction: a word of the grammar on the screen, of a `bounce` as it sets out; None if it doesn't travel.
      inside: never cut off by the frame's edge.
      reappears: was hidden and then seen again in the same shot.
      shot: number of the shot.
      track: (time in seconds, y, x, radius), the last three in short sides, the origin at the frame's centre,
        for each frame in which the thing could be measured.
      confidence: 0 to 1: how well the shape's template covers what was seen.
    """

    shape: str
    colour: str
    size: str
    direction: str | None
    motion: str
    inside: bool
    reappears: bool
    shot: int = 0
    track: tuple[tuple[float, float, float, float], ...] = ()
    confidence: float = 1.0


@dataclasses.dataclass(frozen=True)
class Reading:
    """What was read of a clip.

    Attributes:
      things: of all shots, in the order of shots.
      cuts: how many.
      shots: (start, end) of each in seconds.
      times: of the frames, in seconds.
      size: (height, width) in pixels, as it was read.
    """

    things: tuple[ReadThing, ...]
    cuts: int
    shots: tuple[tuple[float, float], ...]
    times: tuple[float, ...]
    size: tuple[int, int]


def read(video: Video, shapes_by: str = "likelihood") -> Reading:
    """Reads a clip back; 64 pixels of short side are enough.

    Args:
      shapes_by: how shapes are told, of `SHAPE_READINGS`: "likelihood" compares what is seen with degraded templates
        of every shape (`silhouettes`); "nearest" takes the nearest perfect template, as all figures from before
        2026-11-29 do.

    Raises:
      UserError: there is no such reading.
    """
    if shapes_by not in SHAPE_READINGS:
        raise UserError(f"Shapes are not read by {shapes_by!r}: choose one of {', '.join(SHAPE_READINGS)}.")
    if min(video.size) > _FINE:
        video = resize(video, *(round(side * 0.75 * _FINE / min(video.size)) for side in video.size))
    times = np.arange(len(video)) / video.fps
    pixels = regions.segment(video.frames)
    starts = regions.find_cuts(video.frames, pixels)
    ends = [*starts[1:], len(video)]
    found = regions.find_regions(pixels)
    things = [
        _describe(shapes.measure(thing, pixels, shapes_by), times[first:last], first, video.size, number)
        for number, (first, last) in enumerate(zip(starts, ends, strict=True))
        for thing in regions.follow(found, first, last, min(video.size))
    ]
    spans = tuple((a / video.fps, b / video.fps) for a, b in zip(starts, ends, strict=True))
    return Reading(tuple(things), len(starts) - 1, spans, tuple(map(float, times)), video.size)


def score(reading: Reading, scene: Scene, attributes: Sequence[str] = ATTRIBUTES) -> dict[str, bool]:
    """Whether each attribute was read right for every thing of the scene.

    A shot of n things is judged by the n most prominent that were read in it, matched so that most of `attributes`
    agree; a thing that has no match is wrong in all of them.

    Args:
      attributes: those that count, for instance those that a caption states.

    Returns:
      one entry an attribute, and `"all"`: colour, shape and direction (those that count) are right at once.

    Raises:
      UserError: an attribute is unknown.
    """
    unknown = set(attributes) - set(ATTRIBUTES)
    if unknown:
        raise UserError(
            f"The oracle reads no attribute {min(unknown)!r}: choose from {', '.join(ATTRIBUTES)}."
        )
    shots = _truth(scene, reading.times, reading.size)
    right = dict.fromkeys(attributes, True)
    if "cuts" in right:
        right["cuts"] = reading.cuts == len(shots) - 1
    of_things = [name for name in attributes if name not in ("count", "cuts")]
    for begin, end, truths in shots:
        read_here = [t for t in reading.things if begin <= _middle(t, reading) < end]
        if "count" in right:
            right["count"] &= len(read_here) == len(truths)
        # In a clip full of fragments one of them is always right: what was asked for must be what one sees most of.
        read_here = sorted(read_here, key=prominence, reverse=True)[: len(truths)]
        agree = np.array([[_agree(t, truth) for t in read_here] for truth in truths]).reshape(
            len(truths), len(read_here), len(ATTRIBUTES)
        )
        wanted = [ATTRIBUTES.index(name) for name in of_things]
        # Colour, shape and direction decide first; the rest break ties.
        weight = np.array([1.0 if ATTRIBUTES[i] in CAPTIONED else 0.1 for i in wanted])
        rows, columns = linear_sum_assignment(agree[..., wanted] @ weight, maximize=True)
        complete = len(rows) == len(truths)
        for name, i in zip(of_things, wanted, strict=True):
            right[name] &= complete and bool(agree[rows, columns, i].all())
    return right | {"all": all(right[name] for name in of_things if name in CAPTIONED)}


@functools.cache
def chance_levels(scenes: int = 200) -> dict[str, float]:
    """How often each attribute is right when a clip is scored against another scene: what a guess earns.

    Args:
      scenes: how many scenes of the training split are drawn.
    """
    drawn = [sample_scene(0, index) for index in range(scenes + 1)]
    times, size = tuple(t / 4 for t in range(9)), (48, 48)
    scores = [score(_ideal(other, times, size), scene) for scene, other in itertools.pairwise(drawn)]
    return {name: float(np.mean([s[name] for s in scores])) for name in scores[0]}


def _describe(
    track: shapes.Track, times: np.ndarray, first: int, size: tuple[int, int], shot: int
) -> ReadThing:
    sure = track.sure if track.sure.any() else np.ones_like(track.sure)
    seconds = times[track.frames - first]
    shown = np.zeros(len(times))
    shown[track.frames - first] = track.visible
    motion, direction = name_motion(
        seconds[sure] - times[0], track.centre[sure], track.radius[sure], track.angle[sure]
    )
    out = _sticks_out(track.shape, track.centre, track.radius, size, motion == "spin")
    return ReadThing(
        shape=track.shape,
        colour=track.colour,
        size=_size(start_radius(seconds[sure] - times[0], track.radius[sure])),
        direction=direction,
        motion=motion,
        inside=not bool((track.edge & (out > _STICKS_OUT / min(size))).any()),
        reappears=_reappears(shown),
        shot=shot,
        track=tuple(
            (float(t), float(y), float(x), float(r))
            for t, (y, x), r in zip(seconds[sure], track.centre[sure], track.radius[sure], strict=True)
        ),
        confidence=track.confidence,
    )


def _size(radius: float) -> str:
    return min(_SIZES, key=lambda size: abs(math.log(max(radius, 1e-3) / world.SIZES[size])))


def _sticks_out(shape: str, centre: np.ndarray, radius: np.ndarray, size: tuple[int, int], turned: bool):
    """How far the shape reaches beyond the frame, in short sides: f64[n], negative inside.

    A turned shape counts as reaching everywhere half way between its nearest side and its farthest corner.
    """
    half_y, half_x = (side / min(size) / 2 for side in size)
    up, down, side, reach = world.EXTENTS[shape]
    if turned:
        up = down = side = (min(up, down, side) + reach) / 2
    y, x = centre[:, 0], centre[:, 1]
    over = [-half_y - y + up * radius, y + down * radius - half_y, np.abs(x) + side * radius - half_x]
    return np.max(over, axis=0)


def _reappears(shown: np.ndarray, slack: float = 0.0) -> bool:
    """Whether a share of area f64[n] sinks below `_HIDDEN` between two times at which it is above `_SHOWN`."""
    high = np.flatnonzero(shown > _SHOWN - slack)
    return bool(high.size and (shown[high[0] : high[-1]] < _HIDDEN + slack).any())


@dataclasses.dataclass(frozen=True)
class _Truth:
    """For each attribute of a thing the answers that are right; the first is the best."""

    answers: dict[str, tuple[Any, ...]]
    middle: float  # seconds into the clip, of a zoom: where a thing has its own size
    zoomed: bool


def _agree(thing: ReadThing, truth: _Truth) -> list[bool]:
    values = dict(vars(thing))
    if truth.zoomed and thing.track:
        t, *_, radius = np.array(thing.track).T
        values["size"] = _size(float(np.interp(truth.middle, t, radius)))
    return [values[name] in truth.answers[name] if name in truth.answers else True for name in ATTRIBUTES]


def _middle(thing: ReadThing, reading: Reading) -> float:
    """Seconds into the clip around which the thing is seen."""
    return float(np.median([t for t, *_ in thing.track] or reading.shots[thing.shot]))


def prominence(thing: ReadThing) -> float:
    """Area times frames, by which `score` ranks things."""
    return sum(radius**2 for *_, radius in thing.track)


def _truth(
    scene: Scene, times: Sequence[float], size: tuple[int, int]
) -> list[tuple[float, float, list[_Truth]]]:
    """(start, end, truths of its things) of each shot that is on show at `times`."""
    seconds = np.array(times)
    ends = [shot.start for shot in scene.shots[1:]] + [math.inf]
    out = []
    for shot, end in zip(scene.shots, ends, strict=True):
        on = seconds[(seconds >= shot.start - 1e-9) & (seconds < end - 1e-9)]
        if on.size:
            truths = [_truth_of(thing, shot, on, scene.aspect, size) for thing in shot.things]
            out.append((shot.start - 1e-9, end - 1e-9, truths))
    return out


def _truth_of(thing: Thing, shot: Shot, seconds: np.ndarray, aspect: float, size: tuple[int, int]) -> _Truth:
    t = seconds - shot.start
    centre, radius = world.seen(thing, shot.camera, t, aspect)
    motions: tuple[object, ...] = (thing.motion,)
    directions: tuple[object, ...] = (thing.direction,)
    if thing.motion == "gravity":
        directions = (None, "down")
    if len(t) < 2:
        motions, directions = world.MOTIONS, (None, thing.direction)
    elif shot.camera.kind != "still":
        motion, direction = name_motion(t, centre, radius, world.angle(thing, t))
        motions, directions = (motion, thing.motion), (direction,)
        travel = float(np.linalg.norm(np.ptp(centre, axis=0)))
        if travel < 1.6 * MOVES:
            motions, directions = world.MOTIONS, (direction, None, name_direction(centre[-1] - centre[0]))
        elif direction is not None:
            # Halfway between two of the eight directions both are right.
            y, x = centre[-1] - centre[0]
            turn = math.atan2(y, x)
            nudged = [name_direction((math.sin(turn + d), math.cos(turn + d))) for d in (-0.12, 0.0, 0.12)]
            directions = tuple(dict.fromkeys([direction, *nudged]))
    out = [
        float(_sticks_out(thing.shape, centre, radius, size, turned).max())
        for turned in {False, bool(thing.spin or thing.angle)}
    ]
    most, least = max(out) * min(size), min(out) * min(size)
    inside: tuple[object, ...] = (most <= _STICKS_OUT,)
    if most > 0.5 * _STICKS_OUT and least < 1.6 * _STICKS_OUT:
        inside = (most <= _STICKS_OUT, most > _STICKS_OUT)
    return _Truth(
        {
            "shape": (thing.shape,),
            "colour": (thing.colour,),
            "size": (thing.size,),
            "motion": motions,
            "direction": directions,
            "inside": inside,
            "reappears": _truly_reappears(thing, shot, seconds, aspect, size),
        },
        float(seconds.mean()),
        shot.camera.kind == "zoom",
    )


def _truly_reappears(
    thing: Thing, shot: Shot, seconds: np.ndarray, aspect: float, size: tuple[int, int]
) -> tuple[object, ...]:
    """Counts the thing's pixels in the shot and in the shot without all else."""
    if shot.occluder is None and len(shot.things) == 1:
        return (False,)
    fps = 1 / (seconds[1] - seconds[0]) if len(seconds) > 1 else 1.0
    counts = []
    for things, occluder in ((shot.things, shot.occluder), ((thing,), None)):
        late = dataclasses.replace(shot, start=shot.start - seconds[0], things=things, occluder=occluder)
        frames = render(Scene((late,), 0.0, aspect), len(seconds), *size, fps)
        counts.append((frames == np.array(world.COLOURS[thing.colour])).all(-1).sum((1, 2)))
    shown = counts[0] / np.maximum(counts[1], 1)
    return tuple(dict.fromkeys(_reappears(shown, slack) for slack in (0.0, 0.15, -0.15)))


def _ideal(scene: Scene, times: Sequence[float], size: tuple[int, int]) -> Reading:
    """What a perfect oracle would read of the scene."""
    shots = _truth(scene, times, size)
    things = [
        ReadThing(**{name: answers[0] for name, answers in truth.answers.items()}, shot=number)
        for number, (_, _, truths) in enumerate(shots)
        for truth in truths
    ]
    spans = tuple((max(a, 0.0), min(b, times[-1])) for a, b, _ in shots)
    return Reading(tuple(things), len(shots) - 1, spans, tuple(times), size)
