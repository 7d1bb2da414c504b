"""The oracle: true clips are read right, changed ones are not."""

import collections
import dataclasses
import functools
import itertools

import numpy as np
import pytest
from scipy import ndimage

from sora_jax.errors import UserError
from sora_jax.media.video import Video
from sora_jax.toyworld import oracle
from sora_jax.toyworld import scene as world
from sora_jax.toyworld.render import render
from sora_jax.toyworld.sampling import sample_scene
from sora_jax.toyworld.scene import Background, Occluder, Scene, Shot, Thing

FPS = 8.0
SIZES = ((64, 64), (64, 112), (112, 64), (96, 96))
BALL = Thing("circle", "red", "small", "straight", "right", start=(0.0, -0.3), velocity=(0.0, 0.3))


def clip_of(scene: Scene, size: tuple[int, int] = (64, 64)) -> Video:
    return Video(render(scene, int(scene.duration * FPS) + 1, *size, FPS), FPS)


def one(thing: Thing, **shot) -> Scene:
    return Scene((Shot(0.0, (thing,), **shot),), 2.0)


def blurred(video: Video, rng: np.random.Generator) -> Video:
    """What an autoencoder leaves: a blur, an echo of every edge, noise."""
    frames = ndimage.gaussian_filter(video.frames.astype(np.float32), (0, 0.7, 0.7, 0))
    edges = frames - ndimage.gaussian_filter(frames, (0, 1.5, 1.5, 0))
    wave = np.cos(np.arange(frames.shape[2]) * 2 * np.pi / 8)[:, None]
    frames += 0.35 * wave * np.roll(edges, (2, 2), (1, 2)) + rng.normal(0, 4, frames.shape)
    return Video(np.clip(np.round(frames), 0, 255).astype(np.uint8), video.fps)


@functools.cache
def drawn(count: int) -> list[tuple[Scene, Video]]:
    pairs = []
    for index in range(count):
        height, width = SIZES[index % 4]
        duration = (1.0, 1.5, 2.0, 3.0)[index // 4 % 4]
        split = "heldout" if index % 3 == 0 else "train"
        scene = sample_scene(7, index, split, duration, width / height)
        pairs.append((scene, clip_of(scene, (height, width))))
    return pairs


def rates(scores: list[dict[str, bool]]) -> dict[str, float]:
    total = collections.Counter()
    for each in scores:
        total.update({name: int(value) for name, value in each.items()})
    return {name: total[name] / len(scores) for name in scores[0]}


def test_true_clips_are_read_right() -> None:
    scores = [oracle.score(oracle.read(video), scene) for scene, video in drawn(60)]
    wrong = {name: rate for name, rate in rates(scores).items() if rate < 0.98}  # one clip of 60 may fail
    assert not wrong


def test_blur_and_noise_are_borne() -> None:
    rng = np.random.default_rng(0)
    scores = [oracle.score(oracle.read(blurred(video, rng)), scene) for scene, video in drawn(60)[:32]]
    wrong = {name: rate for name, rate in rates(scores).items() if rate < 0.96}  # one clip of 32 may fail
    assert not wrong


def test_shuffled_scenes_score_at_chance() -> None:
    readings = [oracle.read(video) for _, video in drawn(60)[:24]]
    scenes = [scene for scene, _ in drawn(60)[1:25]]
    shuffled = rates([oracle.score(reading, scene) for reading, scene in zip(readings, scenes, strict=True)])
    chance = oracle.chance_levels(60)
    for name, rate in shuffled.items():
        assert abs(rate - chance[name]) < 0.3, name
    for name in ("colour", "shape", "direction", "all"):
        assert max(shuffled[name], chance[name]) < 0.45, name
    assert chance["all"] < 0.1


CHANGES = {
    "shape": {"shape": "star"},
    "colour": {"colour": "blue"},
    "size": {"size": "large"},
    "direction": {"direction": "left", "start": (0.0, 0.25), "velocity": (0.0, -0.3)},
}


@pytest.mark.parametrize("attribute", CHANGES)
def test_what_is_changed_is_what_is_wrong(attribute: str) -> None:
    changed = dataclasses.replace(BALL, **CHANGES[attribute])
    score = oracle.score(oracle.read(clip_of(one(changed))), one(BALL))
    wrong = {name for name, right in score.items() if not right}
    assert wrong == {attribute} | ({"all"} if attribute in oracle.CAPTIONED else set())


@pytest.mark.parametrize(
    ("motion", "thing"),
    {
        "still": Thing("star", "pink"),
        "straight": BALL,
        "bounce": Thing(
            "ring", "cyan", "small", "bounce", "up-right", start=(-0.1, 0.0), velocity=(-0.4, 0.4)
        ),
        "gravity": Thing("square", "green", "small", "gravity", start=(-0.35, 0.1), gravity=1.5),
        "grow": Thing("triangle", "blue", "small", "grow", growth=0.5),
        "shrink": Thing("circle", "yellow", "large", "shrink", growth=-0.25),
        "spin": Thing("square", "orange", "large", "spin", spin=-1.2, angle=0.3),
    }.items(),
)
def test_motions(motion: str, thing: Thing) -> None:
    (read,) = oracle.read(clip_of(one(thing))).things
    assert (read.motion, read.shape, read.size) == (motion, thing.shape, thing.size)
    assert read.direction in (thing.direction, "down" if motion == "gravity" else thing.direction)


@pytest.mark.parametrize("shape", world.SHAPES)
def test_shapes_are_told_through_a_heavy_blur(shape: str) -> None:
    thing = dataclasses.replace(BALL, shape=shape, size="medium", start=(0.1, -0.25))
    frames = ndimage.gaussian_filter(clip_of(one(thing)).frames.astype(np.float32), (0, 2.2, 2.2, 0))
    (read,) = oracle.read(Video(np.round(frames).astype(np.uint8), FPS)).things
    assert (read.shape, read.direction) == (shape, "right")


def test_track_tells_the_path() -> None:
    (read,) = oracle.read(clip_of(one(BALL))).things
    t, y, x, radius = np.array(read.track).T
    np.testing.assert_allclose(t, np.arange(17) / FPS)
    np.testing.assert_allclose(np.stack([y, x], -1), world.position(BALL, t), atol=0.004)
    np.testing.assert_allclose(radius, BALL.radius, atol=0.004)


def test_cut_off_at_the_edge() -> None:
    leaving = dataclasses.replace(BALL, velocity=(0.0, 0.4))
    assert oracle.read(clip_of(one(BALL))).things[0].inside
    assert not oracle.read(clip_of(one(leaving))).things[0].inside


def test_seen_again_behind_a_pillar() -> None:
    occluder = Occluder(0.0, 0.13)
    passing = dataclasses.replace(BALL, start=(0.0, -0.35), velocity=(0.0, 0.35))
    hidden = oracle.read(clip_of(one(passing, occluder=occluder)))
    assert [thing.reappears for thing in hidden.things] == [True]
    stays = dataclasses.replace(passing, velocity=(0.0, 0.175))
    assert [t.reappears for t in oracle.read(clip_of(one(stays, occluder=occluder))).things] == [False]


def test_count_and_cuts() -> None:
    things = tuple(
        Thing("square", colour, "small", start=place)
        for colour, place in zip(("red", "red", "blue"), ((-0.2, -0.3), (0.2, 0.3), (0.2, -0.2)), strict=True)
    )
    dark = Background("plain", "black", None, ((28, 28, 30),) * 2)
    scene = Scene((Shot(0.0, things), Shot(1.0, things[:1], dark)), 2.0)
    reading = oracle.read(clip_of(scene))
    assert reading.cuts == 1
    assert reading.shots == ((0.0, 1.0), (1.0, 2.125))
    assert [thing.shot for thing in reading.things] == [0, 0, 0, 1]
    assert all(oracle.score(reading, scene).values())
    fewer = Scene((Shot(0.0, things[:2]), scene.shots[1]), 2.0)
    assert not oracle.score(reading, fewer)["count"]
    assert not oracle.score(reading, Scene(scene.shots[:1], 2.0))["cuts"]


def test_one_frame_and_no_thing() -> None:
    picture = Video(render(one(BALL), 1, 64, 64, FPS), FPS)
    assert all(oracle.score(oracle.read(picture), one(BALL)).values())
    nothing = oracle.read(Video(np.full((5, 64, 64, 3), 120, np.uint8), FPS))
    assert nothing.things == ()
    score = oracle.score(nothing, one(BALL))
    assert not any(score[name] for name in ("count", "colour", "shape", "direction", "all"))


def test_large_frames_are_read_too() -> None:
    assert all(oracle.score(oracle.read(clip_of(one(BALL), (180, 180))), one(BALL)).values())


def test_only_the_attributes_asked_for() -> None:
    wrong_way = dataclasses.replace(BALL, **CHANGES["direction"])
    reading = oracle.read(clip_of(one(wrong_way)))
    assert oracle.score(reading, one(BALL), ("colour", "shape")) == {
        "colour": True,
        "shape": True,
        "all": True,
    }
    with pytest.raises(UserError, match="'smell'"):
        oracle.score(reading, one(BALL), ("smell",))


def test_fragments_that_happen_to_be_right_earn_nothing() -> None:
    """A clip of many things is judged by what one sees most of, not by the best of them."""
    asked, other = Thing("star", "red", "small", start=(-0.3, -0.3)), Thing("square", "blue", "large")
    reading = oracle.read(clip_of(Scene((Shot(0.0, (other, asked)),), 2.0)))
    assert len(reading.things) == 2
    right = oracle.score(reading, one(asked))
    assert not (right["count"] or right["shape"] or right["colour"] or right["all"])
    assert oracle.score(reading, one(other))["all"]


def test_things_that_cross_keep_their_names() -> None:
    crossing = Thing("square", "blue", "large", "straight", "left", start=(0.1, 0.25), velocity=(0.0, -0.3))
    scene = Scene((Shot(0.0, (BALL, crossing)),), 2.0)
    score = oracle.score(oracle.read(clip_of(scene)), scene)
    assert score["all"]
    assert score["count"]


def test_every_colour_is_told_on_every_tone() -> None:
    for colour, (tone, rgb) in itertools.product(world.COLOURS, world.TONES.items()):
        scene = one(Thing("ring", colour), background=Background("plain", tone, None, (rgb, rgb)))
        (thing,) = oracle.read(Video(render(scene, 1, 64, 64, FPS), FPS)).things
        assert (thing.colour, thing.shape) == (colour, "ring"), (colour, tone)
