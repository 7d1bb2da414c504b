"""Power-function averages: their weights, an average of another length made of snapshots, exact resume."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.fake_objective import LineObjective, get_config
from helpers.tiny_dit import make_dit

from sora_jax.checkpoints.components import Bundle
from sora_jax.checkpoints.store import load_params, named_leaves
from sora_jax.errors import UserError
from sora_jax.train import averages
from sora_jax.train.averages import (
    coefficients,
    exponent,
    load_average,
    load_average_bundle,
    power_update,
    profile,
    save_snapshot,
)
from sora_jax.train.loop import TrainState, train
from sora_jax.train.optim import OptimConfig

STEPS, EVERY, LENGTHS = 2000, 100, (0.05, 0.1)


def track(path: np.ndarray, length: float) -> np.ndarray:
    """The average after each step, of parameters [steps, n]."""

    def one(average, point):
        average = power_update(average, point[1], length, point[0])
        return average, average

    steps = jnp.arange(len(path))
    return np.asarray(jax.lax.scan(one, jnp.full(path.shape[1:], 7.0), (steps, path))[1])


def test_an_exponent_gives_its_length():
    for length in (0.02, *LENGTHS, 0.25):
        gamma = exponent(length)
        assert math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(length)
        weights, middles = profile(length, 4000, 4000), (np.arange(4000) + 0.5) / 4000
        spread = np.sqrt(weights @ middles**2 - (weights @ middles) ** 2)
        assert weights.sum() == pytest.approx(1) and spread == pytest.approx(length, rel=1e-3)


def test_the_updates_give_the_profiles_weights():
    """The parameters after step s are the s-th unit vector; the start, a vector of sevens, is forgotten."""
    tracked = track(np.eye(60, dtype=np.float32), 0.1)
    for step in (1, 7, 60):
        np.testing.assert_allclose(tracked[step - 1], profile(0.1, step, 60), atol=1e-6)


@pytest.fixture(scope="module")
def averaged_run(tmp_path_factory) -> tuple[pathlib.Path, np.ndarray]:
    """A random walk towards somewhere, and snapshots of its two averages as a run keeps them."""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    noise = np.cumsum(rng.normal(size=(STEPS, 50)), axis=0) / math.sqrt(STEPS)
    path = (noise + 3 * np.linspace(0, 1, STEPS)[:, None] ** 0.5).astype(np.float32)
    for length in LENGTHS:
        for step, average in enumerate(track(path, length), start=1):
            if step % EVERY == 0:
                save_snapshot(folder, {"w": average}, length, step)
    return folder, path


@pytest.mark.parametrize("length", [0.04, 0.05, 0.07, 0.15, 0.2])
def test_an_average_made_of_snapshots_is_the_tracked_one(averaged_run, length):
    """Within 1% of how far the average lies behind the parameters."""
    folder, path = averaged_run
    direct = track(path, length)
    for step in (STEPS, 1500):
        wanted = direct[step - 1]
        made = load_average(folder, length, step)["w"]
        assert np.linalg.norm(made - wanted) < 0.01 * np.linalg.norm(wanted - path[step - 1])


def test_long_trainings_are_divided_into_cells():
    kept = [(length, step) for length in LENGTHS for step in range(2000, 40_001, 2000)]
    shares = coefficients(kept, 0.07, 40_000)
    assert shares.sum() == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(shares, coefficients([(a, b // 10) for a, b in kept], 0.07, 4000), atol=0.02)


@pytest.fixture(scope="module")
def config():
    config = get_config(9)
    config.optim.update({"ema_lengths": LENGTHS, "ema_every": 2, "steps": 9})
    return config


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> tuple[pathlib.Path, TrainState]:
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, train(config, workdir, LineObjective())


@pytest.mark.slow
def test_a_run_that_stopped_keeps_the_same_averages_bit_for_bit(config, whole, tmp_path):
    workdir, expected = whole
    config = config.copy_and_resolve_references()
    for config.steps in (5, 9):
        state = train(config, tmp_path, LineObjective())
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    files = lambda folder: {
        f"{path.parent.name}/{path.name}": path.read_bytes() for path in folder.glob("averages/*/*")
    }
    kept, resumed = files(workdir), files(tmp_path)
    names = {f"{length}/{step}.safetensors" for length in LENGTHS for step in (2, 4, 6, 8, 9)}
    assert kept.keys() == names and resumed.items() >= kept.items()


def test_a_runs_shorter_average_is_the_one_that_is_shown(whole):
    workdir, state = whole
    shown, made = named_leaves(state.shown), load_average(workdir, LENGTHS[0])
    for name, leaf in load_params(workdir).items():
        np.testing.assert_array_equal(leaf, shown[name])
        np.testing.assert_allclose(made[name], leaf, atol=2e-3)
        assert not np.array_equal(leaf, named_leaves(state.long_ema)[name])


def test_a_model_of_another_length(tmp_path, monkeypatch):
    model = make_dit()
    for length in LENGTHS:
        for step in (10, 20):
            save_snapshot(tmp_path, model, length, step)
    stored = Bundle("run", None, jax.tree.map(jnp.zeros_like, model))
    monkeypatch.setattr(averages, "load_bundle", lambda workdir: stored)
    made = load_average_bundle(tmp_path, 0.07)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.02, atol=2e-3), made.dit, model)


def test_what_can_not_be_made_is_refused(averaged_run, whole, tmp_path):
    folder, _ = averaged_run
    with pytest.raises(UserError, match="can't be made of 40 snapshots"):
        load_average(folder, 0.002)
    with pytest.raises(UserError, match="has no snapshot of step 150, only of 100, 200"):
        load_average(folder, 0.1, 150)
    with pytest.raises(UserError, match="has no snapshot of averages: train with config.optim.ema_lengths"):
        load_average(tmp_path, 0.1)


@pytest.mark.parametrize("lengths", [(0.1,), (0.1, 0.05), (0.05, 0.3), (0.0, 0.1)])
def test_wrong_lengths_are_refused(lengths):
    with pytest.raises(UserError, match="config.optim.ema_lengths=.* must be empty, or two lengths"):
        OptimConfig(ema_lengths=lengths)
