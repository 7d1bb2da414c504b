"""Scenes of the laws: something passes behind a pillar, bounces off a wall, falls and hops, or just goes straight."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np

from sora_jax.evaluation.report import ONE_THING
from sora_jax.media.video import Video
from sora_jax.toyworld import captions
from sora_jax.toyworld import scene as world
from sora_jax.toyworld.render import render
from sora_jax.toyworld.sampling import sample_scene
from sora_jax.toyworld.scene import Scene, Thing, WorldConfig

FRAMES, FPS, SIZE = 17, 8.0, 64
GIVEN = 5  # frames that show how fast it moves, and nothing yet of what the law is about
SECONDS = (FRAMES - 1) / FPS


@dataclasses.dataclass(frozen=True)
class Law:
    """What is drawn of the world, and which of it shows the law once and in whole."""

    config: WorldConfig
    suits: Callable[[Thing], bool]


def _alone(motion: str) -> WorldConfig:
    return dataclasses.replace(ONE_THING, motions=tuple(float(each == motion) for each in world.MOTIONS))


def turns(thing: Thing) -> list[float]:
    """Seconds at which a thing that bounces meets its walls, within the clip."""
    times = []
    for start, speed, (low, high) in zip(thing.start, thing.velocity, world.room(thing, 1.0), strict=True):
        if speed:
            first, width = ((high - start) / speed if speed > 0 else (low - start) / speed), high - low
            times += [first + k * width / abs(speed) for k in range(4)]
    return sorted(time for time in times if time < SECONDS)


def lands(thing: Thing) -> float:
    """Seconds until what falls meets the floor."""
    return math.sqrt(2 * (world.room(thing, 1.0)[0][1] - thing.start[0]) / thing.gravity)


def _bounces_once(thing: Thing) -> bool:
    """At one wall, at a slant, in the middle of what is not given."""
    return 0.0 not in thing.velocity and len(times := turns(thing)) == 1 and 0.75 <= times[0] <= 1.4


def _hops_once(thing: Thing) -> bool:
    return lands(thing) >= 0.75 and lands(thing) * (1 + 2 * world.RESTITUTION) >= SECONDS


LAWS = {
    "permanence": Law(dataclasses.replace(ONE_THING, occluder=1.0), lambda thing: True),
    "bounce": Law(_alone("bounce"), _bounces_once),
    "gravity": Law(_alone("gravity"), _hops_once),
    "straight": Law(ONE_THING, lambda thing: True),  # of experiments/compute
}


def scenes(law: str, count: int) -> list[tuple[Scene, str]]:
    """Validation scenes and their captions, the same every time."""

    def fitting() -> Iterator[tuple[Scene, str]]:
        for index in itertools.count():
            scene = sample_scene(0, index, "validation", SECONDS, 1.0, LAWS[law].config)
            if LAWS[law].suits(scene.shots[0].things[0]):
                yield scene, captions.short_caption(scene, np.random.default_rng(index))

    return list(itertools.islice(fitting(), count))


def true_clip(scene: Scene) -> Video:
    """The true clip."""
    return Video(render(scene, FRAMES, SIZE, SIZE, FPS), FPS)
