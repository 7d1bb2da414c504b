"""The public API: exact shapes, packed requests equal to solo ones, one compilation, clear refusals, whole files."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from flax import nnx
from helpers.tiny_model import tiny_bundle

from sora_jax.checkpoints.bundle import load_bundle, save_bundle, take_weights
from sora_jax.diffusion.solvers import ODE_SOLVERS, solver_step
from sora_jax.errors import UserError
from sora_jax.media.video import Video
from sora_jax.media.writing import read_metadata
from sora_jax.models.dit import DiT
from sora_jax.pipeline.pipeline import Pipeline, Request, list_models, load


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(tiny_bundle())


REQUESTS = [
    Request("a red circle", duration=1.0, resolution=32, steps=3, seed=1),
    Request("a blue star moves left", duration=1.5, resolution=30, aspect="16:9", fps=6, steps=2, seed=2),
    Request("a ring", duration=0.1, resolution=37, aspect="1:1", steps=3, seed=3),
    Request("two squares", duration=2.0, resolution=16, aspect="9:16", steps=4, guidance=1.0, seed=4),
]


# First, since it drops what was compiled.
def test_one_compilation_serves_all_shapes_and_a_cheaper_one_what_is_not_guided(pipeline):
    solver_step.clear_cache()
    for request in REQUESTS:
        pipeline.generate_batch([dataclasses.replace(request, guidance=2.0 + request.seed)])
    assert solver_step._cache_size() == 1
    for request in REQUESTS:
        pipeline.generate_batch([dataclasses.replace(request, guidance=1.0)])
    assert solver_step._cache_size() == 2


def test_every_output_has_exactly_the_size_rate_and_frames_that_were_asked_for(pipeline):
    videos = pipeline.generate_batch(REQUESTS)
    assert [video.frames.shape for video in videos] == [
        (8, 32, 32, 3),
        (9, 30, 54, 3),
        (1, 37, 38, 3),
        (16, 28, 16, 3),
    ]
    assert [video.fps for video in videos] == [8, 6, 8, 8]


def test_requests_packed_together_equal_each_alone(pipeline):
    together = pipeline.generate_batch(REQUESTS)
    for request, video in zip(REQUESTS, together, strict=True):
        alone = pipeline.generate_batch([request])[0]
        difference = np.abs(video.frames.astype(int) - alone.frames.astype(int))
        assert difference.max() <= 1, request
        assert alone.frames.std() > 0


def test_another_seed_prompt_or_guidance_gives_another_video(pipeline):
    base = pipeline.generate_batch(REQUESTS[:1])[0].frames
    for change in ({"seed": 9}, {"prompt": "a green square"}, {"guidance": 1.0}):
        other = pipeline.generate_batch([dataclasses.replace(REQUESTS[0], **change)])[0].frames
        assert (other != base).any(), change


@pytest.mark.slow
def test_solvers_of_second_order_take_the_same_road_with_smaller_steps_error():
    bundle = tiny_bundle()
    # Random weights turn the finest waves of σ into a road so rough that no solver has an order on it.
    bundle.dit.sigma_in.kernel[...] = 0.0
    pipeline = Pipeline(bundle)
    fields = {"duration": 0.5, "resolution": 16, "seed": 5, "guidance": 2.0}
    exact = pipeline.generate("a ring", steps=64, solver="heun", **fields).frames.astype(float)
    errors = {
        solver: np.abs(pipeline.generate("a ring", steps=6, solver=solver, **fields).frames - exact).mean()
        for solver in ODE_SOLVERS
    }
    better = {solver: error / errors["euler"] for solver, error in errors.items() if solver != "euler"}
    assert len(better) == 3 and max(better.values()) < 0.5, errors


def test_reconstruction_keeps_any_shape(pipeline):
    clip = np.random.default_rng(0).integers(0, 255, (6, 21, 35, 3), np.uint8)
    assert pipeline.reconstruct(Video(clip, 7.0)).frames.shape == clip.shape


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": "  "}, "empty"),
        ({"prompt": "a " * 40}, "shorten"),
        ({"resolution": 80}, "nearest that fits is a resolution of 64"),
        ({"resolution": 512, "duration": 0.125}, "a resolution of"),
        ({"size": (16, 400)}, "nearest that it does well is an aspect ratio of 16:9 at a resolution of 16"),
        ({"duration": -1.0}, "above 0"),
        ({"fps": float("nan")}, "above 0"),
        ({"aspect": "wide"}, "16:9"),
        ({"steps": 0}, "steps=0"),
        ({"solver": "magic"}, "euler, heun"),
        ({"guidance": 1e6}, "guidance=1000000.0 can't be used: give a number from -100 to 100"),
        ({"guidance": float("nan")}, "guidance=nan can't be used"),
    ],
)
def test_what_the_model_cannot_do_is_refused_with_a_way_out(pipeline, fields, words):
    small = {"prompt": "a ring", "resolution": 16}
    with pytest.raises(UserError, match=words):
        pipeline.generate_batch([Request(**(({"prompt": "a ring"} if "size" in fields else small) | fields))])


@pytest.mark.parametrize("aspect", ["1:1", "16:9", "9:21"])
def test_the_nearest_possible_that_a_refusal_names_is_possible_and_the_next_is_not(pipeline, aspect):
    request = Request("a ring", duration=1.0, resolution=96, aspect=aspect, steps=1, guidance=1.0)
    with pytest.raises(UserError) as error:
        pipeline.check(request)
    side = int(str(error.value).split("a resolution of ")[1].rstrip("."))
    with pytest.raises(UserError):
        pipeline.check(dataclasses.replace(request, resolution=side + 2))
    nearest = dataclasses.replace(request, resolution=side)
    pipeline.check(nearest)
    assert pipeline.generate_batch([nearest])[0].frames.shape == (*nearest.shape(), 3)


def test_a_video_longer_than_the_model_sees_at_once_is_filled_in_windows(pipeline):
    """Rows hold ten latent frames of this size, 37 frames; what the first window paints, the next ones keep."""
    request = Request("a ring", duration=8.0, resolution=32, steps=2, seed=1)
    reports: list[tuple[int, int]] = []
    video = pipeline.generate_batch([request], lambda *at: reports.append(at))[0]
    assert video.frames.shape == (64, 32, 32, 3)
    assert reports == [(i, 6) for i in range(7)]
    own = [frames.astype(float).std() for frames in np.split(video.frames, 8)]
    assert min(own) > 0.2 * max(own)
    shorter = pipeline.generate_batch([dataclasses.replace(request, duration=37 / 8)])[0]
    np.testing.assert_array_equal(video.frames[:37], shorter.frames)


def test_a_bundle_comes_back_as_it_was_stored(tmp_path, pipeline):
    save_bundle(pipeline.bundle, tmp_path / "model", dtype="float32")
    video = load(tmp_path / "model").generate("a ring", duration=0.5, resolution=16, steps=2)
    same = pipeline.generate("a ring", duration=0.5, resolution=16, steps=2)
    np.testing.assert_array_equal(video.frames, same.frames)
    assert [entry.kind for entry in list_models([tmp_path])][-1] == "directory"


def test_models_are_listed_as_often_as_one_asks():
    program = (
        "import sora_jax; first = sora_jax.list_models(); import sora_jax.models.dit;"
        "assert first == sora_jax.list_models() == sora_jax.list_models() and first[0].name == 'toyworld';"
        "assert 'models' not in sora_jax.__all__ and sora_jax.models.__name__ == 'sora_jax.models'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_list_of_prompts_gives_a_list_of_videos_that_say_how_they_were_made(pipeline, tmp_path):
    fields = {"num_frames": 5, "width": 24, "height": 16, "steps": 2, "seed": 7}
    videos = pipeline.generate(["a ring", "a star"], **fields)
    assert [video.size for video in videos] == [(16, 24)] * 2 and len(videos[0]) == 5
    alone = pipeline.generate("a star", **fields)
    assert alone.metadata == videos[1].metadata
    assert np.abs(alone.frames.astype(int) - videos[1].frames).max() <= 1
    made = alone.metadata
    assert (made["model"], made["prompt"], made["seed"], made["steps"]) == ("tiny", "a star", "7", "2")
    assert read_metadata(alone.save(tmp_path / "a.mp4")) == made
    assert read_metadata(alone.save(tmp_path / "b.png")) == made
    assert read_metadata(alone.save(tmp_path / "c.mp4", metadata=None)) == {}
    assert read_metadata(alone.save(tmp_path / "d.mp4", metadata={"a": "b"})) == {"a": "b"}
    loop = pipeline.loop(alone, steps=1)
    assert loop.metadata["prompt"] == "" and loop.metadata["guidance"] == "1.0"


def test_training_goes_on_from_a_model_that_lacks_a_layer(tmp_path, pipeline):
    save_bundle(pipeline.bundle, tmp_path / "model", dtype="float32")
    config = dataclasses.replace(pipeline.dit.config, reference_frames=True)
    taken = take_weights(DiT(config, rngs=nnx.Rngs(7)), str(tmp_path / "model"), "dit")
    assert not np.asarray(taken.reference_in.kernel[...]).any()
    np.testing.assert_array_equal(taken.blocks.qkv.kernel[...], pipeline.dit.blocks.qkv.kernel[...])
    narrow = DiT(dataclasses.replace(config, mlp_ratio=3), rngs=nnx.Rngs(7))
    with pytest.raises(UserError, match="another architecture"):
        take_weights(narrow, str(tmp_path / "model"), "dit")


def test_damaged_or_foreign_models_are_refused_in_a_sentence(tmp_path, pipeline):
    with pytest.raises(UserError, match="no model 'nothing'"):
        load("nothing")
    folder = tmp_path / "model"
    save_bundle(pipeline.bundle, folder)
    weights = (folder / "dit.safetensors").read_bytes()
    (folder / "dit.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="cut short"):
        load_bundle(folder)
    (folder / "dit.safetensors").write_bytes(weights)
    config = json.loads((folder / "config.json").read_text())
    config["dit"]["width"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="another architecture"):
        load_bundle(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        load_bundle(folder)
