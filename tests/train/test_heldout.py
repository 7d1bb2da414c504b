"""The held-out loss: the same batches and noise each time, logged next to the training loss, nothing else changed."""

import warnings

import jax
import numpy as np
import pytest
from helpers.fake_objective import LineObjective, get_config

from sora_jax.data.data_config import DataConfig
from sora_jax.data.sources import heldout_sources
from sora_jax.distributed.mesh import WHOLE
from sora_jax.errors import UserError
from sora_jax.train.loop import train
from sora_jax.train.metrics import LogConfig, read_metrics


def config_with(steps: int, **log):
    config = get_config(steps)
    config.log.update({"heldout_every": 3, "heldout_batches": 2} | log)
    return config


def test_it_is_logged_and_training_stays_the_same_bit_for_bit(tmp_path, capsys):
    objective = LineObjective()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no step compiles again
        measured = train(config_with(8, every=2), tmp_path / "measured", objective)
    assert objective.traces == 2, "one training step and one program that measures"
    for a, b in zip(
        jax.tree.leaves(measured), jax.tree.leaves(train(get_config(8), tmp_path / "plain", LineObjective()))
    ):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True)
    rows = read_metrics(tmp_path / "measured")
    assert [(row["step"], "heldout_loss" in row) for row in rows] == [
        *((2, False), (3, True), (4, False), (6, True), (8, False))
    ]
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("step 6/8"))
    assert f"heldout_loss {rows[3]['heldout_loss']:.4f}" in line


@pytest.mark.slow
def test_it_is_of_the_average_with_the_same_batches_and_noise_each_time(tmp_path):
    state = train(config_with(6), tmp_path / "run", LineObjective())
    objective, root = LineObjective(), jax.random.key(3)
    batches = objective.heldout_data(WHOLE, 2)
    keys = [jax.random.fold_in(jax.random.fold_in(root, 2**32 - 1), index) for index in range(2)]
    own = [objective.loss(state.ema, batch, key)[0] for batch, key in zip(batches, keys, strict=True)]
    assert read_metrics(tmp_path / "run")[-1]["heldout_loss"] == pytest.approx(np.mean(own), rel=1e-5)

    resting = config_with(9)
    resting.optim.lr = 1e-20
    train(resting, tmp_path / "resting", LineObjective())
    rows = read_metrics(tmp_path / "resting")
    first, second, third = (row["heldout_loss"] for row in rows if "heldout_loss" in row)
    assert first == second == third and len({row["loss"] for row in rows}) == 9


@pytest.mark.slow
def test_it_is_the_same_after_a_restart(tmp_path):
    train(config_with(6), tmp_path / "whole", LineObjective())
    for steps in (4, 6):
        config = config_with(steps)
        config.optim.steps = 6
        train(config, tmp_path / "parts", LineObjective())
    ours, theirs = (
        [row.get("heldout_loss") for row in read_metrics(tmp_path / run)] for run in ("whole", "parts")
    )
    assert ours == theirs


def test_without_held_out_data_it_says_so_once(tmp_path, capsys):
    class Little(LineObjective):
        def heldout_data(self, share, batches):
            return []

    train(config_with(7), tmp_path / "run", Little())
    assert capsys.readouterr().err.count("no held-out loss: the data have no validation split") == 1
    assert not any("heldout_loss" in row for row in read_metrics(tmp_path / "run"))


def test_nothing_is_prepared_where_no_measurement_is_due(tmp_path):
    class Unasked(LineObjective):
        def heldout_data(self, share, batches):
            raise AssertionError("nobody needs them")

    train(config_with(2), tmp_path, Unasked())
    train(config_with(5, heldout_every=0), tmp_path, Unasked())
    with pytest.raises(UserError, match=r"config\.log\.heldout_batches"):
        LogConfig(heldout_batches=0)


def test_held_out_sources_are_the_validation_split():
    data = DataConfig(source="toyworld")
    [(source, weight)] = heldout_sources(data, 5)
    assert (len(source), source.split, weight) == (5, "validation", 1.0)
    assert heldout_sources(DataConfig(source="toyworld", split="validation"), 5) == []
