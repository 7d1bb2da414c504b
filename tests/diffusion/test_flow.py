"""The flow's path, its velocity, the levels a sampler walks and the steps it takes."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_jax.diffusion import flow

RNG = np.random.default_rng(0)
CLEAN, NOISE = (RNG.normal(size=(3, 4)).astype(np.float32) for _ in range(2))


def test_the_path_leads_from_data_to_noise():
    np.testing.assert_array_equal(flow.interpolate(CLEAN, NOISE, 0.0), CLEAN)
    np.testing.assert_array_equal(flow.interpolate(CLEAN, NOISE, 1.0), NOISE)


def test_every_token_has_its_own_place_on_the_path():
    sigma = np.array([[0.0], [0.25], [1.0]], np.float32)
    mixed = flow.interpolate(CLEAN, NOISE, sigma)
    np.testing.assert_array_equal(mixed[0], CLEAN[0])
    np.testing.assert_allclose(mixed[1], 0.75 * CLEAN[1] + 0.25 * NOISE[1], rtol=1e-6)
    np.testing.assert_array_equal(mixed[2], NOISE[2])


@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.0])
def test_the_velocity_is_the_paths_derivative_and_points_back_to_the_data(sigma):
    point, velocity = jax.jvp(lambda s: flow.interpolate(CLEAN, NOISE, s), (sigma,), (1.0,))
    np.testing.assert_allclose(flow.velocity(CLEAN, NOISE), velocity, atol=1e-6)
    np.testing.assert_allclose(flow.predict_x0(point, velocity, sigma), CLEAN, atol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_euler_with_the_true_velocity_of_one_data_point_lands_on_it(factor):
    x = NOISE
    levels = np.asarray(flow.schedule(5, factor))
    for sigma, following in pairwise(levels):
        np.testing.assert_allclose(x, flow.interpolate(CLEAN, NOISE, sigma), atol=1e-5)
        x = flow.euler(x, (x - CLEAN) / sigma, sigma, following)
    np.testing.assert_allclose(x, CLEAN, atol=1e-5)


def test_a_slope_points_to_the_clean():
    sigma = np.array([[0.0], [0.25], [1.0]], np.float32)
    x = flow.interpolate(CLEAN, NOISE, sigma)
    np.testing.assert_allclose(
        flow.velocity_at(x, CLEAN, sigma)[1:], flow.velocity(CLEAN, NOISE)[1:], atol=1e-5
    )
    assert np.isfinite(flow.velocity_at(x, CLEAN, sigma)).all()


def _step(last_sigma: float, sigma: float, next_sigma: float) -> np.ndarray:
    last_clean = CLEAN + 0.1 * NOISE
    return np.asarray(
        flow.multistep(NOISE, CLEAN, last_clean, *map(jnp.float32, (sigma, next_sigma, last_sigma)))
    )


def test_without_a_step_before_or_with_an_endless_one_a_multistep_is_eulers():
    for last_sigma, sigma, next_sigma in ((0.5, 0.5, 0.2), (1.0, 0.9, 0.5), (0.5, 0.2, 0.0), (1.0, 1.0, 0.9)):
        first = flow.euler(NOISE, (NOISE - CLEAN) / sigma, sigma, next_sigma)
        np.testing.assert_allclose(_step(last_sigma, sigma, next_sigma), first, atol=1e-5)
    # Where steps in λ are even, half the last change of the denoised is added: Lu et al. 2022b, algorithm 2.
    last, now, then = (1 / (1 + np.exp(snr)) for snr in (-0.5, 0.5, 1.5))
    target = CLEAN + 0.5 * (CLEAN - (CLEAN + 0.1 * NOISE))
    np.testing.assert_allclose(
        _step(last, now, then), flow.euler(NOISE, (NOISE - target) / now, now, then), atol=1e-5
    )


def test_a_step_is_corrected_with_the_mean_of_the_denoised_at_its_ends():
    last, now = jnp.float32(0.8), jnp.float32(0.5)
    other = CLEAN + 1
    got = flow.corrector(2 * NOISE, NOISE, CLEAN, other, other, now, last, last)
    np.testing.assert_allclose(got, flow.euler(NOISE, (NOISE - CLEAN - 0.5) / last, last, now), atol=1e-5)
    kept = flow.corrector(2 * NOISE, NOISE, CLEAN, other, other, now, now, now)
    np.testing.assert_array_equal(kept, 2 * NOISE)


def _error(solver: str, steps: int) -> float:
    """Of dx/dσ = −2σx, whose solution from x(1) = 1 is exp(1 − σ²), at σ = 0."""
    x, levels = np.float64(1.0), np.linspace(1.0, 0.0, steps + 1)
    field = lambda x, sigma: -2 * sigma * x
    for sigma, following in pairwise(levels):
        velocity = field(x, sigma)
        guess = flow.euler(x, velocity, sigma, following)
        x = guess if solver == "euler" else flow.heun(x, velocity, field(guess, following), sigma, following)
    return abs(x - np.e)


@pytest.mark.parametrize(("solver", "ratio"), [("euler", 2.0), ("heun", 4.0)])
def test_a_solvers_error_falls_with_its_order(solver, ratio):
    assert _error(solver, 32) / _error(solver, 64) == pytest.approx(ratio, rel=0.1)
    assert _error("heun", 32) < _error("euler", 32) / 10


@settings(max_examples=20)
@given(steps=st.sampled_from([1, 2, 7, 50]), factor=st.floats(1.0, 8.0))
def test_a_schedule_falls_from_one_to_zero(steps, factor):
    levels = np.asarray(flow.schedule(steps, factor))
    assert levels.shape == (steps + 1,)
    assert (levels[0], levels[-1]) == (1.0, 0.0)
    assert (np.diff(levels) < 0).all()


def test_a_schedule_is_even_before_it_is_shifted():
    np.testing.assert_allclose(flow.schedule(4), [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(flow.schedule(2, init_sigma=0.5), [0.5, 0.25, 0])


@settings(max_examples=20)
@given(start=st.floats(0.05, 1.0), factor=st.floats(1.0, 8.0))
def test_a_schedule_begins_exactly_where_it_is_told(start, factor):
    levels = np.asarray(flow.schedule(5, factor, start))
    assert levels[0] == np.float32(start)
    even = flow.unshift(levels, factor)
    np.testing.assert_allclose(even, even[0] * np.linspace(1, 0, 6), atol=1e-6)


@settings(max_examples=50)
@given(factor=st.floats(1.0, 16.0))
def test_a_shift_moves_towards_noise_keeps_the_order_and_can_be_undone(factor):
    sigma = np.linspace(0.0, 1.0, 33)
    shifted = flow.shift(sigma, factor)
    assert (shifted[0], shifted[-1]) == (0.0, pytest.approx(1.0))
    assert (np.diff(shifted) > 0).all()
    assert (shifted >= sigma - 1e-12).all()
    np.testing.assert_allclose(flow.unshift(shifted, factor), sigma, atol=1e-12)


def test_the_shift_grows_with_the_root_of_a_runs_length():
    np.testing.assert_allclose(flow.shift_factor(jnp.array([16.0, 64, 256, 1024]), 64.0), [1, 1, 2, 4])
    # Esser et al. 2024, section 5.3.2: their middle level at four times the tokens is 2/3.
    assert float(flow.shift(0.5, flow.shift_factor(256.0, 64.0))) == pytest.approx(2 / 3)


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (-0.5, 0.7)])
def test_the_logit_of_a_drawn_level_is_normal(mean, deviation):
    sigma = np.asarray(flow.draw_sigma(jax.random.key(0), (40_000,), mean, deviation), np.float64)
    assert 0 < sigma.min() < sigma.max() < 1
    logit = np.log(sigma / (1 - sigma))
    assert logit.mean() == pytest.approx(mean, abs=0.02)
    assert logit.std() == pytest.approx(deviation, abs=0.02)
    assert np.mean(logit < mean + deviation) == pytest.approx(0.8413, abs=0.01)
