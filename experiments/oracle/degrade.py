"""True clips whose shapes are degraded in measured ways and degrees. See README.md beside."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
from scipy import ndimage

from sora_jax.evaluation.report import ONE_THING
from sora_jax.media.video import Video
from sora_jax.toyworld import scene as world
from sora_jax.toyworld.render import render
from sora_jax.toyworld.sampling import sample_scene
from sora_jax.toyworld.scene import Scene, Thing
from sora_jax.toyworld.silhouettes import HOLE, between, bulging, outline

FRAMES, SIDE, FPS = 17, 64, 8.0
_FINE = 5  # samples of a pixel's side

# Degrees of each way. What lies beyond the limit a person no longer names surely; see README.md.
BLUR = (0.1, 0.2, 0.3, 0.4)  # standard deviation in the thing's radii: 0.64 to 5.4 pixels
BULGE = (0.04, 0.07, 0.1, 0.13)  # of the edge's farthest over its nearest distance, less 1
ROUND = (0.2, 0.4, 0.6, 0.8)  # share of the way to the circle
TOWARDS = (0.1, 0.2, 0.3, 0.4)  # share of the way to the other polygon
SHARES = (0.2, 0.4, 0.6, 0.8)  # of the hole closed, of the notches filled
WOBBLE = (0.03, 0.06, 0.09)  # standard deviation of the edge, in radii
POLYGONS = ("square", "triangle", "star")

Edge = Callable[[np.ndarray, int], np.ndarray]  # (angles, frame) -> distances, of area pi


def scenes(each: int, seed: int = 0) -> list[Scene]:
    """`each` validation scenes of every shape in every size, as `sora-jax evaluate toyworld` draws them."""
    left = dict.fromkeys(itertools.product(world.SHAPES, world.SIZES), each)
    out = []
    for index in itertools.count():
        if not any(left.values()):
            return out
        scene = sample_scene(seed, index, "validation", (FRAMES - 1) / FPS, 1.0, ONE_THING)
        thing = scene.shots[0].things[0]
        if left[thing.shape, thing.size]:
            left[thing.shape, thing.size] -= 1
            out.append(scene)
    return None


def unit(shape: str) -> float:
    """Radius of the disc that covers as much as the shape, a ring's hole included, of radius 1."""
    angle = np.linspace(0, 2 * np.pi, 7200, endpoint=False)
    corner = {"circle": 1.0, "ring": 1.08, "square": 0.88 * 2**0.5, "triangle": 1.3, "star": 1.3}[shape]
    return corner / float(outline(shape, angle).max())


def towards(shape: str, other: str, share: float) -> Edge:
    """The outline on its way from one shape to another."""
    return lambda angle, frame: between(shape, other, share, angle)


def filled(shape: str, share: float) -> Edge:
    """A star whose points merge."""
    return lambda angle, frame: outline(shape, angle, share)


def wobbly(shape: str, amount: float, seed: int) -> Edge:
    """An outline that differs from frame to frame by waves of 2 to 7 a turn, `amount` in standard deviation."""

    def edge(angle: np.ndarray, frame: int) -> np.ndarray:
        rng = np.random.default_rng((seed, frame))
        waves = np.arange(2, 8)
        size, phase = rng.normal(size=6), rng.uniform(0, 2 * np.pi, 6)
        size *= amount * np.sqrt(2) / np.linalg.norm(size)
        wave = (size * np.cos(waves * angle[..., None] + phase)).sum(-1)
        return outline(shape, angle) * (1 + wave)

    return edge


def draw(scene: Scene, edge: Edge | None = None, closed: float = 0.0) -> Video:
    """The scene of one thing with this outline, and the hole of a ring `closed` by a share of its radius."""
    shot = scene.shots[0]
    thing: Thing = shot.things[0]
    still = Scene((dataclasses.replace(shot, things=()),), scene.duration, scene.aspect)
    frames = render(still, FRAMES, SIDE, SIDE, FPS).astype(np.float32)
    edge = edge or towards(thing.shape, thing.shape, 0.0)
    centre, radius = world.seen(thing, shot.camera, np.arange(FRAMES) / FPS, scene.aspect)
    fine = (np.arange(SIDE * _FINE) + 0.5) / _FINE
    colour = np.array(world.COLOURS[thing.colour], np.float32)
    for number, frame in enumerate(frames):
        y, x = (fine - SIDE / 2 - c * SIDE for c in centre[number])
        distance, angle = np.hypot(y[:, None], x), np.arctan2(x, -y[:, None])
        reach = edge(angle, number) * unit(thing.shape) * radius[number] * SIDE
        inside = distance < reach
        if thing.shape == "ring":
            inside &= distance > HOLE * (1 - closed) * unit("ring") * radius[number] * SIDE
        cover = inside.reshape(SIDE, _FINE, SIDE, _FINE).mean((1, 3), dtype=np.float32)[..., None]
        frame += cover * (colour - frame)
    return Video(np.round(frames).astype(np.uint8), FPS)


def blur(video: Video, sigma: float) -> Video:
    """Every frame through a Gaussian of `sigma` pixels."""
    frames = ndimage.gaussian_filter(video.frames.astype(np.float32), (0, sigma, sigma, 0))
    return Video(np.round(frames).astype(np.uint8), video.fps)


def degraded(scene: Scene, seed: int) -> dict[tuple[str, float], Video]:
    """The scene's clip in every way and degree that its shape can be degraded in, but by the autoencoder."""
    thing = scene.shots[0].things[0]
    shape, radius = thing.shape, thing.radius * SIDE
    true = draw(scene)
    out = {("true", 0.0): true}
    out |= {("blur", sigma): blur(true, sigma * radius) for sigma in BLUR}
    out |= {("wobble", amount): draw(scene, wobbly(shape, amount, seed)) for amount in WOBBLE}
    for other in POLYGONS:
        if shape not in POLYGONS:
            edges = {bulge: towards("circle", other, bulging(other, bulge)) for bulge in BULGE}
            out |= {(f"bulge to {other}", bulge): draw(scene, edge) for bulge, edge in edges.items()}
        elif shape == other:
            out |= {("round", share): draw(scene, towards(shape, "circle", share)) for share in ROUND}
        else:
            out |= {(f"to {other}", share): draw(scene, towards(shape, other, share)) for share in TOWARDS}
    if shape == "ring":
        out |= {("closed hole", share): draw(scene, closed=share) for share in SHARES}
    if shape == "star":
        out |= {("merged points", share): draw(scene, filled(shape, share)) for share in SHARES}
    return out
