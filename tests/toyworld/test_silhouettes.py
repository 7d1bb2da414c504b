"""Shapes that are degraded: read as what a person would name, and wrong no one way."""

import collections
import dataclasses
import functools
import pathlib
import sys

import numpy as np
import pytest

from sora_jax.errors import UserError
from sora_jax.toyworld import oracle, silhouettes
from sora_jax.toyworld import scene as world
from sora_jax.toyworld.render import signed_distance
from sora_jax.toyworld.scene import Scene, Shot, Thing

sys.path.append(str(pathlib.Path(__file__).parents[2] / "experiments" / "oracle"))
import degrade

THINGS = [
    Thing(shape, "red", size, "straight", "right", start=(0.03, -0.2), velocity=(0.0, 0.2))
    for shape in world.SHAPES
    for size in world.SIZES
]


@functools.cache
def confusions(reading: str) -> collections.Counter[tuple[str, str]]:
    """(shown, read) in clips degraded to the limits of experiments/oracle."""
    pairs = collections.Counter()
    for number, thing in enumerate(THINGS):
        shape, scene = thing.shape, Scene((Shot(0.0, (thing,)),), 2.0)
        clips = [degrade.blur(degrade.draw(scene), 0.3 * thing.radius * degrade.SIDE)]
        clips.append(degrade.draw(scene, degrade.wobbly(shape, 0.06, number)))
        if shape in degrade.POLYGONS:
            clips.append(degrade.draw(scene, degrade.towards(shape, "circle", 0.4)))
        else:
            share = silhouettes.bulging("square", 0.1)
            clips.append(degrade.draw(scene, degrade.towards("circle", "square", share)))
        if shape == "ring":
            clips.append(degrade.draw(scene, closed=0.6))
        if shape == "star":
            clips.append(degrade.draw(scene, degrade.filled(shape, 0.6)))
        for clip in clips:
            pairs[shape, oracle.read(clip, reading).things[0].shape] += 1
    return pairs


@pytest.mark.slow
def test_degraded_shapes_are_named_and_none_is_read_too_often() -> None:
    pairs = confusions("likelihood")
    clips = sum(pairs.values())
    assert sum(pairs[shape, shape] for shape in world.SHAPES) >= 0.98 * clips  # one of 51 may fail
    for name in world.SHAPES:
        read = sum(n for (_, seen), n in pairs.items() if seen == name)
        shown = sum(n for (truth, _), n in pairs.items() if truth == name)
        assert abs(read - shown) <= 0.02 * clips, name


@pytest.mark.slow
def test_the_older_reading_is_kept_for_comparison() -> None:
    pairs = confusions("nearest")
    assert pairs["ring", "circle"] >= 3  # a hole that is 60% closed was a circle
    assert pairs["circle", "square"] >= 2  # a bulge of 10% a square
    with pytest.raises(UserError, match="'smell'"):
        oracle.read(degrade.draw(Scene((Shot(0.0, THINGS[:1]),), 2.0)), "smell")


@pytest.mark.parametrize("other", degrade.POLYGONS)
def test_a_circle_ends_where_corners_begin(other: str) -> None:
    scene = Scene((Shot(0.0, (dataclasses.replace(THINGS[2], size="large"),)),), 2.0)
    for bulge, name in ((0.07, "circle"), (0.1, "circle"), (0.2, other)):
        edge = degrade.towards("circle", other, silhouettes.bulging(other, bulge))
        assert oracle.read(degrade.draw(scene, edge)).things[0].shape == name, bulge


@pytest.mark.parametrize("shape", ["circle", "square", "triangle", "star"])
def test_outlines_are_the_renderers(shape: str) -> None:
    angle = np.linspace(0, 2 * np.pi, 97)
    edge = silhouettes.outline(shape, angle) * degrade.unit(shape) * 100
    for a, distance in zip(angle, edge, strict=True):
        y, x = (np.full((1, 1, 1), v, np.float32) for v in (-distance * np.cos(a), distance * np.sin(a)))
        off = signed_distance(shape, y, x, np.array([100.0]), np.array([0.0]))
        assert abs(float(off.item())) < 0.01


def test_a_bulge_is_what_it_is_called() -> None:
    angle = np.linspace(0, 2 * np.pi, 721)
    for shape in degrade.POLYGONS:
        edge = silhouettes.between("circle", shape, silhouettes.bulging(shape, 0.07), angle)
        assert edge.max() / edge.min() == pytest.approx(1.07)
