"""The canvas: the spans that are coded of a clip, the noise level of each cell, and the segments made of it."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from helpers.canvases import make_plain, masks
from hypothesis import given
from hypothesis import strategies as st

from sora_jax.errors import UserError
from sora_jax.tokens.canvas import all_noise_canvas, make_canvas, put_beside, to_segment
from sora_jax.tokens.patches import coordinates, unpatchify
from sora_jax.tokens.spans import FRAMES_PER_LATENT, CausalSpan, frames_shown, split_beside, split_into_spans

# Spans.

strides = st.sampled_from((1, 2, FRAMES_PER_LATENT, 8))


@given(masks, strides)
def test_streams_cover_a_clip_in_lengths_that_the_autoencoder_codes(fixed, stride):
    streams = split_into_spans(fixed, stride)
    assert all((stream.frames - 1) % stride == 0 and stream.stride == stride for stream in streams)
    assert streams[0].begin == 0
    for stream, after in itertools.pairwise(streams):
        assert stream.begin < after.begin <= stream.begin + stream.frames < after.begin + stride
    assert len(fixed) <= streams[-1].begin + streams[-1].frames < len(fixed) + stride


@given(masks, strides)
def test_no_fixed_frame_depends_on_a_painted_one(fixed, stride):
    """What shows it (the last stream that begins by then) shows fixed frames alone, and so does all before in there."""
    streams = split_into_spans(fixed, stride)
    for frame in np.flatnonzero(fixed):
        owner = [stream for stream in streams if stream.begin <= frame][-1]
        for end, shown in zip(owner.ends, frames_shown([owner], len(fixed)), strict=True):
            assert fixed[shown].all()
            if end >= frame:
                assert frame in shown
                break
        else:
            pytest.fail("its stream ends before it")


@given(masks, strides)
def test_latent_frames_are_few(fixed, stride):
    """A group's worth each, but for fewer single frames than that before each fixed part, and the beginnings."""
    streams = split_into_spans(fixed, stride)
    parts = 1 + np.count_nonzero(np.diff(fixed))
    assert sum(len(stream.ends) for stream in streams) <= len(fixed) / stride + (stride + 1) * parts
    if not fixed.any():
        assert streams == [CausalSpan(0, 1 + stride * -(-(len(fixed) - 1) // stride), stride)]


def test_streams_of_what_abilities_give():
    assert split_into_spans([True] + 8 * [False]) == [CausalSpan(0, 9)]
    assert split_into_spans(8 * [False] + [True]) == [CausalSpan(0, 9), CausalSpan(8, 1)]
    assert split_into_spans(6 * [True] + 3 * [False]) == [CausalSpan(0, 1), CausalSpan(1, 9)]
    assert split_into_spans(10 * [True] + 3 * [False], 8) == [CausalSpan(0, 1, 8), CausalSpan(1, 17, 8)]
    assert split_into_spans(3 * [True, False]) == [CausalSpan(0, 5), CausalSpan(2, 5), CausalSpan(4, 5)]


@given(masks, st.integers(0, 100), strides)
def test_a_cell_starts_where_the_noisiest_of_its_pixels_does(fixed, seed, stride):
    T, rng = len(fixed), np.random.default_rng(seed)
    start = rng.random((T, 6, 4)).astype(np.float32) * (rng.random((T, 6, 4)) < 0.3)
    start[fixed] = 0
    streams = split_into_spans(fixed, stride)
    latents = [rng.random((len(stream.ends), 3, 2, 5)) for stream in streams]
    canvas = make_canvas(streams, latents, start, 8.0, (stride, 2, 2))
    assert canvas.stride == stride
    np.testing.assert_allclose(canvas.latent, np.concatenate(latents), atol=1e-6)
    j = 0
    for stream in streams:
        for end in stream.ends:
            group = [end] if end == stream.begin else range(end - stride + 1, end + 1)
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


# Segments.


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


def test_later_conditioning_frames_stand_beside_a_clip():
    """Those in a row as one span, or, where they are many, their first one and the clip's own groups."""
    fixed = np.isin(np.arange(49), (0, 1, 5, 11, 12, 13, *range(22, 49)))
    whole, beside = split_beside(fixed, 8)
    assert whole == CausalSpan(0, 49, 8)
    pairs = (1, 1), (5, 1), (11, 1), (13, 1), (22, 1), (24, 25)
    assert beside == [CausalSpan(begin, frames, 8) for begin, frames in pairs]
    latents = [np.full((len(span.ends), 1, 1, 2), span.begin, np.float32) for span in beside]
    empty = all_noise_canvas(whole, (1, 1), 2, 25.0)
    canvas = put_beside(empty, beside, latents)
    # Of the last span, latent frames of 24, 25-32, 33-40 and 41-48, two are beside the clip and two in it.
    assert canvas.beside.ends.tolist() == [1, 5, 11, 13, 22, 24, 32]
    assert canvas.beside.first.tolist() == 6 * [True] + [False]
    assert canvas.conditioning_frames.tolist() == 5 * [False] + 2 * [True]
    assert canvas.latent[5:].min() == 24 and not empty.latent.any()
    later = canvas.part(slice(3, 7)).crop(0, 0, 1, 1).with_beside()
    assert later.ends.tolist() == [24, 32, 40, 48, 24, 32] and later.beside is None
    assert split_beside(np.zeros(10, bool), 8) == (CausalSpan(0, 17, 8), [])
