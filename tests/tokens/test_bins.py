"""The packer: every run once, no row too full, and a state that says exactly where it was."""

import itertools
import json

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_jax.tokens.bins import AGE, BestFit

ROOM = (10, 4, 3)


def rows_of(sizes: list[tuple[int, int]], window: int) -> grain.DatasetIterator:
    stream = grain.MapDataset.source(sizes).to_iter_dataset(grain.ReadOptions(0, 0))
    return iter(BestFit(stream, lambda size: (*size, 1), ROOM, window))


sizes = st.lists(st.tuples(st.integers(1, 10), st.integers(0, 4)), max_size=40)


@given(sizes, st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_every_run_lies_in_one_row_and_no_row_is_too_full(sizes, window):
    rows = list(rows_of(sizes, window))
    assert sorted(size for row in rows for size in row) == sorted(sizes)
    for row in rows:
        assert sum(n for n, _ in row) <= ROOM[0] and sum(m for _, m in row) <= ROOM[1] and len(row) <= ROOM[2]


@given(sizes, st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_it_goes_on_from_anywhere(sizes, window):
    rows = rows_of(sizes, window)
    states, told = [rows.get_state()], []
    for row in rows:
        told.append(row)
        states.append(rows.get_state())
    for place, state in enumerate(json.loads(json.dumps(states))):
        again = rows_of(sizes, window)
        again.set_state(state)
        assert list(again) == told[place:]
        with pytest.raises(StopIteration):
            next(again)


def test_the_fullest_row_closes_and_others_wait_for_what_fits_them():
    rows = rows_of([(6, 0), (7, 0), (8, 0), (4, 0), (9, 0)], window=2)
    assert [row[0][0] for row in rows] == [7, 6, 8, 9]
    assert [[n for n, _ in row] for row in rows_of([(6, 0), (7, 0), (8, 0), (4, 0)], 2)] == [[7], [6, 4], [8]]


def test_no_row_waits_for_ever():
    """Nothing ever fits beside the 2, which is never the fullest; its age closes it, and with it what is kept ends."""
    rows = rows_of([(2, 4), *[(9, 1)] * 100], window=2)
    place = next(i for i, row in enumerate(rows) if row == [(2, 4)])
    assert place == AGE * 2
    assert len(rows._states) <= 2 * AGE


def test_the_first_rows_are_the_streams_own_mix():
    """Runs of ten fill a row by themselves: the large window that opens slowly doesn't send them all out first."""
    lengths = np.random.default_rng(0).choice([3, 4, 6, 9, 10], 6000)
    rows = list(itertools.islice(rows_of([(int(n), 0) for n in lengths], 200), 50))
    tokens = [n for row in rows for n, _ in row]
    share = 10 * tokens.count(10) / sum(tokens)
    assert abs(share - 10 * np.mean(lengths == 10) / lengths.mean()) < 0.12
