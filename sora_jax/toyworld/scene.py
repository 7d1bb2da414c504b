"""Toyworld's grammar: what a scene is, how its things move, and what each split may show.

Coordinates are seconds and, in space, units of the short side of the frame: y down, x right, origin at the
centre. So a scene means the same at any resolution and frame rate. A thing's motion is a closed formula of the
time since its shot began; the renderer, the captions and the oracle's tests all read the same formulas.
"""

from __future__ import annotations

import dataclasses
import math

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
    """What is seen from `start` (seconds into the scene) until the next shot.

    With a `fade` above 0 it dissolves from the shot before: that many seconds, half of them before `start`.
    """

    start: float
    things: tuple[Thing, ...]
    background: Background = Background()
    camera: Camera = Camera()
    occluder: Occluder | None = None
    fade: float = 0.0


@dataclasses.dataclass(frozen=True)
class Scene:
    """Shots in order; `duration` seconds from the first frame to the last (0: an image); aspect = width / height."""

    shots: tuple[Shot, ...]
    duration: float
    aspect: float = 1.0


@dataclasses.dataclass(frozen=True)
class WorldConfig:
    """How often what is drawn; plain values, each tuple in the order of the table it names.

    Attributes:
      objects: one, two and three things.
      motions: each of `MOTIONS`, of a thing.
      shapes: each of `SHAPES`, all above 0; what spins is one of three.
      sizes: each of `SIZES`.
      backgrounds: each of `BACKGROUNDS`.
      cameras: each of `CAMERAS`.
      two_shots: clips of two shots.
      dissolves: of second shots; the rest begin with a cut.
      occluder: clips with a pillar in front of the things.
      leave: of straight motions, that may end beyond the edge of the frame.
    """

    objects: tuple[float, ...] = (0.55, 0.30, 0.15)
    motions: tuple[float, ...] = (0.07, 0.50, 0.11, 0.10, 0.08, 0.06, 0.08)
    shapes: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0)
    sizes: tuple[float, ...] = (0.33, 0.34, 0.33)
    backgrounds: tuple[float, ...] = (0.40, 0.25, 0.35)
    cameras: tuple[float, ...] = (0.80, 0.10, 0.10)
    two_shots: float = 0.10
    dissolves: float = 0.0
    occluder: float = 0.08
    leave: float = 0.08

    def __post_init__(self) -> None:
        tables = {
            "motions": MOTIONS,
            "shapes": SHAPES,
            "sizes": SIZES,
            "backgrounds": BACKGROUNDS,
            "cameras": CAMERAS,
        }
        for name, table in ({"objects": ("one", "two", "three")} | tables).items():
            if len(weights := getattr(self, name)) != len(table):
                raise UserError(
                    f"config.data.world.{name} takes {len(table)} numbers, for {', '.join(table)}, and got "
                    f"{len(weights)}."
                )
        if min(self.shapes) <= 0:  # things are drawn until they show what the split may show
            raise UserError(f"config.data.world.shapes takes numbers above 0, and got {min(self.shapes):g}.")


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
        axes = zip(thing.start, thing.velocity, room(thing, aspect), strict=True)
        return np.stack([_reflect(s + v * t, *bounds) for s, v, bounds in axes], axis=-1)
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
    shape, direction = (thing.shape, thing.colour), (thing.colour, thing.direction)
    return shape in HELDOUT_SHAPES or direction in HELDOUT_DIRECTIONS


def check_split(split: str) -> int:
    """The split's number, which enters the seed.

    Raises:
      UserError: there is no such split.
    """
    if split not in SPLITS:
        raise UserError(f"Toyworld has no split {split!r}: choose one of {', '.join(SPLITS)}.")
    return SPLITS.index(split)
