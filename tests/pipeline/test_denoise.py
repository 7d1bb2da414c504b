"""Canvases filled by a model: what is given stays as it was coded, whatever is generated around it, in any windows."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from flax import nnx
from helpers.tiny_model import tiny_bundle

from sora_jax.checkpoints.components import Limits
from sora_jax.diffusion.solvers import solver_step
from sora_jax.errors import UserError
from sora_jax.models.vae import VAE
from sora_jax.pipeline import sketches
from sora_jax.pipeline.denoise import denoise
from sora_jax.pipeline.job import Job
from sora_jax.pipeline.settings import Settings
from sora_jax.pipeline.storyboard import Card, Storyboard, storyboard
from sora_jax.pipeline.vae_processor import SEAM_FRAMES, VaeProcessor
from sora_jax.tokens.canvas import Canvas, Sketch, temporal_windows


def clip(frames: int, seed: int = 0, height: int = 32, width: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), np.uint8)


def gaps(frames: int, *missing: int) -> np.ndarray:
    return np.isin(np.arange(frames), missing)


def board(engine: VaeProcessor) -> Job:
    """Two cards with pictures and one with a clip, over words that change."""
    cards = (
        Card(0.0, "a red ring", image=clip(1, 1)[0]),
        Card(0.5, "a blue star", image=clip(1, 2)[0]),
        Card(1.0, "", clip=clip(6, 3)),
        Card(2.0, "a green square moves"),
    )
    return storyboard(engine, Storyboard(cards, duration=3.0, fps=8.0, resolution=16, aspect=0.5))


PICTURES = {number: clip(1, number)[0] for number in (0, 4, 5, 9, 12)}
SKETCHES = {
    "text to video": sketches.all_noise((17, 32, 16), 8.0),
    "an image comes alive": sketches.animate({0: PICTURES[0]}, (11, 32, 16), 8.0),
    "an image is the last frame": sketches.animate({12: PICTURES[12]}, (13, 32, 16), 8.0),
    "an image is in the middle": sketches.animate({9: PICTURES[9]}, (23, 32, 16), 8.0),
    "several images": sketches.animate(PICTURES, (15, 32, 16), 8.0),
    "extended": sketches.extend(clip(6), 20, 8.0),
    "extended backward": sketches.extend(clip(7), 9, 8.0, backward=True),
    "a gap is filled": sketches.fill(clip(18), gaps(18, *range(4, 15)), 8.0),
    "gaps and an edge are filled": sketches.fill(clip(18), gaps(18, 0, 3, 4, 9, 10, 11, 12, 17), 8.0),
    "smooth": sketches.smooth(clip(5), 3, 24.0),
    "very smooth": sketches.smooth(clip(3), 6, 48.0),
    "connected": sketches.connect(clip(5), clip(7, 1), 16, 8.0),
    "connected from a cross-fade": sketches.connect(clip(8), clip(2, 1), 15, 8.0, strength=0.8),
    "looped": sketches.loop(clip(9), 12, 5, 8.0),
    "blended": sketches.blend(clip(23, 0, 16, 16), clip(23, 1, 16, 16), np.linspace(0, 1, 23), 8.0, 0.6),
    "inpainted from the fourth frame on": sketches.inpaint(
        clip(18), np.arange(18 * 32 * 16).reshape(18, 32, 16) >= 3 * 32 * 16 + 200, 8.0
    ),
    "outpainted": sketches.outpaint(clip(17, height=16), (32, 16), 8.0),
    "edited": sketches.edit(clip(18, height=12, width=31), 0.6, 8.0),
    "all is given": sketches.edit(clip(7), 0.0, 8.0),
}
SHORT, LONG = Limits(tokens=40, text=12, text_len=24), Limits(tokens=6, text=12, text_len=24)
MANY = {"all is given": 0}
SETTINGS = Settings(steps=2, guidance=1.0)


@pytest.fixture(scope="module")
def engine() -> VaeProcessor:
    # Plain attention compiles in half the time; test_pipeline.py has this machine's own.
    fields = {"absolute": True, "pooled_text": True, "reference_frames": True, "attention": "reference"}
    return VaeProcessor(tiny_bundle(SHORT, **fields))


@pytest.fixture(scope="module")
def narrow(engine) -> VaeProcessor:
    """The same model in sequences of six tokens: three latent frames of 32×16 pixels."""
    return VaeProcessor(dataclasses.replace(engine.bundle, limits=LONG))


def decode_floats(model: VaeProcessor, *arguments: Any, **keywords: Any) -> np.ndarray:
    return np.stack(list(model.decode_frames(*arguments, **keywords)))


def pieces(fixed: np.ndarray) -> list[slice]:
    """The parts of a clip that are given."""
    edges = np.flatnonzero(np.diff(np.pad(fixed.astype(int), 1)))
    return [slice(begin, end) for begin, end in edges.reshape(-1, 2)]


def jobs(model: VaeProcessor) -> list[Job]:
    """One of every ability, at different shapes, settings and words."""
    out = []
    for number, sketch in enumerate([*SKETCHES.values(), board(model).sketch]):
        words = (((0.0, "a ring"),), ((0.0, "a red star"), (0.7, "a blue one")), ())[number % 3]
        own = Settings(seed=number, steps=2 + number % 2, guidance=1.0 + number % 2)
        out.append(Job(sketch, words, own))
    return out


def denoised(model: VaeProcessor, jobs: list[Job], *progress: Any) -> list[Canvas]:
    return denoise(model, jobs, [model.prepare_latents(job.sketch) for job in jobs], *progress)


# These two come first: they drop what was compiled.


def test_a_batch_that_mixes_all_abilities_at_different_shapes_compiles_once(engine):
    all_at_once = jobs(engine)
    solver_step.clear_cache()
    denoised(engine, all_at_once)
    assert solver_step._cache_size() == 1
    denoised(engine, all_at_once[::-1][:-1])
    assert solver_step._cache_size() == 1


def test_the_windows_of_a_long_video_compile_once(narrow):
    solver_step.clear_cache()
    for number in (1, 2, 8):
        denoised(narrow, [jobs(narrow)[number]])
    assert solver_step._cache_size() == len(
        {1 + number % 2 for number in (1, 2, 8)}
    )  # with guidance or without


@pytest.mark.parametrize("windows", ["one window", "many windows"])
@pytest.mark.parametrize("ability", [*SKETCHES, "a storyboard"])
def test_what_is_given_is_the_autoencoders_own_reconstruction_of_it(ability, windows, engine, narrow):
    model = engine if windows == "one window" else narrow
    sketch = board(model).sketch if ability == "a storyboard" else SKETCHES[ability]
    shape = sketch.frames.shape[:3]
    before = model.prepare_latents(sketch)
    (after,) = denoise(model, [Job(sketch, ((0.0, "a ring"),), SETTINGS)], [before])
    assert windows == "one window" or len(temporal_windows(before, 3, 1)) >= MANY.get(ability, 2)
    generated = decode_floats(model, after, *shape, generated=before.init_sigma.any((1, 2)))
    coded = decode_floats(model, before, *shape)
    np.testing.assert_array_equal(generated[sketch.conditioning_frames], coded[sketch.conditioning_frames])
    np.testing.assert_array_equal(after.latent[before.init_sigma == 0], before.latent[before.init_sigma == 0])
    for piece in pieces(sketch.conditioning_frames):
        alone = Sketch(sketch.frames[piece], sketch.strength[piece], sketch.fps)
        own = decode_floats(model, model.prepare_latents(alone), len(alone.frames), *shape[1:])
        assert np.abs(generated[piece] - own).max() < 1e-4
        assert own.std() > 0.01
    changed = np.abs(after.latent - before.latent).max(-1) > 1e-3
    np.testing.assert_array_equal(changed, before.init_sigma > 0)
    assert np.isfinite(generated).all()


def test_a_seam_is_taken_up_over_the_painted_frames_before_it(engine):
    sketch = sketches.connect(
        clip(5), clip(7, 1), 11, 8.0
    )  # the last group shows the second clip's first frame too
    before = engine.prepare_latents(sketch)
    (after,) = denoise(engine, [Job(sketch, (), SETTINGS)], [before])
    shape = sketch.frames.shape[:3]
    plain = decode_floats(engine, after, *shape)
    moved = decode_floats(engine, after, *shape, generated=before.init_sigma.any((1, 2))) - plain
    assert not moved[:8].any() and not moved[16:].any()
    inside = np.abs(plain[8:16] + moved[8:16]).max(0) < 0.999  # what is clipped aside
    long, short = (
        moved[16 - frames][inside] for frames in SEAM_FRAMES
    )  # low frequencies from the first on, high ones from here
    low = long * 9
    high = (short - low * 6 / 9) * 4
    for frame in range(8, 16):
        wanted = low * (frame - 7) / 9 + high * max(frame - 12, 0) / 4
        np.testing.assert_allclose(moved[frame][inside], wanted, atol=1e-4)
    assert np.abs(low).max() > 1e-3 and np.abs(high).max() > 1e-3


@pytest.mark.parametrize("windows", ["one window", "many windows"])
def test_the_results_of_a_batch_are_those_of_each_alone(windows, engine, narrow):
    model = engine if windows == "one window" else narrow
    all_at_once = jobs(model)
    reports: list[tuple[int, int]] = []
    together = denoised(model, all_at_once, lambda *at: reports.append(at))
    assert reports == sorted(reports) and reports[-1][0] == reports[-1][1]
    for job, ours in zip(all_at_once, together, strict=True):
        (alone,) = denoised(model, [job])
        shape = int(ours.ends.max()) + 1, *(8 * side for side in ours.grid[1:])
        videos = [model.decode_latents(canvas, *shape).astype(int) for canvas in (ours, alone)]
        assert np.abs(videos[0] - videos[1]).max() <= 1
        assert videos[0].std() > 1


def test_patches_of_two_latent_frames_fill_videos_of_any_length():
    model = VaeProcessor(tiny_bundle(Limits(tokens=4, text=12, text_len=24), patch=(2, 2, 2)))
    for sketch in (SKETCHES["text to video"], SKETCHES["an image comes alive"], SKETCHES["edited"]):
        before = model.prepare_latents(sketch)
        assert len(before) % 2 == 0
        (after,) = denoise(model, [Job(sketch, (), SETTINGS)], [before])
        generated = decode_floats(model, after, *sketch.frames.shape[:3])
        coded = decode_floats(model, before, *sketch.frames.shape[:3])
        np.testing.assert_array_equal(
            generated[sketch.conditioning_frames], coded[sketch.conditioning_frames]
        )
        assert np.isfinite(generated).all() and (generated != coded).any()


def test_frames_of_which_no_two_fit_a_row_are_refused(narrow):
    sketch = sketches.all_noise((5, 32, 64), 8.0)
    with pytest.raises(UserError, match="Frames of 8 tokens are more than .* holds in a sequence of 6"):
        denoised(narrow, [Job(sketch)])


@pytest.mark.parametrize("strides", [((2, 2, 2), (1, 2, 2), (1, 2, 2)), ((2, 2, 2),) * 3])
def test_an_autoencoder_of_other_groups_serves_the_same_canvases(strides, engine):
    """Groups of two and of eight frames: what is given is the reconstruction of what was encoded, at its own time."""
    config = dataclasses.replace(engine.vae.config, strides=strides)
    vae = VAE(config, rngs=nnx.Rngs(0))
    model = VaeProcessor(dataclasses.replace(engine.bundle, vae=vae))
    stride = math.prod(time for time, _, _ in strides)
    assert model.stride == stride
    for ability in ("an image is in the middle", "extended backward", "connected"):
        sketch = SKETCHES[ability]
        before = model.prepare_latents(sketch)
        assert before.stride == stride
        (after,) = denoise(model, [Job(sketch, (), SETTINGS)], [before])
        shape = sketch.frames.shape[:3]
        generated, coded = (decode_floats(model, canvas, *shape) for canvas in (after, before))
        fixed = sketch.conditioning_frames
        np.testing.assert_array_equal(generated[fixed], coded[fixed])
        assert np.isfinite(generated).all() and (generated[~fixed] != coded[~fixed]).any()
        for part in pieces(fixed):
            alone = Sketch(sketch.frames[part], sketch.strength[part], sketch.fps)
            own = decode_floats(model, model.prepare_latents(alone), *alone.frames.shape[:3])
            np.testing.assert_allclose(coded[part], own, atol=1e-5)
