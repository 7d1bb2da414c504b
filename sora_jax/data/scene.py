"""Toyworld's grammar: what a scene is, how its things move, how scenes are drawn, and what each split may show.

Coordinates are seconds and, in space, units of the short side of the frame: y down, x right, origin at the
centre. So a scene means the same at any resolution and frame rate. A thing's motion is a closed formula of the
time since its shot began; the renderer, the captions and the oracle's tests all read the same formulas.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sora_jax.errors import UserError

SHAPES = ("circle", "square", "triangle", "star", "ring")
COLOURS = {
    "red": (222, 32, 32),
    "orange": (248, 132, 16),
    "yellow": (250, 226, 40),
    "green": (36, 164, 60),
    "cyan": (36, 208, 222),
    "blue": (32, 68, 222),
    "purple": (132, 44, 196),
    "pink": (250, 108, 180),
}
SIZES = {"small": 0.10, "medium": 0.15, "large": 0.21}
_D = math.sqrt(0.5)
DIRECTIONS = {
    "left": (0.0, -1.0),
    "right": (0.0, 1.0),
    "up": (-1.0, 0.0),
    "down": (1.0, 0.0),
    "up-left": (-_D, -_D),
    "up-right": (-_D, _D),
    "down-left": (_D, -_D),
    "down-right": (_D, _D),
}
MOTIONS = ("still", "straight", "bounce", "gravity", "grow", "shrink", "spin")
BACKGROUNDS = ("plain", "gradient", "textured")
TEXTURES = ("stripes", "checks", "dots")
# Hardly saturated, so that no background is mistaken for a thing.
TONES = {
    "white": (236, 236, 234),
    "light grey": (198, 198, 200),
    "grey": (142, 142, 142),
    "dark grey": (82, 82, 86),
    "black": (28, 28, 30),
    "beige": (220, 210, 190),
    "slate": (98, 108, 120),
}
PILLARS = ((94, 84, 74), (160, 147, 133))
CAMERAS = ("still", "pan", "zoom")
SPLITS = ("train", "validation", "heldout", "paraphrase")

# How far a shape reaches up, down and sideways from its centre, in radii, and its farthest point.
EXTENTS = {
    "circle": (1.0, 1.0, 1.0, 1.0),
    "square": (0.88, 0.88, 0.88, 1.245),
    "triangle": (1.3, 0.65, 1.126, 1.3),
    "star": (1.3, 1.052, 1.237, 1.3),
    "ring": (1.08, 1.08, 1.08, 1.08),
}
RESTITUTION = 0.7

# Training never shows these: one colour of each shape, and one direction of each colour (an eighth of either).
HELDOUT_SHAPES = frozenset(
    {("circle", "green"), ("square", "purple"), ("triangle", "orange"), ("star", "blue"), ("ring", "pink")}
)
HELDOUT_DIRECTIONS = frozenset(
    {
        ("red", "up-right"),
        ("orange", "left"),
        ("yellow", "down"),
        ("green", "down-left"),
        ("cyan", "right"),
        ("blue", "up"),
        ("purple", "up-left"),
        ("pink", "down-right"),
    }
)


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object. Names are keys of the tables above; pairs are (y, x).

    Attributes:
      shape, colour, size, motion: words of `SHAPES`, `COLOURS`, `SIZES`, `MOTIONS`.
      direction: of `DIRECTIONS`, for `straight` and for how a `bounce` sets out; else None.
      start: centre when the shot begins, in short sides of the frame.
      velocity: when the shot begins, in short sides a second.
      gravity: downward acceleration, in short sides a second squared.
      growth: change of size a second, as a share of the size at the start.
      spin: radians a second, clockwise.
      angle: radians clockwise from upright when the shot begins.
    """

    shape: str
    colour: str
    size: str = "medium"
    motion: str = "still"
    direction: str | None = None
    start: tuple[float, float] = (0.0, 0.0)
    velocity: tuple[float, float] = (0.0, 0.0)
    gravity: float = 0.0
    growth: float = 0.0
    spin: float = 0.0
    angle: float = 0.0

    @property
    def radius(self) -> float:
        """Radius at the start, in short sides of the frame."""
        return SIZES[self.size]


@dataclasses.dataclass(frozen=True)
class Camera:
    """Where the frame looks: `centre + velocity * t` (y, x), magnified by `scale * exp(rate * t)`."""

    kind: str = "still"
    direction: str | None = None  # of a pan: a word of DIRECTIONS; of a zoom: "in" or "out"
    centre: tuple[float, float] = (0.0, 0.0)
    velocity: tuple[float, float] = (0.0, 0.0)
    scale: float = 1.0
    rate: float = 0.0


@dataclasses.dataclass(frozen=True)
class Background:
    """Two colours, and how they are mixed over the plane.

    Attributes:
      kind: of `BACKGROUNDS`. tone: of `TONES`, the name of the main colour. texture: of `TEXTURES` or None.
      colours: the two that are mixed, RGB; a plain background shows the first.
      angle: radians, of the gradient or the texture. period: of the texture, in short sides.
    """

    kind: str = "plain"
    tone: str = "light grey"
    texture: str | None = None
    colours: tuple[tuple[int, int, int], tuple[int, int, int]] = ((198, 198, 200), (198, 198, 200))
    angle: float = 0.0
    period: float = 0.4


@dataclasses.dataclass(frozen=True)
class Occluder:
    """A pillar from top to bottom, in front of every thing; `x` and `half_width` in short sides."""

    x: float = 0.0
    half_width: float = 0.15
    colour: tuple[int, int, int] = PILLARS[0]


@dataclasses.dataclass(frozen=True)
class Shot:
    """What is seen from `start` (seconds into the scene) until the next shot."""

    start: float
    things: tuple[Thing, ...]
    background: Background = Background()
    camera: Camera = Camera()
    occluder: Occluder | None = None


@dataclasses.dataclass(frozen=True)
class Scene:
    """Shots in order; `duration` seconds from the first frame to the last (0: an image); aspect = width / height."""

    shots: tuple[Shot, ...]
    duration: float
    aspect: float = 1.0

    def shot_at(self, seconds: float) -> Shot:
        """The shot that is on at `seconds`."""
        return [shot for shot in self.shots if shot.start <= seconds + 1e-9][-1]


@dataclasses.dataclass(frozen=True)
class WorldConfig:
    """How often what is drawn; plain values, each tuple in the order of the table it names."""

    objects: tuple[float, ...] = (0.55, 0.30, 0.15)  # one, two, three
    motions: tuple[float, ...] = (0.07, 0.50, 0.11, 0.10, 0.08, 0.06, 0.08)  # MOTIONS
    sizes: tuple[float, ...] = (0.33, 0.34, 0.33)  # SIZES
    backgrounds: tuple[float, ...] = (0.40, 0.25, 0.35)  # BACKGROUNDS
    cameras: tuple[float, ...] = (0.80, 0.10, 0.10)  # CAMERAS
    two_shots: float = 0.10
    occluder: float = 0.08
    leave: float = 0.08  # of straight motions: may end beyond the edge of the frame


def half_frame(aspect: float) -> tuple[float, float]:
    """Half the height and half the width of the frame, in short sides."""
    return max(1.0, 1.0 / aspect) / 2, max(1.0, aspect) / 2


def room(thing: Thing, aspect: float, growth: float = 1.0) -> tuple[tuple[float, float], tuple[float, float]]:
    """(low, high) of y and of x between which the centre stays while the whole thing is inside the frame.

    `growth` is how many times its radius at the start the thing may reach.
    """
    half_y, half_x = half_frame(aspect)
    up, down, side, reach = (extent * thing.radius * growth for extent in EXTENTS[thing.shape])
    if thing.motion == "spin":
        up = down = side = reach
    return (-half_y + up, half_y - down), (-half_x + side, half_x - side)


def position(thing: Thing, t: float | np.ndarray, aspect: float = 1.0) -> np.ndarray:
    """Centre at `t` seconds into the shot: f64[..., 2] (y, x) in short sides, in the world (see `seen`)."""
    t = np.asarray(t, np.float64)
    if thing.motion == "bounce":
        return np.stack(
            [
                _reflect(s + v * t, *bounds)
                for s, v, bounds in zip(thing.start, thing.velocity, room(thing, aspect), strict=True)
            ],
            axis=-1,
        )
    y = thing.start[0] + thing.velocity[0] * t
    if thing.motion == "gravity":
        y = _fall(thing.start[0], room(thing, aspect)[0][1], thing.gravity, t)
    return np.stack([y, thing.start[1] + thing.velocity[1] * t], axis=-1)


def radius(thing: Thing, t: float | np.ndarray) -> np.ndarray:
    """Radius at `t` seconds into the shot, in short sides."""
    return thing.radius * np.maximum(1.0 + thing.growth * np.asarray(t, np.float64), 0.1)


def angle(thing: Thing, t: float | np.ndarray) -> np.ndarray:
    """Radians clockwise from upright at `t` seconds into the shot."""
    return thing.angle + thing.spin * np.asarray(t, np.float64)


def view(camera: Camera, t: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The camera's centre f64[..., 2] and its magnification f64[...] at `t` seconds into the shot."""
    t = np.asarray(t, np.float64)
    centre = np.asarray(camera.centre) + t[..., None] * np.asarray(camera.velocity)
    return centre, camera.scale * np.exp(camera.rate * t)


def seen(
    thing: Thing, camera: Camera, t: float | np.ndarray, aspect: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Centre f64[..., 2] and radius f64[...] in the frame, through the camera, `t` seconds into the shot."""
    centre, scale = view(camera, t)
    return (position(thing, t, aspect) - centre) * scale[..., None], radius(thing, t) * scale


def _reflect(x: np.ndarray, low: float, high: float) -> np.ndarray:
    width = high - low
    return low + np.abs((x - low + width) % (2 * width) - width)


def _fall(start: float, floor: float, gravity: float, t: np.ndarray) -> np.ndarray:
    """Height of what falls from rest and leaves the floor with `RESTITUTION` of the speed it came with."""
    begin = math.sqrt(2 * max(floor - start, 0.0) / gravity)
    y = np.where(t < begin, start + gravity * t**2 / 2, floor)
    speed = gravity * begin
    for _ in range(8):
        speed *= RESTITUTION
        s = t - begin
        hop = floor - speed * s + gravity * s**2 / 2
        y = np.where((s >= 0) & (s < 2 * speed / gravity), hop, y)
        begin += 2 * speed / gravity
    return y


def is_heldout(thing: Thing) -> bool:
    """Whether the thing shows a combination that the training split never shows."""
    return (thing.shape, thing.colour) in HELDOUT_SHAPES or (
        thing.colour,
        thing.direction,
    ) in HELDOUT_DIRECTIONS


def check_split(split: str) -> int:
    """The split's number, which enters the seed.

    Raises:
      UserError: there is no such split.
    """
    if split not in SPLITS:
        raise UserError(f"Toyworld has no split {split!r}: choose one of {', '.join(SPLITS)}.")
    return SPLITS.index(split)


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
        background = _sample_background(rng, _pick(rng, BACKGROUNDS, config.backgrounds))
        thing, occluder = _sample_passage(rng, length, aspect, heldout, background)
        return Shot(start, (thing,), background, Camera(), occluder)
    kind = _pick(rng, CAMERAS, config.cameras) if length > 0 else "still"
    things: list[Thing] = []
    count = _pick(rng, (1, 2, 3), config.objects)
    for _ in range(count):
        if count == 3 or any(thing.size == "large" for thing in things):  # they leave each other no room
            config = dataclasses.replace(config, sizes=(*config.sizes[:2], 0.0))
        thing = _sample_kind(rng, config, length, kind, heldout, {t.colour for t in things})
        things.append(_place(rng, thing, things, length, aspect, config))
    # On a plain background a moving camera can't be told from moving things.
    weights = config.backgrounds if kind == "still" else (0.0, 0.3, 0.7)
    background = _sample_background(rng, _pick(rng, BACKGROUNDS, weights))
    return Shot(start, tuple(things), background, _sample_camera(rng, kind, things, length))


def _sample_kind(
    rng: np.random.Generator, config: WorldConfig, length: float, camera: str, heldout: bool, taken: set[str]
) -> Thing:
    """What a thing is and does, not yet where: redrawn until the split may show it."""
    weights = dict(zip(MOTIONS, config.motions, strict=True))
    if camera != "still":  # the frame's edges are walls only while the camera stands
        weights |= {"bounce": 0.0, "gravity": 0.0}
    if camera == "zoom":
        weights |= {"grow": 0.0, "shrink": 0.0}
    motion = _pick(rng, MOTIONS, list(weights.values())) if length > 0 else "still"
    sizes = dict(zip(SIZES, config.sizes, strict=True))
    sizes |= {"grow": {"large": 0.0}, "shrink": {"small": 0.0}}.get(motion, {})
    size = _pick(rng, list(SIZES), list(sizes.values()))
    shapes = ("square", "triangle", "star") if motion == "spin" else SHAPES
    while True:
        direction = _pick(rng, list(DIRECTIONS)) if motion in ("straight", "bounce") else None
        thing = Thing(_pick(rng, shapes), _pick(rng, list(COLOURS)), size, motion, direction)
        if is_heldout(thing) == heldout and thing.colour not in taken:
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
            apart = np.linalg.norm(position(placed, times, aspect) - position(other, times, aspect), axis=-1)
            reach = [EXTENTS[t.shape][3] * radius(t, times) for t in (placed, other)]
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
    low, high = np.array(room(thing, aspect, max(change, 1.0))).T
    start, velocity = rng.uniform(low, high), np.zeros(2)
    unit = np.asarray(DIRECTIONS[thing.direction] if thing.direction else (0.0, 0.0))
    extra: dict[str, float] = {}
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
    return dataclasses.replace(thing, start=_pair(start), velocity=_pair(velocity), **extra)  # type: ignore[arg-type]


def _sample_passage(
    rng: np.random.Generator, length: float, aspect: float, heldout: bool, background: Background
) -> tuple[Thing, Occluder]:
    """A thing that passes behind a pillar wide enough to hide the whole of it, and comes out again."""
    half_x = half_frame(aspect)[1]
    size = "medium" if half_x > 0.75 and rng.random() < 0.5 else "small"
    while True:
        direction = _pick(rng, ("left", "right"))
        thing = Thing(_pick(rng, SHAPES), _pick(rng, list(COLOURS)), size, "straight", direction)
        if is_heldout(thing) == heldout:
            break
    (low_y, high_y), (_, high_x) = room(thing, aspect)
    side = half_x - high_x
    half_width = side + rng.uniform(0.02, 0.05)
    clear = half_width + side  # from the pillar's axis to a thing that has just come out
    slack = min(high_x - clear, 0.3)
    x = rng.uniform(-0.5, 0.5) * slack
    before, after = clear + rng.uniform(0.3, 0.5, 2) * slack
    sign = DIRECTIONS[direction][1]
    start = (float(rng.uniform(low_y, high_y)), float(x - sign * before))
    thing = dataclasses.replace(thing, start=start, velocity=(0.0, float(sign * (before + after) / length)))
    colour = max(PILLARS, key=lambda pillar: abs(sum(pillar) - sum(background.colours[0])))
    return thing, Occluder(float(x), float(half_width), colour)


def _sample_background(rng: np.random.Generator, kind: str) -> Background:
    tone = _pick(rng, list(TONES))
    first = np.array(TONES[tone])
    contrast = {"plain": 0.0, "gradient": rng.uniform(45, 75), "textured": rng.uniform(18, 30)}[kind]
    second = np.round(first + (contrast if first.mean() < 128 else -contrast))
    colours = (TONES[tone], (int(second[0]), int(second[1]), int(second[2])))
    texture = _pick(rng, TEXTURES) if kind == "textured" else None
    return Background(kind, tone, texture, colours, rng.uniform(0, 2 * math.pi), rng.uniform(0.28, 0.45))


def _sample_camera(rng: np.random.Generator, kind: str, things: list[Thing], length: float) -> Camera:
    if kind == "pan":
        direction = _pick(rng, ("left", "right", "up", "down"))
        # Slow beside what moves, so that a thing's direction in the frame stays nearest to its own.
        speeds = [math.hypot(*thing.velocity) for thing in things if thing.motion == "straight"]
        speed = min([rng.uniform(0.25, 0.4) / length, 0.6, *(0.35 * speed for speed in speeds)])
        velocity = np.array(DIRECTIONS[direction]) * speed
        centre = -velocity * length / 2
        return Camera(kind, direction, _pair(centre), _pair(velocity))
    if kind == "zoom":
        direction = _pick(rng, ("in", "out"))
        total = min(rng.uniform(0.28, 0.42), 0.6 * length)
        # Mostly from afar, so that what is near the edges stays in view.
        scale = math.exp(-0.6 * total if direction == "in" else 0.4 * total)
        return Camera(kind, direction, scale=scale, rate=(total if direction == "in" else -total) / length)
    return Camera()
