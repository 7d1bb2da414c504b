"""experiments/packing: three ways to batch the same stream, and packers that pack everything once."""

import itertools

import numpy as np
import pytest
from helpers.scripts import scripts_of


@pytest.fixture
def load():
    with scripts_of("packing") as load:
        yield load


@pytest.mark.slow
@pytest.mark.parametrize("way", ["padding", "buckets", "packing"])
def test_each_way_keeps_to_its_slots_and_to_the_stream(load, way):
    stream = load("streams").Stream("hostile")
    longest, text_len = (
        max(s.tokens for s in stream.shapes(400)),
        max(s.text_tokens for s in stream.shapes(400)),
    )
    batches = load("ways").batches(stream, way, 4096, longest, text_len, (1024, 128))
    known = {stream[i].patches[0, 0]: stream.shape(i).tokens for i in range(3000)}
    seen = []
    for batch in itertools.islice(batches, 3):
        sequences, slots = batch.segment_ids.shape
        assert sequences * slots <= 4096
        if way == "padding":
            assert slots == longest
        if way == "buckets":
            assert (batch.segment_ids == 1).all()
        for row, segment in itertools.product(range(sequences), range(1, batch.segment_ids.max() + 1)):
            mine = batch.segment_ids[row] == segment
            if mine.any():
                first = batch.patches[row, mine][0, 0]
                assert known[first] == mine.sum()
                seen.append(first)
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("packer", ["first fit", "best fit", "first fit decreasing", "best fit, one closes"])
def test_packers_lay_every_run_once_and_no_row_too_full(load, packer):
    packers = load("packers")
    sizes = [(int(n), int(m)) for n, m in np.random.default_rng(0).integers(1, (101, 21), (300, 2))]
    sequences = list(packers.PACKERS[packer](iter(sizes), packers.Capacity(100, 30, 4), 5))
    assert sorted(size for sequence in sequences for size in sequence) == sorted(sizes)
    for row in sequences:
        assert sum(n for n, _ in row) <= 100 and sum(m for _, m in row) <= 30 and len(row) <= 4
