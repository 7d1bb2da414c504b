"""How toyworld's scenes are drawn: deterministic from (seed, split, index), within what the split may show."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sora_jax.toyworld import scene as world
from sora_jax.toyworld.scene import Background, Camera, Occluder, Scene, Shot, Thing, WorldConfig, check_split


def sample_scene(
    seed: int,
    index: int,
    split: str = "train",
    duration: float = 2.0,
    aspect: float = 1.0,
    config: WorldConfig | None = None,
) -> Scene:
    """Draws scene `index` of `split`: the same arguments give the same scene, on any machine.

    Args:
      duration: seconds from the first frame to the last; 0 gives an image, in which nothing moves.
      aspect: width / height.

    Training, validation and paraphrase scenes never show a combination in `HELDOUT_SHAPES` or
    `HELDOUT_DIRECTIONS`; in a held-out scene every thing shows one.

    Raises:
      UserError: there is no such split.
    """
    config = config or WorldConfig()
    rng = np.random.default_rng((seed, check_split(split), index))
    heldout = split == "heldout"
    if heldout:
        config = dataclasses.replace(config, objects=(0.85, 0.15, 0.0))
    starts = [0.0]
    if duration >= 1.0 and rng.random() < config.two_shots:
        starts.append(float(duration * rng.uniform(0.4, 0.6)))
    shots: list[Shot] = []
    for start, end in zip(starts, [*starts[1:], duration], strict=True):
        shot = _sample_shot(rng, start, end - start, aspect, config, heldout)
        while shots and shot.background.tone == shots[-1].background.tone:
            shot = dataclasses.replace(shot, background=_sample_background(rng, shot.background.kind))
        shots.append(shot)
    if len(shots) > 1 and rng.random() < config.dissolves:
        shots[1] = dataclasses.replace(shots[1], fade=float(rng.uniform(0.3, 0.8) * duration))
    return Scene(tuple(shots), float(duration), float(aspect))


def _pick(rng: np.random.Generator, options: Sequence[Any], weights: Sequence[float] | None = None) -> Any:
    weights = weights or [1.0] * len(options)
    x = rng.random() * sum(weights)
    for option, weight in zip(options, weights, strict=True):
        x -= weight
        if x < 0:
            return option
    return options[-1]


def _pair(values: np.ndarray) -> tuple[float, float]:
    return float(values[0]), float(values[1])


def _sample_shot(
    rng: np.random.Generator, start: float, length: float, aspect: float, config: WorldConfig, heldout: bool
) -> Shot:
    if length >= 0.75 and rng.random() < config.occluder:
        background = _sample_background(rng, _pick(rng, world.BACKGROUNDS, config.backgrounds))
        thing, occluder = _sample_passage(rng, config, length, aspect, heldout, background)
        return Shot(start, (thing,), background, Camera(), occluder)
    kind = _pick(rng, world.CAMERAS, config.cameras) if length > 0 else "still"
    things: list[Thing] = []
    count = _pick(rng, (1, 2, 3), config.objects)
    for _ in range(count):
        if count == 3 or any(thing.size == "large" for thing in things):  # they leave each other no room
            config = dataclasses.replace(config, sizes=(*config.sizes[:2], 0.0))
        thing = _sample_kind(rng, config, length, kind, heldout, {t.colour for t in things})
        things.append(_place(rng, thing, things, length, aspect, config))
    # On a plain background a moving camera can't be distinguished from moving things.
    weights = config.backgrounds if kind == "still" else (0.0, 0.3, 0.7)
    background = _sample_background(rng, _pick(rng, world.BACKGROUNDS, weights))
    return Shot(start, tuple(things), background, _sample_camera(rng, kind, things, length))


def _sample_kind(
    rng: np.random.Generator, config: WorldConfig, length: float, camera: str, heldout: bool, taken: set[str]
) -> Thing:
    """What a thing is and does, not yet where: redrawn until the split may show it."""
    weights = dict(zip(world.MOTIONS, config.motions, strict=True))
    if camera != "still":  # the frame's edges are walls only while the camera stands
        weights |= {"bounce": 0.0, "gravity": 0.0}
    if camera == "zoom":
        weights |= {"grow": 0.0, "shrink": 0.0}
    motion = _pick(rng, world.MOTIONS, list(weights.values())) if length > 0 else "still"
    sizes = dict(zip(world.SIZES, config.sizes, strict=True))
    sizes |= {"grow": {"large": 0.0}, "shrink": {"small": 0.0}}.get(motion, {})
    size = _pick(rng, list(world.SIZES), list(sizes.values()))
    shapes = dict(zip(world.SHAPES, config.shapes, strict=True))
    if motion == "spin":  # a circle or a ring that spins can't be seen to
        shapes |= {"circle": 0.0, "ring": 0.0}
    while True:
        direction = _pick(rng, list(world.DIRECTIONS)) if motion in ("straight", "bounce") else None
        shape = _pick(rng, list(shapes), list(shapes.values()))
        thing = Thing(shape, _pick(rng, list(world.COLOURS)), size, motion, direction)
        if world.is_heldout(thing) == heldout and thing.colour not in taken:
            return thing


def _place(
    rng: np.random.Generator,
    thing: Thing,
    others: list[Thing],
    length: float,
    aspect: float,
    config: WorldConfig,
) -> Thing:
    """Gives the thing a path, the clearest of a few with respect to the others."""
    best, best_score = thing, -math.inf
    times = np.linspace(0.0, length, 5)
    for _ in range(16):
        placed = _sample_path(rng, thing, length, aspect, config)
        score = 0.0
        for other in others:
            between = world.position(placed, times, aspect) - world.position(other, times, aspect)
            apart = np.linalg.norm(between, axis=-1)
            reach = [world.EXTENTS[t.shape][3] * world.radius(t, times) for t in (placed, other)]
            clearance = np.minimum(apart - reach[0] - reach[1], 0.0)
            score += 10 * clearance[0] + clearance.min()
        if score > best_score:
            best, best_score = placed, score
        if score == 0.0:
            break
    return best


def _sample_path(
    rng: np.random.Generator, thing: Thing, length: float, aspect: float, config: WorldConfig
) -> Thing:
    """Where the thing starts and how it goes, so that the motion is plain to see within `length` seconds."""
    change = {"grow": rng.uniform(1.7, 2.2), "shrink": rng.uniform(0.5, 0.65)}.get(thing.motion, 1.0)
    low, high = np.array(world.room(thing, aspect, max(change, 1.0))).T
    start, velocity = rng.uniform(low, high), np.zeros(2)
    unit = np.asarray(world.DIRECTIONS[thing.direction] if thing.direction else (0.0, 0.0))
    extra: dict[str, Any] = {}
    if thing.motion in ("grow", "shrink"):
        extra = {"growth": (change - 1) / length}
    elif thing.motion == "spin":
        rate = min(math.radians(rng.uniform(90, 240)) / length, math.radians(150))
        extra = {"spin": float(rng.choice((-1, 1))) * rate, "angle": rng.uniform(0, 2 * math.pi)}
    elif thing.motion == "gravity":
        start[0] = low[0] + rng.uniform(0, 0.3) * (high[0] - low[0])
        fall = length * rng.uniform(0.4, 0.6)
        extra = {"gravity": float(np.clip(2 * (high[0] - start[0]) / fall**2, 1.0, 12.0))}
    elif thing.motion == "bounce":
        path = min(rng.uniform(0.8, 1.4), 1.5 * length)
        first = rng.choice(np.flatnonzero(unit))  # this wall is met midway, the other perhaps
        for axis in np.flatnonzero(unit):
            share = rng.uniform(0.3, 0.65 if axis == first else 1.2)
            to_wall = min(abs(unit[axis]) * path * share, high[axis] - low[axis])
            start[axis] = high[axis] - to_wall if unit[axis] > 0 else low[axis] + to_wall
        velocity = unit * path / length
    elif thing.motion == "straight":
        longest = min((high - low)[unit != 0] / np.abs(unit[unit != 0]))
        path = min(max(longest * rng.uniform(0.6, 1.0), 0.35), 1.0)
        leaves = rng.random() < config.leave
        path = min(longest * rng.uniform(1.0, 1.3) if leaves else path, 1.2 * length)
        # The whole path fits where it can; what doesn't fit sticks out at its end.
        low, high = low - np.minimum(unit * path, 0), high - np.maximum(unit * path, 0)
        backward = np.where(unit > 0, low, high)
        start = np.where(low <= high, rng.uniform(low, np.maximum(low, high)), backward)
        start += leaves * rng.uniform(0.0, 0.5) * longest * unit
        velocity = unit * path / length
    return dataclasses.replace(thing, start=_pair(start), velocity=_pair(velocity), **extra)


def _sample_passage(
    rng: np.random.Generator,
    config: WorldConfig,
    length: float,
    aspect: float,
    heldout: bool,
    background: Background,
) -> tuple[Thing, Occluder]:
    """A thing that passes behind a pillar wide enough to hide the whole of it, and comes out again."""
    half_x = world.half_frame(aspect)[1]
    size = "medium" if half_x > 0.75 and rng.random() < 0.5 else "small"
    while True:
        direction = _pick(rng, ("left", "right"))
        shape = _pick(rng, world.SHAPES, config.shapes)
        thing = Thing(shape, _pick(rng, list(world.COLOURS)), size, "straight", direction)
        if world.is_heldout(thing) == heldout:
            break
    (low_y, high_y), (_, high_x) = world.room(thing, aspect)
    side = half_x - high_x
    half_width = side + rng.uniform(0.02, 0.05)
    clear = half_width + side  # from the pillar's axis to a thing that has just come out
    slack = min(high_x - clear, 0.3)
    x = rng.uniform(-0.5, 0.5) * slack
    before, after = clear + rng.uniform(0.3, 0.5, 2) * slack
    sign = world.DIRECTIONS[direction][1]
    start = (float(rng.uniform(low_y, high_y)), float(x - sign * before))
    thing = dataclasses.replace(thing, start=start, velocity=(0.0, float(sign * (before + after) / length)))
    colour = max(world.PILLARS, key=lambda pillar: abs(sum(pillar) - sum(background.colours[0])))
    return thing, Occluder(float(x), float(half_width), colour)


def _sample_background(rng: np.random.Generator, kind: str) -> Background:
    tone = _pick(rng, list(world.TONES))
    first = np.array(world.TONES[tone])
    contrast = {"plain": 0.0, "gradient": rng.uniform(45, 75), "textured": rng.uniform(18, 30)}[kind]
    second = np.round(first + (contrast if first.mean() < 128 else -contrast))
    colours = (world.TONES[tone], (int(second[0]), int(second[1]), int(second[2])))
    texture = _pick(rng, world.TEXTURES) if kind == "textured" else None
    return Background(kind, tone, texture, colours, rng.uniform(0, 2 * math.pi), rng.uniform(0.28, 0.45))


def _sample_camera(rng: np.random.Generator, kind: str, things: list[Thing], length: float) -> Camera:
    if kind == "pan":
        direction = _pick(rng, ("left", "right", "up", "down"))
        # Slow compared to what moves, so that a thing's direction in the frame stays nearest to its own.
        speeds = [math.hypot(*thing.velocity) for thing in things if thing.motion == "straight"]
        speed = min([rng.uniform(0.25, 0.4) / length, 0.6, *(0.35 * speed for speed in speeds)])
        velocity = np.array(world.DIRECTIONS[direction]) * speed
        centre = -velocity * length / 2
        return Camera(kind, direction, _pair(centre), _pair(velocity))
    if kind == "zoom":
        direction = _pick(rng, ("in", "out"))
        total = min(rng.uniform(0.28, 0.42), 0.6 * length)
        # Mostly from afar, so that what is near the edges stays in view.
        scale = math.exp(-0.6 * total if direction == "in" else 0.4 * total)
        return Camera(kind, direction, scale=scale, rate=(total if direction == "in" else -total) / length)
    return Camera()
