"""Windows of a canvas in time, and tiles of its frames: together they are the whole."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers.canvases import make_plain, masks
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_jax.errors import UserError
from sora_jax.tokens.canvas import blend_tiles, temporal_windows, tile_boxes, tile_size


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
