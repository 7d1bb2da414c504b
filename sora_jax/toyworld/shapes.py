"""From regions to shapes: what a thing is, and where it is, how large and how turned.

A thing that is seen whole needs no search: `silhouettes` says which shape it most likely is, and its area, its
centroid and its moments give radius, centre and angle. Only what is cut off by the frame or by another thing is
fitted, with every shape, to the pixels that could show it; there the shape that leaves least unexplained is the one.
The older reading, "nearest", decides so everywhere.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from sora_jax.toyworld import scene as world
from sora_jax.toyworld import silhouettes
from sora_jax.toyworld.regions import COLOURS, Pixels, Region
from sora_jax.toyworld.render import signed_distance

_AREA = {"circle": math.pi, "square": 1.76**2, "triangle": 2.195, "star": 2.292, "ring": 2.679}  # of radius 1
_FOLD = {"square": 4, "triangle": 3, "star": 5}  # symmetries under rotation
# Symmetry that no circle has, however it is blurred.
_SPOKES = {"square": 0.06, "triangle": 0.07, "star": 0.03}
_HOLE = 0.72
_SLACK = 0.14  # more error than in the frames that show it best, up to which a thing counts as measured

_FAINT = 0.1  # cover below which a pixel shows only that the background has tints


@dataclasses.dataclass(frozen=True)
class Track:
    """One thing through one shot; arrays have an entry for each frame in which it is seen.

    Attributes:
      colour, shape: words of the grammar.
      frames: i[n], numbers of frames in the clip.
      centre: f64[n, 2] (y, x) and radius: f64[n], in short sides of the frame, the origin at its centre.
      angle: f64[n], radians clockwise, continuous.
      visible: f64[n], share of the thing's area inside the frame that is seen.
      sure: bool[n], where centre and radius were measured on the thing, not on what was left of it.
      edge: bool[n], where it touches the frame's edge.
      confidence: 0 to 1: how much of what is seen the shape's template explains.
    """

    colour: str
    shape: str
    frames: np.ndarray
    centre: np.ndarray
    radius: np.ndarray
    angle: np.ndarray
    visible: np.ndarray
    sure: np.ndarray
    edge: np.ndarray
    confidence: float


def measure(thing: list[Region], pixels: Pixels, reading: str = "likelihood") -> Track:
    """Shape, centres, radii and angles of the thing that the regions, one a frame, belong to.

    Args:
      reading: of the shape, of `oracle.SHAPE_READINGS`.
    """
    frames = np.array([region.frame for region in thing])
    area = np.array([region.area for region in thing])
    clear = np.array([region.clear for region in thing])
    windows = _Windows.around(thing, pixels)
    whole = clear & (area > 0.3 * np.median(area[clear])) if clear.any() else clear
    shape, fit, good = (
        _recognise(windows, whole, frames, reading) if whole.any() else _puzzle_out(windows, area)
    )
    sure = fit.error < good + _SLACK
    angle = fit.angle
    if shape in _FOLD:
        angle[sure] = np.unwrap(angle[sure], period=2 * math.pi / _FOLD[shape])
    # Of what is left behind a pillar or an edge the middle is near enough.
    centre = np.where(sure[:, None], fit.centre, [region.centre for region in thing])
    radius = fit.radius
    if sure.any() and not sure.all():
        guess = _carry_on(frames, np.column_stack([centre, radius, angle]), sure)
        radius, angle = np.maximum(guess[:, 2], 2.0), guess[:, 3]
        part = np.flatnonzero(~sure & ~clear)
        if part.size:
            cut = windows.pick(part)
            tries = [
                cut.fit(shape, at[part], radius[part], angle[part], 2.0) for at in (guess[:, :2], centre)
            ]
            fit = tries[0].better(tries[1])
            fine = fit.error < good + _SLACK
            centre[part[fine]], radius[part[fine]] = fit.centre[fine], fit.radius[fine]
            sure[part[fine]] = True
    size = np.array(pixels.colour.shape[1:])
    whole_area = _AREA[shape] * radius**2 * _share_inside(shape, centre, radius, angle, size)
    return Track(
        COLOURS[thing[0].colour],
        shape,
        frames,
        (centre - size / 2) / size.min(),
        radius / size.min(),
        angle,
        windows.seen.sum((1, 2)) / np.maximum(whole_area, 1.0),
        sure,
        np.array([region.edge for region in thing]),
        float(np.clip(1 - good, 0, 1)),
    )


def _recognise(
    windows: _Windows, whole: np.ndarray, frames: np.ndarray, reading: str
) -> tuple[str, _Fit, float]:
    """The shape of a thing that is `whole` bool[n] in some frames, its fit in these, and the usual error."""
    mass = windows.seen.sum((1, 2))
    big = whole & (mass >= 0.85 * np.quantile(mass[whole], 0.8))
    spokes, hole = windows.pick(big).symmetries()
    if reading == "nearest":
        fits = {name: windows.match(name) for name in world.SHAPES}
        shape = min(fits, key=lambda name: fits[name].error[big].mean())
        if shape != "ring":
            shape = _unblur(shape, spokes, hole)
    else:
        likely = silhouettes.log_likelihoods(windows.pick(big).polar(), frames[big])
        shape = max(likely, key=lambda name: likely[name])
    fit = windows.match(shape)
    if shape in _FOLD and _upright(shape, spokes):
        fit.angle[:] = 0.0
    good = float(fit.error[big].mean())
    fit.error[~whole] = np.inf
    return shape, fit, good


def _unblur(shape: str, spokes: dict[str, np.ndarray], hole: float) -> str:
    """A blur rounds everything: what seems round yet has a polygon's symmetry, or a hole, is no circle."""
    if hole > _HOLE:
        return "ring"
    # Upright things add up over frames, turning ones don't and must show more.
    signs = {
        name: max(spokes[name].real.mean() / least, np.abs(spokes[name]).mean() / (3 * least))
        for name, least in _SPOKES.items()
    }
    best = max(signs, key=lambda name: signs[name])
    return best if shape == "circle" and signs[best] > 1 else shape


def _upright(shape: str, spokes: dict[str, np.ndarray]) -> bool:
    return bool(spokes[shape].real.mean() > 0.8 * np.abs(spokes[shape]).mean())


def _puzzle_out(windows: _Windows, area: np.ndarray) -> tuple[str, _Fit, float]:
    """The same for a thing that is never whole: every shape tries, upright and turned, where most is seen."""
    best = np.argsort(-area)[:6]
    part, centre = windows.pick(best), windows.centroid()
    start = np.full(len(best), math.sqrt(area.max() / 2.6))
    fits = {}
    for shape in world.SHAPES:
        turns = [turn / 3 * 2 * math.pi / _FOLD[shape] for turn in range(3)] if shape in _FOLD else [0.0]
        tries = [
            part.fit(shape, centre[best], start, start * 0 + turn, 0.0, len(turns) > 1) for turn in turns
        ]
        fits[shape] = functools.reduce(_Fit.better, tries)
    shape = min(fits, key=lambda name: fits[name].error.mean())
    fit = _Fit(centre, np.zeros(len(area)), np.zeros(len(area)), np.full(len(area), np.inf))
    for name, values in vars(fits[shape]).items():
        getattr(fit, name)[best] = values
    return shape, fit, float(fits[shape].error.mean())


def _carry_on(frames: np.ndarray, values: np.ndarray, sure: np.ndarray) -> np.ndarray:
    """Values f64[n, V] where the sure ones, and how fast they change at their ends, say that the others are."""
    at, known = frames[sure].astype(float), values[sure]
    out = np.stack([np.interp(frames, at, column) for column in known.T], -1)
    if at.size > 1:
        for end, beyond in ((slice(0, 2), frames < at[0]), (slice(-2, None), frames > at[-1])):
            (t0, t1), (v0, v1) = at[end], known[end]
            out[beyond] = v0 + (frames[beyond, None] - t0) * (v1 - v0) / (t1 - t0)
    out[sure] = known
    return out


def _share_inside(shape: str, centre, radius, angle, size: np.ndarray) -> np.ndarray:
    """Share of the shape's area that lies inside the frame."""
    grid = (np.arange(24, dtype=np.float32) - 11.5) / 24 * 2.7
    y, x = (np.stack([v] * len(radius)) * radius[:, None].astype(np.float32) for v in (grid, grid))
    inner = signed_distance(shape, y[:, :, None], x[:, None, :], radius, angle) < 0
    rows, columns = y + centre[:, :1], x + centre[:, 1:]
    frame = ((rows > 0) & (rows < size[0]))[:, :, None] & ((columns > 0) & (columns < size[1]))[:, None, :]
    return (inner & frame).sum((1, 2)) / np.maximum(inner.sum((1, 2)), 1)


@dataclasses.dataclass
class _Fit:
    """Centre f64[n, 2] and radius f64[n] in pixels, angle f64[n] in radians, error that is left f64[n]."""

    centre: np.ndarray
    radius: np.ndarray
    angle: np.ndarray
    error: np.ndarray

    def better(self, other: _Fit) -> _Fit:
        """In each frame the one that leaves less."""
        won = self.error <= other.error
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Fit(*(np.where(won if a.ndim == 1 else won[:, None], a, b) for a, b in pairs))


@dataclasses.dataclass(frozen=True)
class _Windows:
    """Squares cut from the cover of one colour around one thing's regions.

    Attributes:
      seen: f32[n, P, P], the colour's cover, where a pixel is the thing's or may be its soft edge.
      known: bool[n, P, P], pixels of the frame that no other thing hides.
      origin: f64[n, 2], (y, x) of the square's first pixel's corner.
    """

    seen: np.ndarray
    known: np.ndarray
    origin: np.ndarray

    @classmethod
    def around(cls, thing: list[Region], pixels: Pixels) -> _Windows:
        """The squares that hold the thing's regions."""
        height, width = pixels.colour.shape[1:]
        colour = thing[0].colour
        half = math.ceil(1.1 * math.sqrt(max(region.area for region in thing) / _AREA["triangle"])) + 3
        corner = np.floor([region.centre for region in thing]).astype(int) - half
        steps = np.arange(2 * half + 1)
        y, x = corner[:, :1] + steps, corner[:, 1:] + steps
        inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
        frame = np.array([region.frame for region in thing])[:, None, None]
        at = frame, y.clip(0, height - 1)[:, :, None], x.clip(0, width - 1)[:, None, :]
        patch = np.array([region.patch for region in thing])[:, None, None]
        own = (pixels.colour[at] == colour + 1) & (pixels.patch[at] == patch)
        known = inside & (own | (pixels.colour[at] == 0))
        cover = pixels.cover[(*at, colour)]
        return cls(np.where(known & (cover > _FAINT), cover, 0), known, corner.astype(float))

    def pick(self, index: np.ndarray) -> _Windows:
        """Only the squares numbered `index`."""
        return _Windows(self.seen[index], self.known[index], self.origin[index])

    def centroid(self) -> np.ndarray:
        """f64[n, 2] in pixels."""
        mass = np.maximum(self.seen.sum((1, 2)), 1e-3)
        steps = np.arange(self.seen.shape[1]) + 0.5
        y, x = ((self.seen.sum(axis) @ steps) / mass for axis in (2, 1))
        return np.stack([y, x], -1) + self.origin

    def polar(self) -> np.ndarray:
        """What `silhouettes` compares: f64[n, rings, angles]."""
        return silhouettes.polar(self.seen, self.centroid() - self.origin)

    def match(self, shape: str) -> _Fit:
        """The shape where area, centroid and moments put it."""
        centre = self.centroid()
        radius = np.sqrt(np.maximum(self.seen.sum((1, 2)), 1) / _AREA[shape])
        angle = self.angle(shape, radius)
        return _Fit(centre, radius, angle, np.minimum(self.error(shape, centre, radius, angle), 1.0))

    def _offsets(self, centre: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        steps = np.arange(self.seen.shape[1], dtype=np.float32) + 0.5
        offset = (self.origin - centre).astype(np.float32)
        return (offset[:, :1] + steps)[:, :, None], (offset[:, 1:] + steps)[:, None, :]

    def angle(self, shape: str, radius: np.ndarray) -> np.ndarray:
        """Radians clockwise from upright that the moment of the shape's own symmetry tells: f64[n]."""
        if shape not in _FOLD:
            return np.zeros(len(radius))
        fold = _FOLD[shape]
        y, x = self._offsets(self.centroid())
        # A corner points up when upright, but a square's lie on its diagonals.
        spot = (-y + 1j * x) / radius[:, None, None]
        moment = (self.seen * spot**fold * (np.abs(spot) < 1.5)).sum((1, 2))
        return (np.angle(moment) - (math.pi if shape == "square" else 0.0)) / fold

    def symmetries(self) -> tuple[dict[str, np.ndarray], float]:
        """How much the cover has of each polygon's symmetry, and of a hole.

        Returns:
          for each polygon complex128[n]: 0 without its symmetry; upright ones are positive, and sharp ones 0.55
          (triangle), 0.29 (square), 0.57 (star); and the squared distance from the centre in units of a disc's of
          the same area: 0.5 for a disc, 0.6 for a star, 0.87 for a ring.
        """
        y, x = self._offsets(self.centroid())
        mass = np.maximum(self.seen.sum((1, 2)), 1.0)
        spot = (-y + 1j * x) / np.sqrt(mass / math.pi)[:, None, None]
        # Beyond it lies nothing of any shape, only echoes.
        weight = self.seen * np.abs(spot) ** 2 * (np.abs(spot) < 1.9)
        turn = spot / np.maximum(np.abs(spot), 1e-6)
        whole = np.maximum(weight.sum((1, 2)), 1e-6)
        spokes = {name: (weight * turn**fold).sum((1, 2)) / whole for name, fold in _FOLD.items()}
        # The corners of an upright square lie on the diagonals.
        spokes["square"] = -spokes["square"]
        return spokes, float(np.median(weight.sum((1, 2)) / mass))

    def template(self, shape: str, centre, radius, angle, soft: float = 1.0) -> np.ndarray:
        """Cover f32[n, P, P] of the shape, its edge `soft` pixels wide."""
        y, x = self._offsets(centre)
        return np.clip(0.5 - signed_distance(shape, y, x, radius, angle) / soft, 0, 1)

    def error(self, shape: str, centre, radius, angle, soft: float = 1.5) -> np.ndarray:
        """What the template leaves unexplained, as a share of the template: f64[n]."""
        template = self.template(shape, centre, radius, angle, soft)
        wrong = (np.abs(self.seen - template) * self.known).sum((1, 2))
        return wrong / np.maximum((template * self.known).sum((1, 2)), 1.0)

    def fit(self, shape: str, centre, radius, angle, hold: float, turn: bool = False) -> _Fit:
        """Moves, sizes and, with `turn`, turns templates onto the known pixels by Gauss-Newton steps.

        Args:
          hold: how strongly the radius is held to the one given, in pixels' worth of evidence.
        """
        centre, angle = centre.astype(float).copy(), angle.astype(float).copy()
        given, radius = radius, radius.astype(float).copy()
        soft, step = 3.0, 0.5
        for _ in range(6):
            base = self.template(shape, centre, radius, angle, soft)
            moved = [self.template(shape, centre + s, radius, angle, soft) for s in ((step, 0), (0, step))]
            moved.append(self.template(shape, centre, radius + step, angle, soft))
            if turn:
                moved.append(self.template(shape, centre, radius, angle + step / radius, soft))
            slopes = np.stack([(m - base) / step * self.known for m in moved], 1)
            slopes = slopes.reshape(len(base), len(moved), -1)
            miss = ((self.seen - base) * self.known).reshape(len(base), -1, 1)
            pull = slopes @ miss
            pull[:, 2, 0] += hold * (given - radius)
            normal = slopes @ slopes.transpose(0, 2, 1) + np.diag([0.5, 0.5, 0.5 + hold, 0.5][: len(moved)])
            delta = np.linalg.solve(normal, pull)[..., 0].clip(-4, 4)
            centre += delta[:, :2]
            radius = (radius + delta[:, 2]).clip(2, self.seen.shape[1])
            if turn:
                angle += delta[:, 3] / radius
        return _Fit(centre, radius, angle, self.error(shape, centre, radius, angle))
