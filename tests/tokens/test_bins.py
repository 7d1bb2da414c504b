"""The packer: every segment once, no sequence too full, and a state from which it resumes exactly."""

import itertools
import json

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_jax.tokens.bins import MAX_AGE, BestFit

CAPACITY = (10, 4, 3)


def sequences_of(sizes: list[tuple[int, int]], num_bins: int, **options) -> grain.DatasetIterator:
    stream = grain.MapDataset.source(sizes).to_iter_dataset(grain.ReadOptions(0, 0))
    return iter(BestFit(stream, lambda size: (*size, 1), CAPACITY, num_bins, **options))


sizes = st.lists(st.tuples(st.integers(1, 10), st.integers(0, 4)), max_size=40)


@given(sizes, st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_every_segment_is_in_one_sequence_and_none_is_too_full(sizes, num_bins):
    sequences = list(sequences_of(sizes, num_bins))
    assert sorted(size for sequence in sequences for size in sequence) == sorted(sizes)
    for sequence in sequences:
        assert (
            sum(n for n, _ in sequence) <= CAPACITY[0]
            and sum(m for _, m in sequence) <= CAPACITY[1]
            and len(sequence) <= CAPACITY[2]
        )


@given(sizes, st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_it_resumes_from_any_state_with_sequences_of_one_kind(sizes, num_bins):
    one_kind = {"kind_of": lambda size: size[0]}
    sequences = sequences_of(sizes, num_bins, **one_kind)
    states, streamed = [sequences.get_state()], []
    for sequence in sequences:
        streamed.append(sequence)
        states.append(sequences.get_state())
    for place, state in enumerate(json.loads(json.dumps(states))):
        again = sequences_of(sizes, num_bins, **one_kind)
        again.set_state(state)
        assert list(again) == streamed[place:]
        with pytest.raises(StopIteration):
            next(again)
    assert sorted(itertools.chain(*streamed)) == sorted(sizes)
    assert all(len({size[0] for size in sequence}) == 1 for sequence in streamed)


def test_the_fullest_bin_closes_and_others_wait_for_what_fits_them():
    sequences = sequences_of([(6, 0), (7, 0), (8, 0), (4, 0), (9, 0)], num_bins=2)
    assert [sequence[0][0] for sequence in sequences] == [7, 6, 8, 9]
    assert [[n for n, _ in sequence] for sequence in sequences_of([(6, 0), (7, 0), (8, 0), (4, 0)], 2)] == [
        [7],
        [6, 4],
        [8],
    ]


def test_no_bin_waits_for_ever():
    """Nothing ever fits next to the 2, which is never the fullest; its age closes it, and with it what is kept ends."""
    sequences = sequences_of([(2, 4), *[(9, 1)] * 100], num_bins=2)
    place = next(i for i, sequence in enumerate(sequences) if sequence == [(2, 4)])
    assert place == MAX_AGE * 2
    assert len(sequences._states) <= 2 * MAX_AGE


def test_the_first_sequences_are_the_streams_own_mix():
    """Segments of ten fill a sequence by themselves: bins that open slowly don't send them all out first."""
    lengths = np.random.default_rng(0).choice([3, 4, 6, 9, 10], 6000)
    sequences = list(itertools.islice(sequences_of([(int(n), 0) for n in lengths], 200), 50))
    tokens = [n for sequence in sequences for n, _ in sequence]
    share = 10 * tokens.count(10) / sum(tokens)
    assert abs(share - 10 * np.mean(lengths == 10) / lengths.mean()) < 0.12
