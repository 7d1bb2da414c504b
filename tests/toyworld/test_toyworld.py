"""Toyworld: scenes keep their splits' promises, pictures and words tell the scene's truth, rendering is cheap."""

import collections
import dataclasses
import math
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_jax.errors import UserError
from sora_jax.toyworld import scene as world
from sora_jax.toyworld.render import Toyworld, render
from sora_jax.toyworld.sampling import sample_scene
from sora_jax.toyworld.scene import (
    COLOURS,
    DIRECTIONS,
    MOTIONS,
    SHAPES,
    SIZES,
    Scene,
    Shot,
    Thing,
    WorldConfig,
)

FPS, FRAMES = 8.0, 17
DURATION = (FRAMES - 1) / FPS


def scenes(count=400, split="train", duration=DURATION, aspect=1.0, **distribution):
    config = WorldConfig(**distribution)
    return [sample_scene(0, index, split, duration, aspect, config) for index in range(count)]


def things(*args, **kwargs):
    return [thing for scene in scenes(*args, **kwargs) for shot in scene.shots for thing in shot.things]


def alone(thing, duration=DURATION, aspect=1.0, **shot):
    return Scene((Shot(0.0, (thing,), **shot),), duration, aspect)


def saturated(frames):
    """Where a thing is seen: bool[..., Y, X]."""
    frames = frames.astype(int)
    return frames.max(-1) - frames.min(-1) > 60


# Scenes


def test_shapes_are_as_often_as_asked_for():
    counts = collections.Counter(
        thing.shape for thing in things(shapes=(1.0, 1.0, 1.0, 5.0, 1.0), occluder=0.5)
    )
    assert 0.45 < counts["star"] / sum(counts.values()) < 0.65  # 5 of 9, more among what spins
    assert set(counts) == set(SHAPES)


def test_a_shape_that_is_never_drawn_is_refused():
    with pytest.raises(UserError, match="above 0, and got 0"):
        WorldConfig(shapes=(1.0, 1.0, 1.0, 1.0, 0.0))


def test_same_arguments_same_scene_and_frames():
    source = Toyworld(seed=3)
    copy = pickle.loads(pickle.dumps(source))
    later = copy[7], source[5]
    clip = source[7]
    assert source.scene(7) == copy.scene(7)
    np.testing.assert_array_equal(clip.video.frames, later[0].video.frames)
    assert (clip.captions, clip.timed, clip.key) == (later[0].captions, later[0].timed, later[0].key)
    assert Toyworld(seed=4).scene(7) != source.scene(7)
    assert Toyworld(seed=3, split="validation").scene(7) != source.scene(7)
    assert Toyworld(seed=3, clips=8).scene(7) == source.scene(7)


def test_every_word_of_the_grammar_comes_up():
    drawn = scenes(1500)
    everything = [thing for scene in drawn for shot in scene.shots for thing in shot.things]
    shots = [shot for scene in drawn for shot in scene.shots]
    for field, table in {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "motion": MOTIONS}.items():
        assert {getattr(thing, field) for thing in everything} == set(table)
    assert {thing.direction for thing in everything} == {None, *DIRECTIONS}
    assert {shot.background.kind for shot in shots} == set(world.BACKGROUNDS)
    assert {shot.background.texture for shot in shots} == {None, *world.TEXTURES}
    assert {shot.camera.kind for shot in shots} == set(world.CAMERAS)
    assert {len(shot.things) for shot in shots} == {1, 2, 3}
    assert any(shot.occluder for shot in shots)


def test_distribution_is_as_configured():
    drawn = scenes(1500, occluder=0.0)
    shots = [shot for scene in drawn for shot in scene.shots]
    counts = collections.Counter(len(shot.things) for shot in shots)
    assert [counts[n] / len(shots) for n in (1, 2, 3)] == pytest.approx([0.55, 0.30, 0.15], abs=0.04)
    still = np.mean([shot.camera.kind == "still" for shot in shots])
    assert still == pytest.approx(0.8, abs=0.04)
    assert np.mean([len(scene.shots) == 2 for scene in drawn]) == pytest.approx(0.1, abs=0.03)
    straight = np.mean([t.motion == "straight" for shot in shots for t in shot.things])
    assert straight == pytest.approx(0.53, abs=0.05)
    assert all(len(scene.shots) == 2 for scene in scenes(20, two_shots=1.0))
    assert {
        thing.motion for thing in things(50, motions=(0, 0, 1.0, 0, 0, 0, 0), cameras=(1.0, 0, 0), occluder=0)
    } == {"bounce"}


def test_heldout_combinations_are_about_an_eighth_and_training_never_shows_them():
    assert len(world.HELDOUT_SHAPES) / (len(SHAPES) * len(COLOURS)) == pytest.approx(0.12, abs=0.02)
    assert len(world.HELDOUT_DIRECTIONS) / (len(DIRECTIONS) * len(COLOURS)) == pytest.approx(0.12, abs=0.02)
    for split in ("train", "validation", "paraphrase"):
        for duration in (0.0, DURATION):
            for thing in things(400, split, duration):
                assert (thing.shape, thing.colour) not in world.HELDOUT_SHAPES
                assert (thing.colour, thing.direction) not in world.HELDOUT_DIRECTIONS
    heldout = things(600, "heldout")
    assert all(map(world.is_heldout, heldout))
    assert {(t.shape, t.colour) for t in heldout} >= world.HELDOUT_SHAPES
    assert {(t.colour, t.direction) for t in heldout} >= world.HELDOUT_DIRECTIONS
    assert all(map(world.is_heldout, things(100, "heldout", 0.0)))


def test_splits_share_no_scene():
    assert not set(scenes(300)) & set(scenes(300, "validation"))


def test_unknown_split_is_a_clear_error():
    with pytest.raises(UserError, match="no split 'test'"):
        sample_scene(0, 0, "test")
    with pytest.raises(UserError, match="no split"):
        Toyworld(split="valid")


# Motion


@given(
    index=st.integers(0, 10_000),
    duration=st.floats(0.3, 20.0),
    aspect=st.sampled_from([0.5, 9 / 16, 1.0, 16 / 9, 3.0]),
)
@settings(max_examples=80, deadline=None)
def test_what_bounces_or_falls_stays_inside_the_frame(index, duration, aspect):
    motions = (0.0, 0.0, 0.5, 0.5, 0.0, 0.0, 0.0)
    config = WorldConfig(motions=motions, cameras=(1.0, 0.0, 0.0), occluder=0.0)
    scene = sample_scene(0, index, "train", duration, aspect, config)
    for thing in scene.shots[0].things:
        path = world.position(thing, np.linspace(0, 2 * duration, 200), aspect)
        for along, (low, high) in zip(path.T, world.room(thing, aspect), strict=True):
            assert along.min() >= low - 1e-9 and along.max() <= high + 1e-9


def test_bounce_sets_out_in_its_direction_and_turns_midway():
    for thing in things(
        60, motions=(0, 0, 1.0, 0, 0, 0, 0), cameras=(1.0, 0, 0), occluder=0.0, two_shots=0.0
    ):
        path = world.position(thing, np.linspace(0, DURATION, 101))
        unit = np.array(DIRECTIONS[thing.direction])
        heading = np.diff(path, axis=0) @ unit
        assert (heading[:19] > 0).all()
        assert (np.sign(np.diff(path, axis=0)) != np.sign(unit)).any(1)[20:80].any()


def test_fall_accelerates_lands_and_loses_height():
    (_, floor), _ = world.room(Thing("circle", "red", "small", "gravity"), 1.0)
    thing = Thing("circle", "red", "small", "gravity", start=(-0.3, 0.0), gravity=2.0)
    t = np.linspace(0, 6, 6001)
    y = world.position(thing, t)[:, 0]
    np.testing.assert_allclose(y[:600], -0.3 + t[:600] ** 2, atol=1e-9)
    assert y.max() == pytest.approx(floor, abs=1e-3)
    landing = math.sqrt(floor + 0.3)
    hop = y[(t > landing) & (t < landing * (1 + 2 * world.RESTITUTION))]
    assert floor - hop.min() == pytest.approx(world.RESTITUTION**2 * (floor + 0.3), abs=1e-3)
    assert y[-1] == pytest.approx(floor)
    assert np.abs(np.diff(y)).max() < 0.01  # no jumps


@pytest.mark.parametrize("aspect", [9 / 16, 1.0, 16 / 9])
@pytest.mark.parametrize("duration", [0.75, 2.0, 8.0])
def test_straight_motion_is_plain_to_see_and_mostly_inside(duration, aspect):
    inside = []
    for scene in scenes(150, duration=duration, aspect=aspect, two_shots=0.0, cameras=(1.0, 0.0, 0.0)):
        for thing in scene.shots[0].things:
            if thing.motion == "straight":
                ends = world.position(thing, np.array([0.0, duration]), aspect)
                way = ends[1] - ends[0]
                assert np.linalg.norm(way) >= 0.349
                np.testing.assert_allclose(way / np.linalg.norm(way), DIRECTIONS[thing.direction], atol=1e-6)
                low, high = np.array(world.room(thing, aspect)).T
                inside.append(((ends >= low - 0.02) & (ends <= high + 0.02)).all())
    assert np.mean(inside) > 0.8


def test_things_start_apart():
    touching = []
    for scene in scenes(500, cameras=(1.0, 0.0, 0.0)):
        placed = scene.shots[0].things
        for i, one in enumerate(placed):
            for other in placed[:i]:
                apart = math.dist(one.start, other.start)
                touching.append(apart < 0.7 * (one.radius + other.radius))
    assert np.mean(touching) < 0.02


def test_occluder_hides_the_whole_thing_which_comes_out_again():
    for scene in scenes(25, occluder=1.0, two_shots=0.0):
        frames = render(scene, 33, 64, 64, 32 / DURATION)
        visible = saturated(frames).sum((1, 2))
        assert visible[0] > 40 and visible[-1] > 40
        assert visible.min() == 0
        assert abs(int(visible[0]) - int(visible[-1])) < 0.2 * visible[0]


def test_camera_pans_and_zooms():
    thing = Thing("circle", "red", "small")
    pan = world.Camera("pan", "left", velocity=(0.0, -0.2))
    centre, radius = world.seen(thing, pan, np.array([0.0, 1.0]))
    np.testing.assert_allclose(centre, [[0, 0], [0, 0.2]], atol=1e-12)
    np.testing.assert_allclose(radius, thing.radius)
    zoom = world.Camera("zoom", "in", scale=0.9, rate=0.3)
    centre, radius = world.seen(dataclasses.replace(thing, start=(0.2, 0.1)), zoom, 1.0)
    np.testing.assert_allclose(centre, np.array([0.2, 0.1]) * 0.9 * math.exp(0.3))
    assert radius == pytest.approx(thing.radius * 0.9 * math.exp(0.3))
    moving = scenes(40, cameras=(0.0, 0.5, 0.5), occluder=0.0)
    assert all(shot.background.kind != "plain" for scene in moving for shot in scene.shots)
    frames = render(moving[0], 2, 64, 64, 1 / DURATION)
    assert (frames[0] != frames[1]).mean() > 0.2


# Pictures


def test_cover_is_the_shape_s_area():
    areas = {
        "circle": math.pi,
        "square": 4 * 0.88**2,
        "triangle": 3 * math.sqrt(3) / 4 * 1.3**2,
        "star": 5 * 1.3 * 0.6 * math.sin(math.pi / 5),
        "ring": math.pi * (1.08**2 - 0.56**2),
    }
    black = world.Background("plain", "black", None, ((0, 0, 0), (0, 0, 0)))
    for shape, area in areas.items():
        for angle in (0.0, 0.4):
            thing = Thing(shape, "red", "medium", "spin", start=(0.013, -0.021), angle=angle)
            (frame,) = render(alone(thing, 0.0, background=black), 1, 128, 128, 8)
            cover = frame[..., 0].sum() / COLOURS["red"][0]
            assert cover == pytest.approx(area * (0.15 * 128) ** 2, rel=0.03), shape


def test_every_resolution_shows_the_same_scene():
    for scene in scenes(20):
        small = render(scene, 5, 48, 48, 2)
        large = render(scene, 5, 144, 144, 2).reshape(5, 48, 3, 48, 3, 3).mean((2, 4))
        assert np.abs(small - large).mean() < 1.0


def test_every_rate_shows_the_same_scene():
    for scene in scenes(10):
        np.testing.assert_array_equal(render(scene, 33, 32, 32, 16)[::2], render(scene, 17, 32, 32, 8))


def test_edges_are_soft():
    thing = Thing("circle", "red", "large")
    (frame,) = render(alone(thing, 0.0), 1, 64, 64, 8)
    ground, colour = np.array(world.TONES["light grey"]), np.array(COLOURS["red"])
    cover = (frame[..., 1] - ground[1]) / (colour[1] - ground[1])
    part = (cover > 0.05) & (cover < 0.95)
    assert 0.5 < part.sum() / (2 * math.pi * 0.21 * 64) < 2.0  # about one pixel along the outline


@pytest.mark.parametrize("shape", [(1, 64, 64), (2, 7, 9), (9, 36, 64), (9, 64, 36), (3, 24, 96), (1, 1, 1)])
def test_any_shape_renders(shape):
    frames, height, width = shape
    for scene in scenes(30, duration=frames / 8, aspect=width / height):
        video = render(scene, frames, height, width, 8)
        assert video.shape == (frames, height, width, 3) and video.dtype == np.uint8


def test_thing_is_where_the_formula_says():
    thing = Thing("ring", "cyan", "small", "straight", "down-right", start=(-0.2, -0.5), velocity=(0.2, 0.3))
    frames = render(alone(thing, aspect=16 / 9), 9, 72, 128, 4)
    for k, seen in enumerate(saturated(frames)):
        centre = (np.argwhere(seen).mean(0) + 0.5 - (36, 64)) / 72
        np.testing.assert_allclose(centre, world.position(thing, k / 4, 16 / 9), atol=0.01)


def test_cut_changes_the_picture_at_its_second():
    for scene in scenes(10, two_shots=1.0, occluder=0.0, objects=(1.0, 0.0, 0.0)):
        frames = render(scene, FRAMES, 32, 32, FPS).astype(int)
        change = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
        assert change.argmax() + 1 == math.ceil(scene.shots[1].start * FPS)


def test_colours_stand_out_from_backgrounds_and_one_another():
    def hue(rgb):
        x = np.array(rgb) - np.mean(rgb)
        return x / np.linalg.norm(x)

    pairs = [(a, b) for a in COLOURS for b in COLOURS if a < b]
    assert max(hue(COLOURS[a]) @ hue(COLOURS[b]) for a, b in pairs) < 0.94
    assert min(max(rgb) - min(rgb) for rgb in COLOURS.values()) > 120
    for rgb in (*world.TONES.values(), *world.PILLARS):
        assert max(rgb) - min(rgb) < 40


def test_rendering_is_cheap():
    drawn = scenes(30, cameras=(1.0, 0.0, 0.0))
    render(drawn[0], FRAMES, 64, 64, FPS)
    costs = []
    for scene in drawn:
        begin = time.process_time()
        render(scene, FRAMES, 64, 64, FPS)
        costs.append(time.process_time() - begin)
    assert np.median(costs) < 0.008


# Sources


def test_source_draws_one_of_its_shapes():
    shapes = ((1, 32, 32, 8), (9, 32, 48, 12), (17, 48, 32, 8))
    source = Toyworld(shapes=shapes, clips=40)
    drawn = [source.shape(i) for i in range(len(source))]
    assert set(drawn) == set(shapes)
    for i in range(6):
        clip = source[i]
        frames, height, width, fps = drawn[i]
        assert clip.video.frames.shape == (frames, height, width, 3) and clip.video.fps == fps
        assert source.scene(i).aspect == pytest.approx(width / height)
        assert clip.captions["short"] and clip.captions["detailed"] and clip.timed[0][0] == 0.0
    with pytest.raises(IndexError):
        source[40]
    assert len({source[i].key for i in range(5)}) == 5


def test_source_shows_the_middle_square_of_whole_frames():
    shapes = ((9, 32, 64, 8), (1, 48, 32, 8))
    whole, square = Toyworld(shapes=shapes, clips=8), Toyworld(shapes=shapes, clips=8, crop="square")
    assert len({whole.shape(i) for i in range(8)}) == 2
    for i in range(8):
        frames = whole[i].video.frames
        middle = frames[:, :, 16:48] if frames.shape[2] == 64 else frames[:, 8:40]
        np.testing.assert_array_equal(square[i].video.frames, middle)
        assert square[i].captions == whole[i].captions


def test_source_letterboxes_whole_frames():
    shapes = ((9, 32, 64, 8), (1, 48, 32, 8))
    whole, boxed = Toyworld(shapes=shapes, clips=8), Toyworld(shapes=shapes, clips=8, crop="letterbox")
    for i in range(8):
        frames, square = whole[i].video.frames, boxed[i].video.frames
        assert square.shape == (len(frames), 32, 32, 3)
        wide = frames.shape[2] == 64
        bars, shown = (
            (square[:, [0, 7, 24, 31]], square[:, 8:24])
            if wide
            else (square[:, :, [0, 4, 26, 31]], square[:, :, 5:26])
        )
        assert not bars.any() and shown.any(), "16 of 32 rows are shown of 1:2, 21 of 32 columns of 3:2"
        mean = lambda clip: clip.astype(float).mean((0, 1, 2))
        np.testing.assert_allclose(mean(shown), mean(frames), atol=3)


def test_source_says_what_is_wrong_with_its_shapes():
    for shapes in ((), ((0, 64, 64, 8),), ((17, 64, 64, 0.0),)):
        with pytest.raises(UserError, match="shapes"):
            Toyworld(shapes=shapes)


def test_tfds_builds_and_reads_without_tensorflow(tmp_path):
    script = f"""
import sys
import numpy as np
import tensorflow_datasets as tfds
from sora_jax.toyworld import render
from sora_jax.toyworld import tfds as toyworld_tfds

shapes = ((5, 48, 48, 8.0), (1, 48, 64, 8.0))
config = toyworld_tfds.ToyworldConfig(name="tiny", clips=6, shapes=shapes)
records = tfds.data_source("toyworld", split="train", data_dir={str(tmp_path)!r}, builder_kwargs=dict(config=config))
assert len(records) == 6
source = render.Toyworld(clips=6, shapes=shapes)
for record in records:
    clip = toyworld_tfds.decode(record)
    truth = source[int(clip.key.rsplit("-")[-1])]
    assert (clip.captions, clip.key, len(clip.timed)) == (truth.captions, truth.key, len(truth.timed))
    assert clip.timed[0] == truth.timed[0] and clip.video.fps == truth.video.fps
    error = np.abs(clip.video.frames.astype(int) - truth.video.frames).mean()
    assert error < 4, error
assert "tensorflow" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
