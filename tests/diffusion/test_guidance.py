"""Guidance: weights of 1 change nothing, outside the interval neither; each method does what its paper says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.sampling import sample, tabulate
from helpers.tiny_batch import BATCH, NOISE, PLACES, SEGMENTS, SIGMAS, make_dit, pack, wave, with_words

from sora_jax.diffusion import flow
from sora_jax.diffusion.guidance import (
    METHODS,
    Guidance,
    combine,
    guided_clean,
    without_caption,
    without_conditioning,
    zero_init_sigma,
)
from sora_jax.tokens.packing import unpack

MODEL = make_dit()
blend, ask = jax.jit(combine), jax.jit(guided_clean, static_argnames="passes")
answer = jax.jit(lambda batch: MODEL(X, batch, SIGMA))
SHAPE = BATCH.condition_segment_ids.shape
SIGMA = SIGMAS[2]
TOKEN_SIGMA = np.asarray(flow.gather_sigmas(SIGMA, BATCH.condition_ids))[..., None]
X = (1 - TOKEN_SIGMA) * BATCH.patches + TOKEN_SIGMA * NOISE
FULL, UNCAPTIONED, BARE = (wave(*X.shape, pitch=pitch) for pitch in (1.3, 1.7, 2.3))
UNCAPTIONED = UNCAPTIONED + 0.5 * FULL


def combined(guidance: Guidance, passes: int = 3) -> np.ndarray:
    """x₀ from three velocities that no model has a part in."""
    return np.asarray(blend([FULL, UNCAPTIONED, BARE][:passes], X, BATCH, SIGMA, guidance.tables(SHAPE)))


def generated(array: np.ndarray, i: int) -> np.ndarray:
    """The tokens of segment i that are generated, as one vector."""
    (tokens,), (start,) = unpack(array, [PLACES[i]]), unpack(BATCH.init_sigma, [PLACES[i]])
    return tokens[start > 0].ravel()


def clean(velocity: np.ndarray) -> np.ndarray:
    return X - TOKEN_SIGMA * velocity


@pytest.mark.parametrize("method", range(len(METHODS)))
def test_weights_of_one_are_the_conditional_exactly(method):
    for change in ({}, {"rescale": 1.0}, {"low": 0.2, "high": 0.5}):
        np.testing.assert_array_equal(
            combined(Guidance(method=method, **change)), combined(Guidance(), passes=1)
        )


def test_below_a_boundary_another_scale_holds():
    """Condition by condition; without a boundary it has no effect."""
    split = np.median(SIGMA[SIGMA > 0])
    both = combined(Guidance(text=4.0, low_text=2.0, boundary=split), passes=2)
    for scale, where in ((4.0, split <= TOKEN_SIGMA), (2.0, split > TOKEN_SIGMA)):
        assert where.any()
        np.testing.assert_array_equal(np.where(where, both - combined(Guidance(text=scale), passes=2), 0), 0)
    np.testing.assert_array_equal(
        combined(Guidance(text=4.0, low_text=2.0), passes=2), combined(Guidance(text=4.0), passes=2)
    )
    assert [Guidance(low_text=2.0, boundary=edge).passes() for edge in (0.0, 0.9)] == [1, 2]


@pytest.mark.parametrize("method", range(len(METHODS)))
def test_outside_its_interval_guidance_has_no_effect(method):
    guidance = Guidance(text=4.0, conditioning=3.0, rescale=0.5, method=method, low=0.5, high=0.8)
    got, conditional = combined(guidance), combined(Guidance(), passes=1)
    inside = (TOKEN_SIGMA > 0.5) & (TOKEN_SIGMA <= 0.8) & (BATCH.init_sigma > 0)[..., None]
    assert 0 < inside.sum() < (BATCH.init_sigma > 0).sum()
    np.testing.assert_array_equal(*np.where(inside, 0, [got, conditional]))
    assert np.abs(got - conditional)[inside[..., 0]].max(-1).min() > 1e-2


def test_the_weights_are_those_of_the_formula():
    text, given = 3.0, 2.0
    velocity = BARE + given * (UNCAPTIONED - BARE) + text * (FULL - UNCAPTIONED)
    np.testing.assert_allclose(combined(Guidance(text, given)), clean(velocity), atol=1e-5)
    velocity = UNCAPTIONED + text * (FULL - UNCAPTIONED)  # Ho and Salimans
    np.testing.assert_allclose(combined(Guidance(text, 1.0)), clean(velocity), atol=1e-5)
    np.testing.assert_allclose(combined(Guidance(text), 2), clean(velocity), atol=1e-5)


def rescale_noise_cfg(guided: np.ndarray, conditional: np.ndarray, phi: float) -> np.ndarray:
    """Lin et al. 2023, equations 15 and 16, of the model's output, in float64: as diffusers has it."""
    guided, conditional = guided.astype(np.float64), conditional.astype(np.float64)
    rescaled = guided * (conditional.std(ddof=1) / guided.std(ddof=1))
    return phi * rescaled + (1 - phi) * guided


@pytest.mark.parametrize("i", [0, 2, 4])
@pytest.mark.parametrize("phi", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize(("text", "given"), [(5.0, 1.0), (3.0, 2.0)])
def test_rescaling_acts_on_the_velocity_segment_by_segment_as_diffusers_does(text, given, phi, i):
    full, weak, bare, x, sigma = (
        generated(array, i) for array in (FULL, UNCAPTIONED, BARE, X, np.broadcast_to(TOKEN_SIGMA, X.shape))
    )
    guided = full + (text - 1) * (full - weak) + (given - 1) * (weak - bare)
    assert full.std() < 0.9 * guided.std()
    expected = x - sigma * rescale_noise_cfg(guided, full, phi)
    np.testing.assert_allclose(
        generated(combined(Guidance(text, given, rescale=phi)), i), expected, atol=1e-4
    )


@pytest.mark.parametrize("factor", [1.0, 3.2])
@pytest.mark.parametrize(("steps", "left_out"), [(1, 1), (12, 1), (25, 1), (26, 2), (50, 2), (100, 4)])
def test_zero_init_leaves_out_the_first_twenty_fifth_of_the_steps_and_at_least_one(steps, left_out, factor):
    sigmas = np.asarray(flow.schedule(steps, factor))[:-1]
    assert np.count_nonzero(sigmas > zero_init_sigma(factor)) == left_out


@pytest.mark.parametrize("i", [0, 2, 4])
def test_zero_star_fits_the_unconditional_to_the_conditional_segment_by_segment(i):
    text, (strong, weak) = 4.0, (generated(FULL, i), generated(UNCAPTIONED, i))
    fit = np.dot(strong, weak) / np.dot(weak, weak)
    assert abs(fit - 1) > 0.1
    velocity = (1 - text) * fit * UNCAPTIONED + text * FULL  # Fan et al. 2025
    got = combined(Guidance(text, method=METHODS.index("zero")), 2)
    np.testing.assert_allclose(generated(got, i), generated(clean(velocity), i), atol=1e-4)


@pytest.mark.parametrize(("i", "limit"), [(0, 0.1), (2, 0.1), (4, 1e3)])
def test_apg_moves_across_the_conditional_and_no_further_than_its_limit(i, limit):
    full, weak = generated(clean(FULL), i), generated(clean(UNCAPTIONED), i)
    update = (
        generated(combined(Guidance(3.0, method=METHODS.index("apg"), norm_threshold=limit), 2), i) - full
    )
    assert abs(np.dot(update, full)) < 1e-4 * np.linalg.norm(update) * np.linalg.norm(full)
    gain = full - weak
    gain = gain * min(1, limit / np.sqrt(np.square(gain).mean()))
    np.testing.assert_allclose(update, 2 * (gain - np.dot(gain, full) / np.dot(full, full) * full), atol=1e-4)


def test_segments_without_anything_to_average_give_numbers():
    everything_given = dataclasses.replace(
        BATCH, init_sigma=np.zeros_like(BATCH.init_sigma), condition_ids=np.zeros_like(BATCH.condition_ids)
    )
    for method in range(len(METHODS)):
        tables = Guidance(3.0, 2.0, rescale=1.0, method=method).tables(SHAPE)
        zeros = np.zeros_like(SIGMA)
        out = blend([FULL, UNCAPTIONED, BARE], X, everything_given, zeros, tables)
        np.testing.assert_allclose(out, X, atol=1e-6)


def test_settings_by_segment_become_tables_by_entry():
    settings = [Guidance(text=2.0 + i, high=0.9) for i in range(len(SEGMENTS))]
    table = tabulate(settings, PLACES, BATCH.condition_segment_ids)
    for i, place in enumerate(PLACES):
        own = BATCH.condition_segment_ids[place.row] == place.segment_id
        assert own.any()
        assert (table.text[place.row, own] == 2 + i).all()
    assert (table.text[BATCH.condition_segment_ids == 0] == 1).all()
    assert (table.high[BATCH.condition_segment_ids == 0] == 1).all()


def test_the_model_is_asked_no_more_often_than_needed():
    assert Guidance().passes() == 1
    assert Guidance(text=np.array([1.0, 2.0])).passes() == 2
    assert Guidance(text=2.0, conditioning=np.array([1.0, 0.5])).passes() == 3


def asked(guidance: Guidance, negative=None, batch=BATCH) -> np.ndarray:
    tables, passes = guidance.tables(SHAPE), guidance.passes()
    clean, cache = ask(MODEL, X, batch, SIGMA, tables, passes, negative)
    assert cache is None
    return np.asarray(clean)


def test_each_pass_leaves_out_what_it_should():
    uncaptioned = dataclasses.replace(BATCH, text_segment_ids=np.zeros_like(BATCH.text_segment_ids))
    answers = [answer(batch) for batch in (BATCH, uncaptioned, without_conditioning(uncaptioned))]
    expected = blend(answers, X, BATCH, SIGMA, Guidance(3.0, 2.0).tables(SHAPE))
    np.testing.assert_allclose(asked(Guidance(3.0, 2.0)), expected, atol=1e-4)
    bare, row = without_conditioning(BATCH), PLACES[0].row
    assert not bare.conditioning_mask.any()
    assert (
        np.asarray(bare.segment_ids)[BATCH.init_sigma > 0] == BATCH.segment_ids[BATCH.init_sigma > 0]
    ).all()
    difference = np.abs(np.asarray(answers[2]) - answers[1]).max(-1)
    assert (
        difference[row][(BATCH.init_sigma[row] > 0) & (BATCH.segment_ids[row] == PLACES[0].segment_id)].min()
        > 1e-3
    )


def test_negative_words_take_the_place_of_none():
    """Those of segments 0 and 4, a storyboard; the others have none, and stay as they are."""
    batch, places = pack(
        [with_words(segment, i) if i in (0, 4) else segment for i, segment in enumerate(SEGMENTS)]
    )
    assert places == PLACES
    kept = np.isin(batch.text_segment_ids, 0)
    for i in (0, 4):
        kept |= (batch.text_segment_ids == PLACES[i].segment_id) & (np.arange(2) == PLACES[i].row)[:, None]
    negative = dataclasses.replace(batch, text_segment_ids=np.where(kept, batch.text_segment_ids, 0))
    guidance = Guidance(3.0)
    got, without = asked(guidance, negative), asked(guidance)
    # Pooled, they are in force wherever a card is: as words of a clip whose only words they are.
    always = dataclasses.replace(negative, condition_caption_time=np.zeros_like(BATCH.condition_caption_time))
    answers = [answer(batch) for batch in (BATCH, always)]
    expected = blend(answers, X, BATCH, SIGMA, guidance.tables(SHAPE))
    for i in range(len(SEGMENTS)):
        np.testing.assert_allclose(generated(got, i), generated(np.asarray(expected), i), atol=1e-4)
        change = np.abs(generated(got, i) - generated(without, i)).max()
        assert change > 1e-2 if i in (0, 4) else change < 1e-4


def test_negative_words_that_are_the_segments_own_cancel_guidance():
    plain = dataclasses.replace(BATCH, condition_caption_time=np.zeros_like(BATCH.condition_caption_time))
    plain = dataclasses.replace(plain, text_time=np.zeros_like(BATCH.text_time))
    np.testing.assert_allclose(asked(Guidance(5.0), plain, plain), asked(Guidance(), batch=plain), atol=1e-4)


def test_sampling_takes_negative_words():
    words = pack([with_words(segment, i) for i, segment in enumerate(SEGMENTS)])[0]
    guidance = Guidance(text=2.0)
    led, unled = (
        sample(MODEL, BATCH, NOISE, SIGMAS[:3], guidance, negative=words) for words in (words, None)
    )
    assert np.abs(np.asarray(led) - unled)[BATCH.init_sigma == 1].max(-1).min() > 1e-3
    assert jnp.isfinite(led).all()


def test_words_are_left_out_without_touching_anything_else():
    uncaptioned = without_caption(BATCH)
    assert not np.asarray(uncaptioned.text_segment_ids).any()
    for field in dataclasses.fields(BATCH):
        if field.name != "text_segment_ids":
            np.testing.assert_array_equal(getattr(uncaptioned, field.name), getattr(BATCH, field.name))
