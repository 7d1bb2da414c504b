"""The batcher: segments that join and leave between steps get what they would get alone, in one compiled step."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from helpers.sampling import sample, tabulate
from helpers.slow import rest_slow
from helpers.tiny_batch import (
    CONFIG,
    MAX_STEPS,
    SEGMENTS,
    SETTINGS,
    STEPS,
    K,
    M,
    N,
    make_dit,
    make_noise,
    make_segment,
    make_sigmas,
    pack,
    wave,
    with_words,
)

from sora_jax.diffusion import flow
from sora_jax.diffusion.guidance import Guidance
from sora_jax.diffusion.solvers import ODE_SOLVERS, solver_step
from sora_jax.errors import UserError
from sora_jax.pipeline.batching import MAX_OVERTAKE_STEPS, BatchShape, ContinuousBatcher
from sora_jax.tokens.packing import unpack

MODEL = make_dit()
SHAPE = BatchShape(batch_size=2, seq_len=N, text_len=M, max_segments=K, max_conditions=4)


def ask(i: int) -> dict[str, Any]:
    """Segment i with its settings, the first with a negative prompt."""
    noise = wave(len(SEGMENTS[i].patches), CONFIG.patch_width, pitch=3 + 0.1 * i)
    negative = np.asarray(with_words(SEGMENTS[i], i).text) if i == 0 else None
    sigmas = np.asarray(flow.schedule(STEPS[i], 2.0))
    return {
        "segment": SEGMENTS[i],
        "noise": noise,
        "sigmas": sigmas,
        "guidance": SETTINGS[i],
        "negative_text": negative,
    }


def plain(grid: tuple[int, int, int], steps: int) -> dict[str, Any]:
    """One to be generated from noise alone, without guidance."""
    segment = make_segment(7, grid, 1, (1.0,))
    noise = wave(len(segment.patches), CONFIG.patch_width)
    return {
        "segment": segment,
        "noise": noise,
        "sigmas": np.linspace(1, 0, steps + 1),
        "guidance": Guidance(),
    }


def alone(i: int, solver: str) -> np.ndarray:
    batch, (own,) = pack([SEGMENTS[i]])
    guidance = tabulate([SETTINGS[i]], [own], batch.condition_segment_ids)
    levels = make_sigmas(batch, [own], [STEPS[i]], MAX_STEPS)
    negative = pack([with_words(SEGMENTS[i], i)])[0] if i == 0 else None
    noise = make_noise([own], [i])
    return unpack(sample(MODEL, batch, noise, levels, guidance, solver, negative), [own])[0]


def drain(batcher: ContinuousBatcher) -> dict[int, np.ndarray]:
    out = {}
    for _ in range(200):
        out |= batcher.step()
        if not batcher.busy:
            return out
    raise AssertionError("the batcher doesn't come to its end")


@pytest.mark.parametrize("solver", rest_slow(ODE_SOLVERS))
def test_segments_that_join_later_get_what_they_get_alone(solver):
    batcher, ids, out = ContinuousBatcher(MODEL, [SHAPE], solver), {}, {}
    for i in (1, 3, 0, 2, 4):  # one more each step: most join sequences where others are half way
        ids[i] = batcher.add(**ask(i))
        out |= batcher.step()
    out |= drain(batcher)
    assert sorted(out) == sorted(ids.values())
    for i, uid in ids.items():
        np.testing.assert_allclose(out[uid], alone(i, solver), atol=1e-4, err_msg=f"segment {i}")


def test_new_noise_of_a_step_is_the_segments_own():
    """Whatever is packed beside it; the same again from the same first noise, and another from another."""

    def run(*numbers: int, solver: str = "sde") -> list[np.ndarray]:
        batcher = ContinuousBatcher(MODEL, [SHAPE], solver)
        ids = [batcher.add(**ask(i)) for i in numbers]
        out = drain(batcher)
        return [out[uid] for uid in ids]

    one, other = run(1, 4)
    np.testing.assert_allclose(run(1)[0], one, atol=2e-5)
    np.testing.assert_allclose(run(4)[0], other, atol=2e-5)
    assert np.abs(run(1, solver="euler")[0] - one).max() > 0.1

    def fresh(flip: bool) -> np.ndarray:
        batcher, own = ContinuousBatcher(MODEL, [SHAPE], "sde"), ask(1)
        batcher.add(**own | {"noise": -own["noise"] if flip else own["noise"]})
        batcher._schedule()
        return batcher._fresh_noise()

    assert np.abs(fresh(False) - fresh(True)).max() > 1
    given = SEGMENTS[0].init_sigma == 0
    np.testing.assert_array_equal(run(0)[0][given], SEGMENTS[0].patches[given])


def test_positions_are_used_again_and_nothing_compiles_again():
    batcher = ContinuousBatcher(MODEL, [SHAPE])
    first = batcher.add(**ask(0))
    out = drain(batcher)
    compiled = solver_step._cache_size()
    ids = [batcher.add(**ask(0)) for _ in range(5)]  # more than fit at once
    out |= drain(batcher)
    for uid in ids:
        np.testing.assert_allclose(out[uid], out[first], atol=1e-4)
    assert solver_step._cache_size() == compiled


def test_a_small_one_overtakes_a_large_one_only_for_a_while():
    batcher = ContinuousBatcher(MODEL, [dataclasses.replace(SHAPE, batch_size=1)])
    batcher.add(**plain((1, 2, 4), 8))
    batcher.step()
    large = batcher.add(**plain((5, 4, 4), 2))  # a whole sequence
    steps = 0
    while large not in batcher.step():
        batcher.add(**plain((1, 2, 4), 8))
        steps += 1
        assert steps < MAX_OVERTAKE_STEPS + 40
    assert steps >= MAX_OVERTAKE_STEPS  # smaller ones went before it


def test_what_does_not_fit_a_row_is_refused():
    batcher = ContinuousBatcher(MODEL, [SHAPE])
    with pytest.raises(UserError, match="a sequence holds 20"):
        batcher.add(**plain((6, 4, 4), 2))
    with pytest.raises(UserError, match="negative prompt has 7 tokens"):
        batcher.add(**ask(1) | {"negative_text": wave(7, CONFIG.text_width)})
    with pytest.raises(UserError, match="no solver 'magic'"):
        ContinuousBatcher(MODEL, [SHAPE], "magic")
    assert not batcher.busy and batcher.step() == {}


def test_what_a_segment_left_behind_spoils_no_other():
    shape = dataclasses.replace(SHAPE, batch_size=1)
    good = plain((1, 2, 4), 3)
    fresh = ContinuousBatcher(MODEL, [shape])
    uid = fresh.add(**good)
    expected = drain(fresh)[uid]
    batcher = ContinuousBatcher(MODEL, [shape])
    bad = plain((5, 4, 4), 2)
    spoiled = batcher.add(**bad | {"noise": np.full_like(bad["noise"], np.nan)})
    assert np.isnan(drain(batcher)[spoiled]).all()
    uid = batcher.add(**good)
    np.testing.assert_allclose(drain(batcher)[uid], expected, atol=1e-5)


def test_the_smallest_batch_shape_that_holds_the_active_segments_is_taken():
    large = dataclasses.replace(SHAPE, batch_size=1)
    small = dataclasses.replace(large, seq_len=8, text_len=4)
    batcher = ContinuousBatcher(MODEL, [small, large])
    expected = {i: alone(i, "euler") for i in (1, 3, 4)}
    ids = {batcher.add(**ask(3)): 3}  # 4 tokens, 6 steps
    lengths, out = [], batcher.step()
    lengths.append(batcher.batch_shape.seq_len)
    ids |= {batcher.add(**ask(i)): i for i in (4, 1)}  # 10 tokens more
    compiled = solver_step._cache_size()
    while batcher.busy:
        out |= batcher.step()
        lengths.append(batcher.batch_shape.seq_len)
    assert lengths[0] == 8 and N in lengths and lengths[-1] == 8  # it grew and shrank again
    assert solver_step._cache_size() <= compiled + 2
    for uid, i in ids.items():
        np.testing.assert_allclose(out[uid], expected[i], atol=1e-4, err_msg=f"segment {i}")
