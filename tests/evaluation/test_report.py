"""Evaluation: prompts whose truth is known, figures that count right, videos measured piece by piece."""

import itertools
import json

import numpy as np
import pytest

from sora_jax.errors import UserError
from sora_jax.evaluation import metrics, report
from sora_jax.media.video import Video
from sora_jax.pipeline.pipeline import Request
from sora_jax.toyworld import captions, oracle
from sora_jax.toyworld import scene as world
from sora_jax.toyworld.render import render


class Painter:
    """A model of known skill: paints the scenes of `_examples`, every fourth of them in another's colour and place."""

    name, defaults, stride = "painter", {}, 4

    def __init__(self, scenes=None, error=0):
        self.scenes, self.error, self.pieces, self.checked = scenes or {}, error, [], []

    def check(self, request):
        self.checked.append(request)

    def generate_batch(self, requests, progress=None):
        for step in range(1, 4):
            progress(step, 3)
        return [Video(render(self.scenes[r.prompt, r.seed], *r.shape(), r.fps), r.fps) for r in requests]

    def reconstruct(self, video):
        self.pieces.append(video)
        return Video((video.frames.astype(int) + self.error).clip(0, 255).astype(np.uint8), video.fps)


def _examples(split="heldout", clips=8, seed=0, **fields):
    examples = report._examples(split, [Request("?", **fields)], seed)
    return [next(examples) for _ in range(clips)]


@pytest.mark.parametrize("split", world.SPLITS)
def test_prompts_state_the_truth_of_one_thing_that_moves_straight(split):
    for scene, request in _examples(split, 40):
        (shot,) = scene.shots
        (thing,) = shot.things
        assert (thing.motion, shot.camera.kind, shot.occluder) == ("straight", "still", None)
        assert world.is_heldout(thing) == (split == "heldout")
        if split != "paraphrase":
            for field in ("colours", "shapes", "directions"):
                words = getattr(captions._TRAINING, field)[getattr(thing, field.removesuffix("s"))]
                assert any(word in request.prompt for word in words)
        else:
            assert thing.colour not in request.prompt
        y, x = world.position(thing, np.linspace(0, scene.duration, 5), scene.aspect).T
        (low_y, high_y), (low_x, high_x) = world.room(thing, scene.aspect)
        assert (y > low_y - 1e-6).all() and (y < high_y + 1e-6).all(), "inside is what the truth says"
        assert (x > low_x - 1e-6).all() and (x < high_x + 1e-6).all()


def test_expanded_prompts_ask_for_the_same():
    plain, expanded = (report._examples("validation", [Request("?")], 0, expand) for expand in (False, True))
    for (scene, short), (same, long) in itertools.islice(zip(plain, expanded, strict=False), 8):
        assert scene == same and short.seed == long.seed
        assert long.prompt.lower().startswith(f"{short.prompt}. the ")


def test_a_perfect_painter_is_right_and_an_oblivious_one_is_at_chance():
    clips = 24
    examples = _examples(clips=clips)
    scenes = [scene for scene, _ in examples]
    asked = [(request.prompt, request.seed) for _, request in examples]
    perfect = Painter(dict(zip(asked, scenes)))
    result = report.evaluate_toyworld(perfect, clips=clips)
    for name, row in result["accuracy"].items():
        assert row["of"] == clips and row["right"] >= clips - 1, name
        assert row["low"] < row["share"] <= row["high"] + 1e-9
    assert len(perfect.checked) == clips, "all is checked before the first clip is made"

    oblivious = Painter(dict(zip(asked, scenes[5:] + scenes[:5])))
    result = report.evaluate_toyworld(oblivious, clips=clips)
    accuracy = result["accuracy"]
    for name in ("colour", "shape", "direction", "size", "all"):
        assert 0 < accuracy["colour"]["chance"] < 0.5
        assert accuracy[name]["low"] <= accuracy[name]["chance"] <= accuracy[name]["high"], name
    assert accuracy["count"]["chance"] is None and accuracy["inside"]["chance"] is None
    wrong = [clip for clip in result["clips"] if not clip["right"]["all"]]
    assert wrong and all(
        {k: clip["read"][0][k] for k in ("shape", "colour", "direction")}
        != {k: clip["truth"][k] for k in ("shape", "colour", "direction")}
        for clip in wrong
    )


def test_shapes_are_taken_in_turn_and_counted_apart():
    seen, steps = [], []
    result = report.evaluate_toyworld(
        None,
        split="validation",
        clips=6,
        durations=(2.0, 1.0),
        aspects=("1:1", "16:9"),
        source="truth",
        progress=lambda *at: steps.append(at),
        show=lambda label, videos: seen.append((label, videos)),
    )
    shapes = [(row["frames"], row["width"], row["height"]) for row in result["shapes"]]
    assert shapes == [(16, 64, 64), (16, 114, 64), (8, 64, 64), (8, 114, 64)]
    assert [row["accuracy"]["count"]["of"] for row in result["shapes"]] == [2, 2, 1, 1]
    assert [videos[0].frames.shape[:3] for _, videos in seen[:2]] == [(16, 64, 64), (16, 64, 114)]
    assert seen[0][0].startswith(result["clips"][0]["prompt"])
    assert steps == [(0, 6), *((i, 6) for i in range(6)), (6, 6)]
    assert "steps" not in result["settings"] and result["model"] is None


def test_a_picture_is_not_asked_for_its_direction():
    result = report.evaluate_toyworld(None, clips=3, durations=(0.1,), source="truth")
    assert result["clips"][0]["frames"] == 1
    assert "direction" not in result["accuracy"] and result["accuracy"]["colour"]["of"] == 3


def test_truth_through_the_autoencoder_and_progress_of_a_batch():
    painter, steps = Painter(), []
    result = report.evaluate_toyworld(painter, "validation", clips=2, source="vae")
    assert len(painter.pieces) == 2 and result["accuracy"]["colour"]["right"] == 2
    examples = _examples("validation", 2)
    painter = Painter({(request.prompt, request.seed): scene for scene, request in examples})
    report.evaluate_toyworld(painter, "validation", clips=2, progress=lambda *at: steps.append(at))
    assert steps == [(0, 2), (0, 2), (1, 2), (2, 2), (2, 2)]


def test_the_same_arguments_give_the_same_json():
    first, again = (report.evaluate_toyworld(None, clips=3, source="truth") for _ in range(2))
    assert json.dumps(first, allow_nan=False) == json.dumps(again, allow_nan=False)
    assert first["made_by"]["sora_jax"] and set(first["made_by"]) == {"sora_jax", "commit", "jax", "device"}
    other = report.evaluate_toyworld(None, clips=3, source="truth", seed=1)
    assert [clip["prompt"] for clip in other["clips"]] != [clip["prompt"] for clip in first["clips"]]


@pytest.fixture
def footage(tmp_path):
    rng = np.random.default_rng(0)
    frames = np.repeat(np.repeat(rng.integers(0, 200, (60, 6, 9, 3), np.uint8), 8, 1), 8, 2)
    return Video(frames, 12.0).save(tmp_path / "clip.mp4")


def test_vae_figures_are_of_all_frames_whatever_the_pieces(footage, monkeypatch):
    whole = report.evaluate_vae(Painter(error=10), [footage], resolution=48, seconds=0)
    (row,) = whole["files"]
    assert (row["frames"], row["height"], row["width"], row["source_width"]) == (60, 48, 72, 72)
    assert row["psnr"] == pytest.approx(10 * np.log10(255**2 / 100), abs=0.1)
    monkeypatch.setattr(report, "_PIXELS", 1)
    painter = Painter(error=10)
    pieces = report.evaluate_vae(painter, [footage], resolution=48, seconds=0)["files"][0]
    assert [len(piece) for piece in painter.pieces] == [5] * 12
    assert pieces.pop("notes") == row.pop("notes") == [] and pieces == pytest.approx(row)


def test_vae_says_what_is_wrong_with_a_file(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (60, 48, 64, 3), np.uint8)
    path = Video(noise, 12.0).save(tmp_path / "cut.mp4")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 9000] = bytes(9000)
    path.write_bytes(data)
    (row,) = report.evaluate_vae(Painter(error=1), [path], resolution=48, seconds=0)["files"]
    assert len(row["notes"]) == 1 and "cut.mp4 is damaged: " in row["notes"][0]
    (row,) = report.evaluate_vae(Painter(error=1), [path], resolution=48, seconds=0.5)["files"]
    assert row["notes"] == []


def test_vae_scales_crops_and_starts_where_asked(footage, tmp_path):
    picture = Video(np.full((1, 50, 71, 3), 90, np.uint8), 1.0).save(tmp_path / "picture.png")
    painter, shown, steps = Painter(error=1), [], []
    result = report.evaluate_vae(
        painter,
        [footage, picture],
        resolution=33,
        seconds=1.0,
        start=0.0,
        progress=lambda *at: steps.append(at),
        show=lambda label, pair: shown.append((label, pair)),
    )
    assert [(row["frames"], row["height"], row["width"]) for row in result["files"]] == [
        (12, 32, 50),
        (1, 32, 46),
    ]
    assert result["files"][1]["psnr"] == pytest.approx(48.13, abs=0.01)
    mean = np.mean([row["psnr"] for row in result["files"]])
    assert result["mean"]["psnr"] == pytest.approx(mean)
    assert steps == [(0, 13), (12, 13), (13, 13)]
    assert shown[1][0].startswith("picture.png: 48.13 dB") and len(shown[1][1]) == 2

    late = Painter()
    report.evaluate_vae(late, [footage], resolution=48, seconds=0.5, start=2.0)
    true = report.evaluate_vae(Painter(), [footage], resolution=48)
    assert true["files"][0]["psnr"] is None and true["mean"]["psnr"] is None, "nothing lost has no decibels"
    assert [len(piece) for piece in late.pieces] == [6]
    early = Painter()
    report.evaluate_vae(early, [footage], resolution=48, seconds=0)
    np.testing.assert_array_equal(late.pieces[0].frames, early.pieces[0].frames[24:30])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: report.evaluate_vae(Painter(), []), "no file"),
        (lambda: report.evaluate_vae(Painter(), ["nowhere.mp4"]), "no file nowhere.mp4"),
        (lambda: report.evaluate_vae(Painter(), ["x"], resolution=2), "at least 16"),
        (lambda: report.evaluate_toyworld(None, clips=1), "without a model"),
        (lambda: report.evaluate_toyworld(None, clips=0, source="truth"), "At least one clip"),
        (lambda: report.evaluate_toyworld(None, source="hearsay"), "hearsay"),
        (lambda: report.evaluate_toyworld(None, split="tests", source="truth"), "no split 'tests'"),
    ],
)
def test_bad_arguments_get_a_sentence(call, words):
    with pytest.raises(UserError, match=words):
        call()


def test_a_start_past_the_end_is_told(footage):
    with pytest.raises(UserError, match="clip.mp4 has no frame at 9 seconds"):
        report.evaluate_vae(Painter(), [footage], start=9.0)


def test_perfect_readings_are_what_the_oracle_reads():
    for scene, request in _examples(clips=3):
        video = Video(render(scene, *request.shape(), request.fps), request.fps)
        truth, read = report._perfect_reading(scene, request), oracle.read(video)
        names = ("shape", "colour", "size", "direction", "motion", "inside", "reappears")
        (a,), (b,) = truth.things, read.things
        assert {n: getattr(a, n) for n in names} == {n: getattr(b, n) for n in names}
        assert metrics.psnr(video.frames, video.frames) == np.inf
