"""Intervals: Wilson's of shares, bootstrap's of means."""

import numpy as np
import pytest

from sora_jax.evaluation.intervals import mean_interval, resamples, share_interval


def test_the_interval_of_a_share_is_wilsons():
    # Brown, Cai, DasGupta 2001: the score interval of 0 of 10 reaches to z² / (n + z²).
    assert share_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert share_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert share_interval(128, 256) == pytest.approx((0.4392, 0.5608), abs=1e-4)


def test_a_bootstrap_interval_of_a_mean_is_about_the_normal_one():
    values = np.random.default_rng(0).normal(5, 2, 400)
    low, high = mean_interval(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_intervals_are_seeded():
    values = np.random.default_rng(0).normal(size=30)
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1) != mean_interval(values, seed=2)


def test_replicates_do_not_depend_on_their_number():
    few, many = (list(resamples(9, 0, number)) for number in (3, 5))
    assert all((one == other).all() for one, other in zip(few, many))
    assert all(counts.sum() == 9 for counts in many) and len({tuple(counts) for counts in many}) == 5


def test_one_value_has_no_interval():
    assert mean_interval([1.0]) is None
