"""The diffusion transformer: packed = alone, a σ per token, layers scanned."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.packed import pack_segments
from helpers.tiny_batch import wave
from helpers.tiny_dit import (
    BATCH,
    CONFIG,
    PLACES,
    SEGMENTS,
    SIGMAS,
    TABLE,
    K,
    M,
    N,
    forward,
    forward_backward,
    make_dit,
    pulled_sum,
    sigma_table,
    unrolled,
)

from sora_jax.models.dit import DiT, Routing, _draw_routes, _pool
from sora_jax.tokens.packing import PackedBatch, unpack


@pytest.fixture(
    scope="module",
    params=[{}, {"absolute": True, "pooled_text": True, "reference_frames": True}],
    ids=["plain", "all"],
)
def model(request) -> DiT:
    return make_dit(dataclasses.replace(CONFIG, **request.param))


@pytest.fixture(scope="module")
def outputs(model) -> list[np.ndarray]:
    """Each segment's velocity in the packed batch."""
    return unpack(forward(model, BATCH, TABLE), PLACES)


def close(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    """Pytrees whose arrays differ by no more than `tolerance` of their largest number."""
    for path, a in jax.tree.leaves_with_path(ours):
        b = dict(jax.tree.leaves_with_path(theirs))[path]
        scale = max(np.abs(b).max(), 1e-3)
        np.testing.assert_allclose(a, b, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))


def test_the_batch_has_what_this_file_is_about():
    runs_a_row = [len({place.segment_id for place in PLACES if place.row == row}) for row in range(2)]
    assert runs_a_row == [3, 2]
    assert (BATCH.segment_ids == 0).any()
    assert (BATCH.text_segment_ids == 0).any()


@pytest.mark.parametrize("i", range(len(SEGMENTS)))
def test_packed_equals_alone(model, i):
    """A segment among others gives the same velocity and gradients as in a row of its own (and an empty one)."""
    place, weights = PLACES[i], np.zeros((2, N, CONFIG.patch_width), np.float32)
    weights[place.row, place.start : place.start + place.length] = wave(
        place.length, CONFIG.patch_width, pitch=3
    )
    packed, (in_parameters, in_patches) = forward_backward(model, BATCH, TABLE, weights)

    batch, (own,) = pack_segments([SEGMENTS[i]], N, M, K, batch_size=2)  # of the packed batch's shape
    own_weights = np.zeros((2, N, CONFIG.patch_width), np.float32)
    own_weights[0, : own.length] = wave(own.length, CONFIG.patch_width, pitch=3)
    table = sigma_table([SIGMAS[i]], [own], batch)
    alone, (alone_in_parameters, alone_in_patches) = forward_backward(model, batch, table, own_weights)

    (packed_run,), (alone_run,) = unpack(packed, [place]), unpack(alone, [own])
    assert np.abs(alone_run).max() > 0.1
    close(packed_run, alone_run)
    close(in_parameters, alone_in_parameters)
    close(unpack(in_patches, [place]), unpack(alone_in_patches, [own]))
    others = np.array(in_patches)
    others[place.row, place.start : place.start + place.length] = 0
    assert not others.any(), "another segment's or padding's patches have a part in this segment's velocity"


def test_a_row_without_empty_slots_and_without_words_gives_the_same(model, outputs):
    i = next(i for i, segment in enumerate(SEGMENTS) if not len(segment.text))
    batch, (own,) = pack_segments([SEGMENTS[i]], len(SEGMENTS[i].patches), 0, K)
    close(unpack(forward(model, batch, sigma_table([SIGMAS[i]], [own], batch)), [own]), [outputs[i]])


@pytest.mark.slow
def test_a_batch_with_no_room_for_words_gives_the_same_as_one_whose_segments_have_none(model):
    segments = [
        dataclasses.replace(segment, text=segment.text[:0], text_time=segment.text_time[:0])
        for segment in SEGMENTS
    ]
    weights = wave(2, N, CONFIG.patch_width, pitch=3)
    results = []
    for room in (0, M):
        batch, places = pack_segments(segments, N, room, K)
        own = weights * (batch.segment_ids > 0)[..., None]
        out, gradients = forward_backward(model, batch, sigma_table(SIGMAS, places, batch), own)
        results.append((unpack(out, places), gradients))
    assert np.abs(np.concatenate(results[0][0])).max() > 0.1
    close(*results)


def test_neither_the_order_of_rows_nor_of_slots_nor_of_ids_nor_of_the_table_matters(model):
    out = np.asarray(forward(model, BATCH, TABLE))
    renamed, order = np.array([0, 3, 1, 2]), np.random.default_rng(0).permutation
    positions, words, rows, entries = order(N), order(M), np.array([1, 0]), np.array([0, 2, 3, 1])
    places = np.argsort(entries).astype(np.int32)  # where an entry of the table has gone
    told = {
        "ids": ("segment_ids", "text_segment_ids", "condition_segment_ids"),
        "entries": ("condition_ids", "text_condition_ids"),
    }

    def shuffle(name: str) -> np.ndarray:
        own = (
            entries
            if name in ("condition_segment_ids", "condition_caption_time", "condition_init_sigma")
            else positions
        )
        array = np.asarray(getattr(BATCH, name))[rows][:, words if name.startswith("text") else own]
        array = renamed[array].astype(np.int32) if name in told["ids"] else array
        return places[array] if name in told["entries"] else array

    names = [name for name, value in vars(BATCH).items() if value is not None]
    batch = PackedBatch(**{name: shuffle(name) for name in names})
    real = batch.segment_ids > 0
    close(np.asarray(forward(model, batch, TABLE[rows][:, entries]))[real], out[rows][:, positions][real])


def test_a_segments_velocity_depends_on_its_own_noise_level_alone(model, outputs):
    for i in range(len(SEGMENTS)):
        sigmas = list(SIGMAS)
        sigmas[i] -= 0.15
        changed = unpack(forward(model, BATCH, sigma_table(sigmas, PLACES, BATCH)), PLACES)
        for j in range(len(SEGMENTS)):
            if i == j:
                assert np.abs(changed[j] - outputs[j]).max() > 1e-2
            else:
                np.testing.assert_array_equal(changed[j], outputs[j])


def test_a_segments_velocity_depends_on_its_own_words_alone_and_on_when_they_hold(model, outputs):
    place = PLACES[0]
    mine = (BATCH.text_segment_ids == place.segment_id) & (np.arange(2) == place.row)[:, None]
    for change in (
        {"text": np.where(mine[..., None], -BATCH.text, BATCH.text)},
        {"text_time": np.where(mine, BATCH.text_time + 1, BATCH.text_time)},
    ) + (
        # Other words are in force.
        (
            {
                "condition_caption_time": np.where(BATCH.condition_segment_ids == place.segment_id, 0.5, 0.0)
                * (np.arange(2) == place.row)[:, None]
            },
        )
        if model.config.pooled_text
        else ()
    ):
        changed = unpack(forward(model, dataclasses.replace(BATCH, **change), TABLE), PLACES)
        assert np.abs(changed[0] - outputs[0]).max() > 1e-3, f"{list(change)} does not matter"
        for ours, theirs in zip(changed[1:], outputs[1:], strict=True):
            np.testing.assert_array_equal(ours, theirs)


def all_given(i: int) -> PackedBatch:
    """The batch with every token of run i given; its words keep the segment's level."""
    start, entries, place = np.array(BATCH.init_sigma), np.array(BATCH.condition_ids), PLACES[i]
    own = np.s_[place.row, place.start : place.start + place.length]
    start[own] = entries[own] = 0
    return dataclasses.replace(BATCH, init_sigma=start, condition_ids=entries)


def run_at(model: DiT, batch: PackedBatch, i: int, sigma: float) -> np.ndarray:
    """The velocity of run i at the noise level `sigma`."""
    table = sigma_table([*SIGMAS[:i], sigma, *SIGMAS[i + 1 :]], PLACES, batch)
    return unpack(forward(model, batch, table), PLACES)[i]


def test_given_tokens_have_noise_level_zero(model):
    """A segment that is all given and has no words looks the same at any σ: as one at σ = 0 that is not given."""
    i = next(i for i, segment in enumerate(SEGMENTS) if not len(segment.text))
    given = all_given(i)
    np.testing.assert_array_equal(run_at(model, given, i, 0.3), run_at(model, given, i, 0.8))
    close(run_at(model, given, i, 0.3), run_at(model, BATCH, i, 0.0), 1e-6)
    assert np.abs(run_at(model, BATCH, i, 0.3) - run_at(model, BATCH, i, 0.0)).max() > 1e-2


def test_words_share_their_segments_noise_level(model):
    """Of a segment that is all given, the words alone know σ."""
    i = next(i for i, segment in enumerate(SEGMENTS) if len(segment.text))
    given = all_given(i)
    assert np.abs(run_at(model, given, i, 0.3) - run_at(model, given, i, 0.8)).max() > 1e-3


def test_the_parts_of_a_segment_have_sigmas_of_their_own(model, outputs):
    """Two entries of one segment at the same level are as one; at another level, tokens that hold it change."""
    i, extra = 0, np.s_[PLACES[0].row, :]
    wide = lambda table, value: np.pad(table, ((0, 0), (0, 1)), constant_values=value)
    place = PLACES[i]
    half = np.s_[place.row, place.start + place.length // 2 : place.start + place.length]
    entries = np.array(BATCH.condition_ids)
    own = entries[half][0]
    entries[half] = K + 1
    segments, times, starts = (
        wide(table, 0)
        for table in (BATCH.condition_segment_ids, BATCH.condition_caption_time, BATCH.condition_init_sigma)
    )
    for table in (segments, times, starts):
        table[extra][K + 1] = table[extra][own]
    batch = dataclasses.replace(
        BATCH,
        condition_ids=entries,
        condition_segment_ids=segments,
        condition_caption_time=times,
        condition_init_sigma=starts,
    )
    table = wide(TABLE, 0.1)
    table[place.row, K + 1] = table[place.row, own]
    for ours, theirs in zip(unpack(forward(model, batch, table), PLACES), outputs, strict=True):
        close(ours, theirs)
    table[place.row, K + 1] -= 0.4
    changed = unpack(forward(model, batch, table), PLACES)
    assert np.abs(changed[i][place.length // 2 :] - outputs[i][place.length // 2 :]).max() > 1e-2
    for ours, theirs in zip(changed[1:], outputs[1:], strict=True):
        close(ours, theirs)


def test_the_words_in_force_are_what_is_pooled():
    """Two shots in one segment: each token's condition has its own shot's words, and words beyond count nowhere."""
    segment = dataclasses.replace(
        SEGMENTS[0],
        text_time=np.array([0, 0, 1], np.float32),
        caption_time=np.repeat([0, 1, 1], 4).astype(np.float32),
    )
    batch, (place,) = pack_segments([segment], N, M, K)
    pooled = np.asarray(_pool(jnp.asarray(batch.text), batch))
    entries = batch.condition_ids[0, : place.length]
    generated = segment.init_sigma > 0
    wanted = np.where(segment.caption_time[:, None] == 0, segment.text[:2].mean(0), segment.text[2])
    np.testing.assert_allclose(pooled[0, entries[generated]], wanted[generated], rtol=1e-6)
    assert not pooled[0, 0].any()


def test_a_segment_may_begin_anywhere_in_time_and_space(model):
    """Rotary embedding sees differences alone: true of video by itself; words stand at the origin."""
    model = make_dit(dataclasses.replace(model.config, absolute=False))  # absolute ones say where it begins
    outputs = unpack(forward(model, BATCH, TABLE), PLACES)
    i = next(i for i, segment in enumerate(SEGMENTS) if not len(segment.text))
    moved = dataclasses.replace(BATCH, coords=BATCH.coords + np.array([8.0, -1.0, 0.5, 0.0, 0.0], np.float32))
    close(unpack(forward(model, moved, TABLE), PLACES)[i], outputs[i], 1e-4)


def test_what_a_token_covers_is_given_where_places_are(model, outputs):
    wider = dataclasses.replace(BATCH, coords=BATCH.coords * np.array([1, 1, 1, 2, 2], np.float32))
    changed = unpack(forward(model, wider, TABLE), PLACES)
    for ours, theirs in zip(changed, outputs, strict=True):
        assert (np.abs(ours - theirs).max() > 1e-2) == model.config.absolute


@pytest.mark.slow
@pytest.mark.parametrize("how", ["unrolled", "dots", "none"])
def test_scanning_and_recomputing_change_no_number(model, how, monkeypatch):
    weights = wave(2, N, CONFIG.patch_width)
    expected = forward_backward(model, BATCH, TABLE, weights)
    if how == "unrolled":
        monkeypatch.setattr(jax.lax, "scan", unrolled)
        # A new function: jit remembers the trace of the old one.
        got = jax.jit(lambda *arguments: pulled_sum(*arguments))(model, BATCH, TABLE, weights)
    else:
        other = make_dit(dataclasses.replace(model.config, remat=how))
        got = forward_backward(other, BATCH, TABLE, weights)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        close(ours, theirs)


def test_at_the_beginning_blocks_are_the_identity_and_the_velocity_is_zero():
    model = jax.jit(lambda key: DiT(CONFIG, rngs=nnx.Rngs(params=key)))(jax.random.key(0))
    assert not np.asarray(forward(model, BATCH, TABLE)).any()
    # With a last layer that is not zero, layers that do nothing give what other layers that do nothing give.
    model.patch_out.kernel[...] = wave(*model.patch_out.kernel.shape)
    out = np.asarray(forward(model, BATCH, TABLE))
    assert np.abs(out).max() > 1
    for name in ("qkv", "out", "up", "down"):
        kernel = getattr(model.blocks, name).kernel
        kernel[...] = 2 * kernel[...]
    np.testing.assert_array_equal(forward(model, BATCH, TABLE), out)


def test_bfloat16_is_near_float32_and_the_velocity_is_float32(model, outputs):
    half = forward(make_dit(dataclasses.replace(model.config, dtype="bfloat16")), BATCH, TABLE)
    assert half.dtype == jnp.float32
    for ours, theirs in zip(unpack(half, PLACES), outputs, strict=True):
        close(ours, theirs, 0.1)
        assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.999


def test_a_model_of_clean_patches_has_the_velocity_that_points_to_them(model, outputs):
    clean = dataclasses.replace(model.config, predict="clean")
    other = jax.tree.unflatten(jax.tree.structure(make_dit(clean)), jax.tree.leaves(model))
    sigma = np.take_along_axis(TABLE, BATCH.condition_ids, axis=1)[..., None]
    raw, velocity = forward(model, BATCH, TABLE), forward(other, BATCH, TABLE)
    # Below MIN_SIGMA the division ends.
    np.testing.assert_allclose(velocity, (BATCH.patches - raw) / np.maximum(sigma, 0.05), atol=1e-4)


def test_a_flow_map_begins_as_its_velocity_and_depends_on_where_its_own_segments_step_goes():
    model = make_dit(dataclasses.replace(CONFIG, flow_map=True))
    step = jax.jit(lambda model, next_sigma: model(BATCH.patches, BATCH, TABLE, next_sigma))
    fresh = jax.jit(lambda: DiT(model.config, rngs=nnx.Rngs(0)).interval_in.kernel[...])()
    assert not np.any(fresh)
    there = TABLE.copy()
    place = PLACES[1]
    there[place.row, BATCH.condition_segment_ids[place.row] == place.segment_id] = 0.0
    pairs = zip(unpack(step(model, TABLE), PLACES), unpack(step(model, there), PLACES), strict=True)
    changed = [bool(np.abs(one - other).max() > 1e-3) for one, other in pairs]
    assert changed == [i == 1 for i in range(len(PLACES))]


def test_tokens_that_skip_layers_are_drawn_so_that_text_stays_and_padding_goes_first():
    segment_ids = jnp.array([[1, 1, 1, 1, 2, 2, 2, 0, 0] + [3] * 87])
    text = jnp.array([[True, False, False, False, True, False, False, False, False] + [False] * 87])
    kept, place = _draw_routes(Routing(jax.random.key(0), 0.5), text, segment_ids, 94, 2)
    assert kept.shape == (1, 2 + 64)  # 47 of 94, rounded up to a multiple of 32
    kept, place = np.asarray(kept[0]), np.asarray(place[0])
    assert (np.diff(kept) > 0).all() and {0, 4} <= set(kept) and not {7, 8} & set(kept)
    assert (place[kept] == np.arange(66)).all() and (np.delete(place, kept) == -1).all()


def test_routing_by_which_no_token_skips_changes_nothing():
    model = make_dit(dataclasses.replace(CONFIG, layers=3))
    routed = jax.jit(
        lambda model, share: model(BATCH.patches, BATCH, TABLE, routing=Routing(jax.random.key(1), share)),
        static_argnums=1,
    )
    whole = unpack(forward(model, BATCH, TABLE), PLACES)
    for ours, theirs in zip(unpack(routed(model, 0.0), PLACES), whole, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
