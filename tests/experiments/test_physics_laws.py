"""experiments/physics: fits find known laws in synthetic tracks, and measures find them in true clips alone.

With experiments/compute, whose models it draws clips of.
"""

import dataclasses
import itertools

import numpy as np
import pytest
from helpers.scripts import scripts_of

from sora_jax.errors import UserError

SECONDS = np.arange(17) / 8


@pytest.fixture(scope="module")
def load():
    with scripts_of("physics") as load:
        yield load


def bounced(time=0.97, before=(0.3, 0.4), after=(0.3, -0.2)):
    since = (SECONDS - time)[:, None]
    return np.array([0.1, 0.35]) + np.where(since < 0, since * before, since * np.array(after))


def fallen(time=0.93, gravity=1.3, hop_gravity=0.9, restitution=0.7, drift=0.05):
    since = SECONDS - time
    fall = gravity * (SECONDS**2 - time**2) / 2
    hop = -restitution * gravity * time * since + hop_gravity * since**2 / 2
    return np.stack([0.35 + np.where(since < 0, fall, hop), drift * SECONDS], -1)


def test_a_bounce_is_found(load):
    fit = load("laws").fit_bounce(SECONDS, bounced())
    assert fit.turned and fit.axis == 1 and fit.residual < 1e-4
    assert fit.time == pytest.approx(0.97, abs=1e-4) and fit.place == pytest.approx([0.1, 0.35], abs=1e-4)
    assert fit.speed_ratio == pytest.approx(np.hypot(0.3, 0.2) / 0.5, rel=1e-4)
    assert fit.angle_in == pytest.approx(np.degrees(np.arctan2(0.3, 0.4)), abs=1e-2)
    assert fit.angle_out == pytest.approx(np.degrees(np.arctan2(0.3, 0.2)), abs=1e-2)


def test_what_goes_back_along_the_wall_has_a_negative_angle(load):
    fit = load("laws").fit_bounce(SECONDS, bounced(after=(-0.1, -0.4)))
    assert fit.axis == 1 and fit.angle_out == pytest.approx(-np.degrees(np.arctan2(0.1, 0.4)), abs=1e-2)


def test_what_goes_on_or_stops_has_not_turned(load):
    fit_bounce = load("laws").fit_bounce
    assert not fit_bounce(SECONDS, bounced(after=(0.3, 0.4))).turned
    assert not fit_bounce(SECONDS, bounced(after=(0.0, 0.0))).turned


def test_a_fall_and_its_hop_are_found(load):
    fit = load("laws").fit_fall(SECONDS, fallen())
    assert fit.time == pytest.approx(0.93, abs=1e-4) and fit.height == pytest.approx(0.35, abs=1e-4)
    assert fit.gravity == pytest.approx(1.3, rel=1e-3) and fit.hop_gravity == pytest.approx(0.9, rel=1e-3)
    assert fit.restitution == pytest.approx(0.7, rel=1e-3) and fit.drift == pytest.approx(0.05)
    assert fit.residual < 1e-4 and fit.sideways_residual < 1e-4


def test_fits_stand_noise_and_gaps(load):
    rng, kept = np.random.default_rng(0), np.delete(np.arange(17), [3, 8, 12])
    noisy = lambda track: (SECONDS[kept], (track + rng.normal(0, 0.003, track.shape))[kept])
    fall, hit = load("laws").fit_fall(*noisy(fallen())), load("laws").fit_bounce(*noisy(bounced()))
    assert fall.gravity == pytest.approx(1.3, rel=0.15) and fall.residual < 0.005
    assert hit.speed_ratio == pytest.approx(np.hypot(0.3, 0.2) / 0.5, rel=0.1) and hit.residual < 0.008


def test_short_tracks_and_shuffled_ones_show_no_law(load):
    laws, order = load("laws"), np.random.default_rng(1).permutation(17)
    assert laws.fit_bounce(SECONDS[:7], bounced()[:7]) is None
    assert laws.fit_fall(SECONDS[:0], np.empty((0, 2))) is None
    assert laws.fit_bounce(SECONDS, bounced()[order]).residual > 0.05
    assert laws.fit_fall(SECONDS, fallen()[order]).residual > 0.05


@pytest.mark.parametrize("law", ["permanence", "bounce", "gravity"])
def test_true_clips_keep_the_law_and_stopped_or_shuffled_ones_do_not(load, law):
    scenes, measure = load("scenes"), load("measure").MEASURES[law]
    for scene, _ in scenes.scenes(law, 2):
        frames = scenes.true_clip(scene).frames
        stopped = frames[np.minimum(np.arange(scenes.FRAMES), scenes.GIVEN - 1)]
        shuffled = frames[np.random.default_rng(0).permutation(scenes.FRAMES)]
        assert [measure(each, scene)["holds"] for each in (frames, stopped, shuffled)] == [True, False, False]


def test_another_scene_is_not_where_this_one_leads(load):
    scenes, measure = load("scenes"), load("measure")
    (one, _), (other, _) = scenes.scenes("permanence", 2)
    assert not measure.permanence(scenes.true_clip(other).frames, one)["holds"]


def test_figures_count_only_clips_that_have_them(load):
    rows = [{"turned": value > 0, "speed": value} for value in (1.0, 2.0, 3.0, float("nan"))]
    figures = load("measure").summarize(rows)
    assert figures["turned"]["share"] == 0.75 and figures["turned"]["of"] == 4
    assert figures["speed"]["median"] == 2.0 and figures["speed"]["of"] == 3
    assert figures["speed"]["low"] < 2.0 < figures["speed"]["high"]


def test_each_row_is_drawn_once_and_more_compute_is_later(load):
    draw, models = load("draw"), load("history").MODELS
    rows = [*draw.rows(), *draw.other_steps()]
    assert len({row.name for row in rows}) == len(rows)
    assert {(row.law, row.way) for row in rows} >= {("bounce", "told"), ("straight", "told")}
    assert not any(row.law == "permanence" and row.way == "told" for row in rows)
    assert all(a.operations < b.operations and a.slots < b.slots for a, b in itertools.pairwise(models))


def test_clips_that_are_there_are_not_drawn_again(load, tmp_path, monkeypatch):
    draw = load("draw")
    (row, *_), clips = draw.rows(), np.zeros((3, 17, 64, 64, 3), np.uint8)
    np.savez(tmp_path / f"{row.name}.npz", clips=clips)
    monkeypatch.setattr(draw, "model_of", lambda model: pytest.fail("a model was loaded"))
    assert draw.draw(row, 2, tmp_path).shape == clips[:2].shape


def test_a_clone_without_the_commit_is_told_to_fetch_it(load):
    history = load("draw") and load("history")
    with pytest.raises(UserError, match="at 0000000 .*git fetch --unshallow"):
        history.restore(dataclasses.replace(history.MODELS[0], commit="0000000"))
