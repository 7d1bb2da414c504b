"""Clips to packed sequences and back: what goes in comes out once, and no sequence is too long."""

import dataclasses
import json

import grain
import jax
import numpy as np
import pytest
from helpers.packed import pack_segments, pack_stream
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_jax.errors import UserError
from sora_jax.tokens.packing import (
    PackedBatch,
    Segment,
    active_caption_time,
    unpack,
)


def make_segment(n: int, m: int, number: int = 0) -> Segment:
    """Every value names the segment and the token, so that a swapped or torn segment shows."""
    token, word = np.arange(n, dtype=np.float32), np.arange(m, dtype=np.float32)
    return Segment(
        patches=np.stack([np.full(n, number, np.float32), token], axis=1),
        coords=np.stack([token, token + number, -token, token / 2, token / 4], axis=1),
        init_sigma=np.select([token % 3 == 0, token % 3 == 1], [0, 1], 0.5).astype(np.float32),
        caption_time=np.full(n, number, np.float32),
        text=np.stack([np.full(m, number, np.float32), word, -word], axis=1),
        text_time=word + number,
        key=str(number),
    )


def check_sequences(batch: PackedBatch, segments: dict[int, Segment], max_segments: int) -> list[int]:
    """Holds every row against the segments it says it has; returns their numbers."""
    seen = []
    for row in range(len(batch.patches)):
        ids, text_ids = batch.segment_ids[row], batch.text_segment_ids[row]
        count = ids.max()
        assert count <= max_segments
        assert set(ids) - {0} == set(range(1, count + 1))
        assert set(text_ids) <= set(range(count + 1))
        assert (np.diff(ids[ids > 0]) >= 0).all() and not ids[(ids > 0).sum() :].any()
        for segment_id in range(1, count + 1):
            positions, words = ids == segment_id, text_ids == segment_id
            segment = segments[int(batch.patches[row, positions][0, 0])]
            np.testing.assert_array_equal(batch.patches[row, positions], segment.patches)
            np.testing.assert_array_equal(batch.coords[row, positions], segment.coords)
            np.testing.assert_array_equal(batch.init_sigma[row, positions], segment.init_sigma)
            np.testing.assert_array_equal(batch.conditioning_mask[row, positions], segment.init_sigma == 0)
            entries = batch.condition_ids[row, positions]
            generated = entries[segment.init_sigma > 0]
            assert not entries[segment.init_sigma == 0].any()
            assert (batch.condition_segment_ids[row, generated] == segment_id).all()
            np.testing.assert_array_equal(
                batch.condition_init_sigma[row, generated], segment.init_sigma[segment.init_sigma > 0]
            )
            np.testing.assert_array_equal(
                batch.condition_caption_time[row, generated], segment.caption_time[segment.init_sigma > 0]
            )
            text_entries = batch.text_condition_ids[row, words]
            assert (
                batch.condition_segment_ids[row, text_entries] == (segment_id if generated.size else 0)
            ).all()
            assert (
                generated.size == 0
                or (text_entries[segment.text_time == segment.caption_time[0]] == generated.min()).all()
            )
            np.testing.assert_array_equal(batch.text[row, words], segment.text)
            np.testing.assert_array_equal(batch.text_time[row, words], segment.text_time)
            seen.append(int(segment.key))
        for field in (
            batch.patches,
            batch.coords,
            batch.init_sigma,
            batch.conditioning_mask,
            batch.condition_ids,
        ):
            assert not field[row, ids == 0].any()
        assert not batch.text_condition_ids[row, text_ids == 0].any()
        entries = np.stack(
            [batch.condition_segment_ids, batch.condition_init_sigma, batch.condition_caption_time], -1
        )[row]
        used = entries[entries[:, 0] > 0]
        assert len(np.unique(used, axis=0)) == len(used) <= 2 * count
        assert not entries[0].any() and (used[:, 1] > 0).all()
        assert set(batch.condition_ids[row]) - {0} == set(np.flatnonzero(entries[:, 0]))
        assert not batch.text[row, text_ids == 0].any()
    return seen


sizes = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 12)), min_size=1, max_size=30)


@given(sizes, st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_packing_then_unpacking_gives_every_segment_back_once(sizes, max_segments):
    segments = [make_segment(n, m, number) for number, (n, m) in enumerate(sizes)]
    batch, placements = pack_segments(segments, 40, 12, max_segments, conditions=2 * max_segments)
    assert sorted(check_sequences(batch, dict(enumerate(segments)), max_segments)) == list(
        range(len(segments))
    )
    for segment, place, patches, coords in zip(
        segments, placements, unpack(batch.patches, placements), unpack(batch.coords, placements), strict=True
    ):
        np.testing.assert_array_equal(patches, segment.patches)
        np.testing.assert_array_equal(coords, segment.coords)
        assert (batch.segment_ids[place.row] == place.segment_id).sum() == place.length
    assert all(row.any() for row in batch.segment_ids)


@given(sizes, st.integers(1, 6), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_a_finite_stream_is_packed_whole(sizes, max_segments, window):
    segments = [make_segment(n, m, number) for number, (n, m) in enumerate(sizes)]
    stream = grain.MapDataset.source(segments).to_iter_dataset(grain.ReadOptions(0, 0))
    seen = []
    for batch in pack_stream(
        stream, 40, 12, max_segments, batch_size=3, num_bins=window, segment_conditions=2
    ):
        assert batch.patches.shape == (3, 40, 2) and batch.text.shape == (3, 12, 3)
        assert batch.condition_segment_ids.shape == (3, 2 * max_segments + 1)
        seen += check_sequences(batch, dict(enumerate(segments)), max_segments)
    assert sorted(seen) == list(range(len(segments)))


def test_sequences_are_few_and_can_be_fixed():
    segments = [make_segment(n, 1, n) for n in (10, 30, 20, 40, 1, 19)]
    batch, _ = pack_segments(segments, 40, 8, 8, conditions=16)
    assert len(batch.patches) == 3
    padded, placements = pack_segments(segments, 40, 8, 8, batch_size=5, conditions=16)
    assert len(padded.patches) == 5 and not padded.segment_ids[3:].any()
    assert len(unpack(padded.patches, placements)) == 6
    with pytest.raises(UserError, match="6 segments need 3 sequences, but the batch has 2"):
        pack_segments(segments, 40, 8, 8, batch_size=2, conditions=16)


@pytest.mark.parametrize("n, m", [(41, 1), (1, 13)])
def test_a_segment_longer_than_a_sequence_is_refused(n, m):
    message = f"'7' has {n} tokens and {m} text tokens, but a sequence holds 40 and 12"
    with pytest.raises(UserError, match=message):
        pack_segments([make_segment(3, 3), make_segment(n, m, 7)], 40, 12, 4, conditions=8)
    stream = grain.MapDataset.source([make_segment(3, 3), make_segment(n, m, 7)]).to_iter_dataset(
        grain.ReadOptions(0, 0)
    )
    with pytest.raises(UserError, match=message):
        list(pack_stream(stream, 40, 12, 4, batch_size=1, segment_conditions=2))


def test_a_segment_of_more_conditions_than_a_sequence_is_refused():
    words = dataclasses.replace(make_segment(6, 3, 7), caption_time=np.arange(6, dtype=np.float32))
    assert (make_segment(6, 3).num_conditions, words.num_conditions, make_segment(1, 3).num_conditions) == (
        2,
        4,
        0,
    )
    with pytest.raises(UserError, match="'7' has 4 conditions .*, but it may have 3"):
        pack_segments([words], 40, 12, 4, conditions=3)
    stream = grain.MapDataset.source([words]).to_iter_dataset(grain.ReadOptions(0, 0))
    with pytest.raises(UserError, match="'7' has 4 conditions .*, but it may have 2"):
        list(pack_stream(stream, 40, 12, 4, batch_size=1, segment_conditions=2))


def test_a_sequence_takes_no_more_segments_than_its_table_has_entries():
    segments = [make_segment(6, 2, number) for number in range(5)]
    batch, _ = pack_segments(segments, 40, 12, 8, conditions=4)
    assert sorted(check_sequences(batch, dict(enumerate(segments)), 2)) == list(range(5))
    assert len(batch.patches) == 3 and batch.condition_segment_ids.shape == (3, 5)


@pytest.mark.parametrize(
    ("time", "wanted"), [(-1.0, 1.0), (1.0, 1.0), (1.9, 1.0), (2.0, 2.0), (2.4, 2.0), (9.0, 4.0)]
)
def test_the_words_in_force_are_the_latest_that_have_come(time, wanted):
    assert active_caption_time(np.array([time]), np.array([1.0, 1.0, 4.0, 2.0], np.float32)) == [wanted]
    assert active_caption_time(np.array([time]), np.zeros(0)) == [0.0]


def test_nothing_to_pack_is_refused():
    with pytest.raises(UserError, match="nothing to pack"):
        pack_segments([], 40, 12, 4)
    with pytest.raises(UserError, match="has no tokens"):
        pack_segments([make_segment(0, 3)], 40, 12, 4)


def mixed_sizes(count: int) -> list[tuple[int, int]]:
    """Images and clips of several durations, sizes and shapes, 4 to 250 tokens, with words of 2 to 24 tokens."""
    rng = np.random.default_rng(0)
    tokens = [
        t * y * x for t in range(1, 6) for y, x in ((2, 2), (3, 3), (4, 4), (4, 7), (7, 4), (5, 8), (5, 10))
    ]
    return [(int(rng.choice(tokens)), int(rng.integers(2, 25))) for _ in range(count)]


@pytest.mark.parametrize("seq_len, text_len", [(512, 256), (1024, 512)])
def test_the_mixed_stream_fills_97_percent(seq_len, text_len):
    segments = [make_segment(*size) for size in mixed_sizes(3000)]
    stream = grain.MapDataset.source(segments).repeat().to_iter_dataset(grain.ReadOptions(0, 0))
    batches = iter(
        pack_stream(stream, seq_len, text_len, max_segments=64, batch_size=8, segment_conditions=2)
    )
    fill = np.mean([(next(batches).segment_ids > 0).mean() for _ in range(40)])
    assert fill >= 0.97, f"only {fill:.1%} of the positions are filled"


def test_a_stream_resumes_to_the_bit():
    segments = [make_segment(*size, number) for number, size in enumerate(mixed_sizes(200))]
    stream = (
        grain.MapDataset.source(segments).shuffle(seed=1).repeat().to_iter_dataset(grain.ReadOptions(0, 0))
    )
    batches = pack_stream(stream, 512, 256, max_segments=64, batch_size=3, num_bins=8, segment_conditions=2)
    for taken in (0, 1, 2, 5, 8):
        iterator = iter(batches)
        for _ in range(taken):
            next(iterator)
        state = json.loads(json.dumps(iterator.get_state()))
        wanted = [next(iterator) for _ in range(7)]
        fresh = iter(batches)
        fresh.set_state(state)
        for batch in wanted:
            jax.tree.map(np.testing.assert_array_equal, next(fresh), batch)


def test_a_packed_batch_is_a_pytree():
    batch, _ = pack_segments([make_segment(3, 2)], 8, 4, 2)
    doubled = jax.tree.map(lambda array: array * 2, batch)
    assert isinstance(doubled, PackedBatch) and doubled.segment_ids.max() == 2
    absent = [name for name, value in vars(batch).items() if value is None]
    assert absent == ["extra_channels", "pictures", "picture_segment_ids"]  # which these segments don't have
    assert len(jax.tree.leaves(batch)) == len(dataclasses.fields(PackedBatch)) - len(absent) == 13
