"""The canvas: what is given stays as it was coded, whatever is generated around it, in however many windows."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from helpers.tiny_model import tiny_bundle
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_jax.checkpoints.bundle import Limits
from sora_jax.diffusion.solvers import solver_step
from sora_jax.errors import UserError
from sora_jax.models.vae import VAE
from sora_jax.pipeline import sketches
from sora_jax.pipeline.denoise import denoise
from sora_jax.pipeline.job import Job
from sora_jax.pipeline.settings import Settings
from sora_jax.pipeline.storyboard import Card, Storyboard, storyboard
from sora_jax.pipeline.vae_processor import SEAM_FRAMES, VaeProcessor
from sora_jax.tokens.canvas import (
    FRAMES_PER_LATENT,
    Canvas,
    CausalSpan,
    Sketch,
    blend_tiles,
    frames_shown,
    make_canvas,
    split_into_spans,
    temporal_windows,
    tile_boxes,
    tile_size,
    to_segment,
)
from sora_jax.tokens.patches import coordinates, unpatchify

masks = st.lists(st.booleans(), min_size=1, max_size=40).map(np.array)


def make_plain(start: np.ndarray, ends: np.ndarray | None = None, fps: float = 8.0) -> Canvas:
    """A canvas of one stream, whose every number is another one."""
    t, y, x = start.shape
    latent = np.arange(t * y * x * 3, dtype=np.float32).reshape(t, y, x, 3)
    ends = FRAMES_PER_LATENT * np.arange(t) if ends is None else ends
    return Canvas(latent, start.astype(np.float32), ends, np.arange(t) == 0, fps)


# Streams.


@given(masks)
def test_streams_cover_a_clip_in_lengths_that_the_autoencoder_codes(fixed):
    streams = split_into_spans(fixed)
    assert all(stream.frames % FRAMES_PER_LATENT == 1 for stream in streams)
    assert streams[0].begin == 0
    for stream, after in itertools.pairwise(streams):
        assert stream.begin < after.begin <= stream.begin + stream.frames < after.begin + FRAMES_PER_LATENT
    assert len(fixed) <= streams[-1].begin + streams[-1].frames < len(fixed) + FRAMES_PER_LATENT


@given(masks)
def test_no_fixed_frame_depends_on_a_painted_one(fixed):
    """What shows it (the last stream that begins by then) shows fixed frames alone, and so does all before in there."""
    streams = split_into_spans(fixed)
    for frame in np.flatnonzero(fixed):
        owner = [stream for stream in streams if stream.begin <= frame][-1]
        for end, shown in zip(owner.ends, frames_shown([owner], len(fixed)), strict=True):
            assert fixed[shown].all()
            if end >= frame:
                assert frame in shown
                break
        else:
            pytest.fail("its stream ends before it")


@given(masks)
def test_latent_frames_are_few(fixed):
    """A group's worth each, but for up to three single frames before each fixed part and the beginnings."""
    streams = split_into_spans(fixed)
    parts = 1 + np.count_nonzero(np.diff(fixed))
    assert sum(len(stream.ends) for stream in streams) <= len(fixed) / FRAMES_PER_LATENT + 4 * parts
    if not fixed.any():
        assert streams == [CausalSpan(0, 1 + FRAMES_PER_LATENT * -(-(len(fixed) - 1) // FRAMES_PER_LATENT))]


def test_streams_of_what_abilities_give():
    assert split_into_spans([True] + 8 * [False]) == [CausalSpan(0, 9)]
    assert split_into_spans(8 * [False] + [True]) == [CausalSpan(0, 9), CausalSpan(8, 1)]
    assert split_into_spans(6 * [True] + 3 * [False]) == [CausalSpan(0, 1), CausalSpan(1, 9)]
    assert split_into_spans(3 * [True, False]) == [CausalSpan(0, 5), CausalSpan(2, 5), CausalSpan(4, 5)]


@given(masks, st.integers(0, 100))
def test_a_cell_starts_where_the_noisiest_of_its_pixels_does(fixed, seed):
    T, rng = len(fixed), np.random.default_rng(seed)
    start = rng.random((T, 6, 4)).astype(np.float32) * (rng.random((T, 6, 4)) < 0.3)
    start[fixed] = 0
    streams = split_into_spans(fixed)
    latents = [rng.random((len(stream.ends), 3, 2, 5)) for stream in streams]
    canvas = make_canvas(streams, latents, start, 8.0, (FRAMES_PER_LATENT, 2, 2))
    np.testing.assert_allclose(canvas.latent, np.concatenate(latents), atol=1e-6)
    j = 0
    for stream in streams:
        for end in stream.ends:
            group = [end] if end == stream.begin else range(end - 3, end + 1)
            pixels = np.stack([start[min(frame, T - 1)] for frame in group])
            for y, x in np.ndindex(3, 2):
                assert canvas.init_sigma[j, y, x] == pixels[:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].max()
            assert canvas.ends[j] == end and canvas.first[j] == (end == stream.begin)
            j += 1
    assert [part.stop - part.start for part in canvas.spans()] == [len(stream.ends) for stream in streams]
    # Each fixed frame has a latent frame that is given, and no other is if another pixel is above 0.
    shown = frames_shown(streams, T)
    assert all(
        (start[own] == 0).all() == given for own, given in zip(shown, canvas.conditioning_frames, strict=True)
    )
    assert set(np.flatnonzero(fixed)) <= {
        f for own, g in zip(shown, canvas.conditioning_frames, strict=True) if g for f in own
    }


# Runs.


def test_a_window_is_a_run_whose_time_begins_at_its_earliest_frame():
    streams = split_into_spans(np.isin(np.arange(21), (0, 6, 7, 8, 9, 10, 20)))
    latents = [np.zeros((len(stream.ends), 4, 6, 3), np.float32) for stream in streams]
    whole = make_canvas(streams, latents, np.ones((21, 32, 48), np.float32), 8.0, (4, 8, 8))
    assert whole.ends.tolist() == [0, 4, 8, 6, 10, 14, 18, 22, 20]
    part = whole.part(slice(2, 7)).crop(2, 2, 2, 4)
    segment = to_segment(part, (1, 2, 2), np.zeros((0, 6)), np.zeros(0))
    coords = segment.coords.reshape(5, 1, 2, 5)
    np.testing.assert_allclose(coords[:, 0, 0, 0], (np.array([8, 6, 10, 14, 18]) - 6) / 8)
    np.testing.assert_allclose(coords[:, 0, 0, 3], np.array([4, 0, 4, 4, 4]) / 8)
    own = coordinates((5, 4, 6), (1, 2, 2), 8.0).reshape(5, 2, 3, 5)
    np.testing.assert_allclose(coords[..., 1:3], own[:, 1:, 1:, 1:3], atol=1e-6)
    np.testing.assert_allclose(coords[..., 4], own[:, 1:, 1:, 4])


WORDS = np.repeat([0.0, 1.0, 2.0, 4.0], 2).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_words_that_hold_before_a_window_are_left_out_and_the_rest_told_in_its_time(dtype):
    canvas = make_plain(np.ones((10, 1, 1)), fps=7.0)  # at 0, 4/7, … 36/7 seconds
    text = np.arange(16.0).reshape(8, 2)
    segment = to_segment(canvas, (1, 1, 1), text, WORDS.astype(dtype))
    np.testing.assert_array_equal(segment.text_time, WORDS)
    np.testing.assert_array_equal(segment.caption_time, [0, 0, 1, 1, 2, 2, 2, 4, 4, 4])

    segment = to_segment(canvas.part(slice(3, 6)), (1, 1, 1), text, WORDS.astype(dtype))  # 12/7 … 20/7
    np.testing.assert_array_equal(segment.text, text[2:])
    np.testing.assert_allclose(segment.text_time, np.repeat([0, 2 - 12 / 7, 4 - 12 / 7], 2), rtol=1e-6)
    assert segment.caption_time.tolist() == segment.text_time[[0, 2, 2]].tolist(), (
        "found by their time: to the bit"
    )
    assert segment.num_conditions == 2


def test_two_cards_that_hold_at_a_windows_beginning_are_kept_apart():
    """A stream's last frame may lie behind the next one's first."""
    canvas = make_plain(np.ones((3, 1, 1)), ends=np.array([8, 6, 10]))
    segment = to_segment(canvas, (1, 1, 1), np.zeros((2, 3)), np.array([0.0, 0.9], np.float32))
    np.testing.assert_allclose(segment.text_time, [0, 0.15], atol=1e-6)
    assert segment.caption_time.tolist() == segment.text_time[[1, 0, 1]].tolist()


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2), (2, 2, 3)])
def test_a_run_of_patches_goes_back_into_its_canvas(patch):
    start = np.random.default_rng(0).random((4, 4, 6)).round(1)
    canvas = make_plain(start)
    segment = to_segment(canvas, patch, np.zeros((0, 6)), np.zeros(0))
    np.testing.assert_array_equal(unpatchify(segment.patches, canvas.grid, patch), canvas.latent)
    t, y, x = (side // by for side, by in zip(canvas.grid, patch, strict=True))
    blocks = canvas.init_sigma.reshape(t, patch[0], y, patch[1], x, patch[2]).max((1, 3, 5))
    np.testing.assert_array_equal(segment.init_sigma, blocks.ravel())


def test_patches_of_several_frames_hold_no_clip_in_the_middle():
    canvas = dataclasses.replace(make_plain(np.ones((4, 2, 2))), first=np.array([True, False, True, False]))
    with pytest.raises(UserError, match="use dit.patch"):
        to_segment(canvas, (2, 1, 1), np.zeros((0, 6)), np.zeros(0))


# Windows.


@given(masks, st.integers(2, 12), st.data())
@settings(max_examples=200)
def test_windows_fill_every_open_frame_once_from_what_is_known(known, most, data):
    by = data.draw(st.integers(1, 2))
    context = data.draw(st.integers(1, most - 1))
    canvas = make_plain(np.repeat(~known, by)[:, None, None])
    found = temporal_windows(canvas, most * by, context * by, by)
    if known.all():
        assert found == []
        return
    if len(known) <= most:
        assert found == [(slice(0, len(canvas)), slice(0, len(canvas)))]
        return
    done = canvas.conditioning_frames.copy()
    for number, (seen, new) in enumerate(found):
        assert all(edge % by == 0 for edge in (seen.start, seen.stop, new.start, new.stop))
        assert 0 < seen.stop - seen.start <= most * by
        assert seen.start <= new.start < new.stop <= seen.stop <= len(canvas)
        fresh = np.zeros(len(canvas), bool)
        fresh[new] = ~canvas.conditioning_frames[new]
        assert fresh.any(), "given frames are new alone"
        assert not (fresh & done).any() or canvas.conditioning_frames[new].any(), "filled twice"
        assert not (fresh & done & ~canvas.conditioning_frames).any(), "filled twice"
        assert (done | fresh)[seen].all(), "seen, but neither known nor filled"
        if canvas.conditioning_frames.any() or number:
            first = int(canvas.conditioning_frames.argmax())
            if new.start >= first:
                behind = slice(max(np.flatnonzero(fresh)[0] - context * by, first), np.flatnonzero(fresh)[0])
            else:
                last = np.flatnonzero(fresh)[-1] + 1
                behind = slice(last, min(last + context * by, len(canvas)))
            assert done[behind].all() and seen.start <= behind.start < behind.stop <= seen.stop
        done |= fresh
    assert done.all()


def test_windows_walk_away_from_what_is_given():
    parts = lambda known: [
        (seen.start, seen.stop, new.start, new.stop)
        for seen, new in temporal_windows(make_plain(~np.isin(np.arange(9), known)[:, None, None]), 4, 2)
    ]
    forward = [(0, 4, 1, 4), (2, 6, 4, 6), (4, 8, 6, 8), (6, 9, 8, 9)]
    assert parts([0]) == forward
    assert parts([]) == [(0, 4, 0, 4), *forward[1:]]
    assert parts([8]) == [(9 - b, 9 - a, 9 - d, 9 - c) for a, b, c, d in forward]
    assert parts([4]) == [(4, 8, 5, 8), (6, 9, 8, 9), (2, 6, 2, 4), (0, 4, 0, 2)]
    assert parts(range(9)) == []
    with pytest.raises(UserError, match="can't have 4 of context"):
        temporal_windows(make_plain(np.ones((9, 1, 1))), 4, 4)


space = st.tuples(*[st.integers(1, 30)] * 2, *[st.integers(1, 3)] * 2, st.integers(1, 120))


@given(space)
def test_windows_of_a_frame_cover_it_and_overlap(drawn):
    y, x, py, px, most = drawn
    sides, patch = (y * py, x * px), (1, py, px)
    places = tile_boxes(sides, patch, most)
    height, width = tile_size((1, *sides), patch, most)
    assert (height // py) * (width // px) <= most or (height, width) == sides == (py, px)
    covered = np.zeros(sides, int)
    for top, left, *own in places:
        assert own == [height, width] and top % py == left % px == 0
        assert 0 <= top <= sides[0] - height and 0 <= left <= sides[1] - width
        covered[top : top + height, left : left + width] += 1
    assert covered.min() == 1 and (len(places) == 1) == (y * x <= most)
    for axis, size, by in ((0, height, py), (1, width, px)):
        starts = sorted({place[axis] for place in places})
        for before, after in itertools.pairwise(starts):
            assert before + size - after >= (size / 3 if size > by else 0)


@given(space, st.integers(0, 100))
def test_windows_cut_from_one_frame_blend_to_it_again(drawn, seed):
    y, x, py, px, most = drawn
    whole = np.random.default_rng(seed).standard_normal((2, y * py, x * px, 3)).astype(np.float32)
    places = tile_boxes(whole.shape[1:3], (1, py, px), most)
    cut = [whole[:, top : top + height, left : left + width] for top, left, height, width in places]
    np.testing.assert_allclose(blend_tiles(cut, places, whole.shape[1:3]), whole, atol=1e-5)


# With a model.


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
    return VaeProcessor(tiny_bundle(SHORT, absolute=True, pooled_text=True, reference_frames=True))


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


def test_an_autoencoder_of_other_groups_is_refused():
    bundle = tiny_bundle(SHORT)
    strides = ((2, 2, 2), (1, 2, 2), (1, 2, 2))
    config = dataclasses.replace(bundle.vae.config, strides=strides)
    vae = jax.eval_shape(lambda: VAE(config, rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match="show 2 video frames, and canvases need 4"):
        VaeProcessor(dataclasses.replace(bundle, vae=vae))
