"""Clips to rows and back: what goes in comes out once, and no row is longer than it may be."""

import json

import grain
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_jax.data.packing import (
    PackedBatch,
    Run,
    coordinates,
    pack_rows,
    pack_stream,
    patchify,
    unpack,
    unpatchify,
)
from sora_jax.errors import UserError


def make_run(n: int, m: int, number: int = 0) -> Run:
    """Every value names the run and the token, so that a swapped or torn run shows."""
    token, word = np.arange(n, dtype=np.float32), np.arange(m, dtype=np.float32)
    return Run(
        patches=np.stack([np.full(n, number, np.float32), token], axis=1),
        coords=np.stack([token, token + number, -token], axis=1),
        given=token % 3 == 0,
        text=np.stack([np.full(m, number, np.float32), word, -word], axis=1),
        text_time=word + number,
        key=str(number),
    )


def check_rows(batch: PackedBatch, runs: dict[int, Run], max_runs: int) -> list[int]:
    """Holds every row against the runs it says it has; returns their numbers."""
    seen = []
    for row in range(len(batch.patches)):
        ids, text_ids = batch.segment_ids[row], batch.text_segment_ids[row]
        count = ids.max()
        assert count <= max_runs
        assert set(ids) - {0} == set(range(1, count + 1))
        assert set(text_ids) <= set(range(count + 1))
        assert (np.diff(ids[ids > 0]) >= 0).all() and not ids[(ids > 0).sum() :].any()
        for segment in range(1, count + 1):
            slots, words = ids == segment, text_ids == segment
            run = runs[int(batch.patches[row, slots][0, 0])]
            np.testing.assert_array_equal(batch.patches[row, slots], run.patches)
            np.testing.assert_array_equal(batch.coords[row, slots], run.coords)
            np.testing.assert_array_equal(batch.given[row, slots], run.given)
            np.testing.assert_array_equal(batch.text[row, words], run.text)
            np.testing.assert_array_equal(batch.text_time[row, words], run.text_time)
            seen.append(int(run.key))
        for field in (batch.patches, batch.coords, batch.given):
            assert not field[row, ids == 0].any()
        assert not batch.text[row, text_ids == 0].any()
    return seen


sizes = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 12)), min_size=1, max_size=30)


@given(sizes, st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_packing_then_unpacking_gives_every_run_back_once(sizes, max_runs):
    runs = [make_run(n, m, number) for number, (n, m) in enumerate(sizes)]
    batch, placements = pack_rows(runs, 40, 12, max_runs)
    assert sorted(check_rows(batch, dict(enumerate(runs)), max_runs)) == list(range(len(runs)))
    for run, place, patches, coords in zip(
        runs, placements, unpack(batch.patches, placements), unpack(batch.coords, placements), strict=True
    ):
        np.testing.assert_array_equal(patches, run.patches)
        np.testing.assert_array_equal(coords, run.coords)
        assert (batch.segment_ids[place.row] == place.segment).sum() == place.length
    assert all(row.any() for row in batch.segment_ids)


@given(sizes, st.integers(1, 6), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_a_finite_stream_is_packed_whole(sizes, max_runs, window):
    runs = [make_run(n, m, number) for number, (n, m) in enumerate(sizes)]
    stream = grain.MapDataset.source(runs).to_iter_dataset(grain.ReadOptions(0, 0))
    seen = []
    for batch in pack_stream(stream, 40, 12, max_runs, rows=3, window=window):
        assert batch.patches.shape == (3, 40, 2) and batch.text.shape == (3, 12, 3)
        seen += check_rows(batch, dict(enumerate(runs)), max_runs)
    assert sorted(seen) == list(range(len(runs)))


def test_rows_are_few_and_can_be_fixed():
    runs = [make_run(n, 1, n) for n in (10, 30, 20, 40, 1, 19)]
    batch, _ = pack_rows(runs, 40, 8, 8)
    assert len(batch.patches) == 3
    padded, placements = pack_rows(runs, 40, 8, 8, rows=5)
    assert len(padded.patches) == 5 and not padded.segment_ids[3:].any()
    assert len(unpack(padded.patches, placements)) == 6
    with pytest.raises(UserError, match="6 runs need 3 rows, but there are 2"):
        pack_rows(runs, 40, 8, 8, rows=2)


@pytest.mark.parametrize("n, m", [(41, 1), (1, 13)])
def test_a_run_longer_than_a_row_is_refused(n, m):
    message = f"'7' has {n} tokens and {m} text tokens, but a row holds 40 and 12"
    with pytest.raises(UserError, match=message):
        pack_rows([make_run(3, 3), make_run(n, m, 7)], 40, 12, 4)
    stream = grain.MapDataset.source([make_run(3, 3), make_run(n, m, 7)]).to_iter_dataset(
        grain.ReadOptions(0, 0)
    )
    with pytest.raises(UserError, match=message):
        list(pack_stream(stream, 40, 12, 4, rows=1))


def test_nothing_to_pack_is_refused():
    with pytest.raises(UserError, match="nothing to pack"):
        pack_rows([], 40, 12, 4)
    with pytest.raises(UserError, match="has no tokens"):
        pack_rows([make_run(0, 3)], 40, 12, 4)


def mixed_sizes(count: int) -> list[tuple[int, int]]:
    """Images and clips of several durations, sizes and shapes, 4 to 250 tokens, with words of 2 to 24 tokens."""
    rng = np.random.default_rng(0)
    tokens = [
        t * y * x for t in range(1, 6) for y, x in ((2, 2), (3, 3), (4, 4), (4, 7), (7, 4), (5, 8), (5, 10))
    ]
    return [(int(rng.choice(tokens)), int(rng.integers(2, 25))) for _ in range(count)]


@pytest.mark.parametrize("row_tokens, row_text", [(512, 256), (1024, 512)])
def test_the_mixed_stream_fills_97_percent(row_tokens, row_text):
    runs = [make_run(*size) for size in mixed_sizes(3000)]
    stream = grain.MapDataset.source(runs).repeat().to_iter_dataset(grain.ReadOptions(0, 0))
    batches = iter(pack_stream(stream, row_tokens, row_text, max_runs=64, rows=8))
    fill = np.mean([(next(batches).segment_ids > 0).mean() for _ in range(40)])
    assert fill >= 0.97, f"only {fill:.1%} of the slots are filled"


def test_a_stream_resumes_to_the_bit():
    runs = [make_run(*size, number) for number, size in enumerate(mixed_sizes(200))]
    stream = grain.MapDataset.source(runs).shuffle(seed=1).repeat().to_iter_dataset(grain.ReadOptions(0, 0))
    batches = pack_stream(stream, 512, 256, max_runs=64, rows=3, window=8)
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


@given(*[st.integers(1, 3)] * 7)
@settings(max_examples=40, deadline=None)
def test_unpatchify_undoes_patchify(t, y, x, pt, py, px, c):
    grid, patch = (t * pt, y * py, x * px), (pt, py, px)
    latent = np.arange(np.prod(grid) * c).reshape(*grid, c)
    patches = patchify(latent, patch)
    assert patches.shape == (t * y * x, pt * py * px * c)
    np.testing.assert_array_equal(patches[0], latent[:pt, :py, :px].reshape(-1))
    np.testing.assert_array_equal(unpatchify(patches, grid, patch), latent)


def test_patches_must_divide_the_latent():
    with pytest.raises(UserError, match="A latent of 3×5×4 .* can't be cut into patches of 1×2×2"):
        patchify(np.zeros((3, 5, 4, 2)), (1, 2, 2))


@pytest.mark.parametrize("mode", ["fractional", "absolute"])
@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 2)])
def test_coordinates_follow_patchify(mode, patch):
    """Cut a latent that holds its own positions: the patches must agree with the coordinates."""
    grid = (4, 4, 6)
    positions = np.stack(np.meshgrid(*[np.arange(n) for n in grid], indexing="ij"), axis=-1).astype(
        np.float32
    )
    patches = patchify(positions, patch)
    centre = patches.reshape(len(patches), -1, 3).mean(axis=1)
    coords = coordinates(grid, patch, fps=8.0, mode=mode)
    assert coords.dtype == np.float32 and coords.shape == (len(patches), 3)
    np.testing.assert_allclose(coords[:, 0], centre[:, 0] * 4 / 8)
    wanted = (centre[:, 1:] + 0.5 - [2, 3]) / 4 if mode == "fractional" else (centre[:, 1:] - 0.5) / 2
    np.testing.assert_allclose(coords[:, 1:], wanted)


def test_fractional_coordinates_know_the_picture_not_the_resolution():
    small, large = (coordinates((2, size, size * 2), (1, 2, 2), 8.0) for size in (4, 8))
    assert small[:, 1].max() == 0.25 and small[:, 2].max() == 0.75
    # Every small patch covers 2×2 large ones, and lies at their mean.
    large = large.reshape(2, 2, 2, 4, 2, 3).mean(axis=(2, 4)).reshape(-1, 3)
    np.testing.assert_allclose(large, small, atol=1e-6)
    square = coordinates((1, 4, 4), (1, 2, 2), 8.0)
    wide = coordinates((1, 4, 8), (1, 2, 2), 8.0)
    assert {tuple(c) for c in square[:, 1:2]} == {tuple(c) for c in wide[:, 1:2]}
    assert np.ptp(wide[:, 2]) > np.ptp(square[:, 2])


def test_coordinates_refuse_what_they_do_not_know():
    with pytest.raises(UserError, match='"fractional" or "absolute"'):
        coordinates((1, 2, 2), (1, 2, 2), 8.0, mode="polar")
    with pytest.raises(UserError, match="frames per second"):
        coordinates((1, 2, 2), (1, 2, 2), 0.0)


def test_a_packed_batch_is_a_pytree():
    batch, _ = pack_rows([make_run(3, 2)], 8, 4, 2)
    doubled = jax.tree.map(lambda array: array * 2, batch)
    assert isinstance(doubled, PackedBatch) and doubled.segment_ids.max() == 2
    assert len(jax.tree.leaves(batch)) == 7
