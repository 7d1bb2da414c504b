"""Training the real transformer, small: one compilation for every shape, exact resume, a run that can be used."""

from __future__ import annotations

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
import warnings

import jax
import numpy as np
import pytest
from helpers.tiny_run import tiny_config

from sora_jax.checkpoints.store import load_params, named_leaves
from sora_jax.errors import UserError
from sora_jax.pipeline.pipeline import load
from sora_jax.train.__main__ import run
from sora_jax.train.loop import make_steps
from sora_jax.train.objectives import make_objective
from sora_jax.train.optim import OptimConfig

SCRIPT = pathlib.Path(__file__).parents[1] / "helpers" / "tiny_run.py"


def parameters(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    return load_params(workdir, ema=False) | {
        f"ema/{k}": v for k, v in load_params(workdir, ema=True).items()
    }


def assert_equal_runs(one: pathlib.Path, other: pathlib.Path) -> None:
    ours, theirs = parameters(one), parameters(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    losses = [
        {
            row["step"]: row["loss"]
            for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        }
        for run in (one, other)
    ]
    assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> pathlib.Path:
    """A run of nine steps that nothing interrupted; a second compilation would be an error."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    config = tiny_config(workdir.parent, 9)
    # The runs that are compared with this one don't measure it.
    config.log.update(sheet_every=9, heldout_every=4, heldout_batches=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*compiled again.*")
        run(config, workdir)
    return workdir


def test_one_compilation_serves_a_stream_of_many_shapes(whole):
    config = json.loads((whole / "config.json").read_text())
    assert len(config["data"]["durations"]) > 2 and len(config["data"]["aspects"]) > 2
    assert len(config["latents"]["layouts"]) > 2 and len(config["pipeline"]["canvases"]) > 2
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert [row["step"] for row in rows if np.isfinite(row.get("heldout_loss", np.nan))] == [4, 8]


@pytest.mark.slow
def test_a_run_that_stopped_goes_on_to_the_same_parameters(whole, tmp_path):
    for steps in (4, 9):  # 4 is off the grid of checkpoints: the end of a run is saved too
        run(tiny_config(tmp_path, steps), tmp_path / "run")
    assert_equal_runs(whole, tmp_path / "run")


@pytest.mark.slow
def test_a_run_can_be_drawn_from(whole):
    assert list((whole / "sheets").glob("*.png"))
    video = load(whole).generate("a red circle", duration=0.5, resolution=32, steps=2)
    assert video.frames.shape == (4, 32, 32, 3)


def test_a_run_begins_from_another_ones_average(whole, tmp_path):
    """Under jit, as `train` has it; its own average begins there too."""
    config = tiny_config(whole.parent, 1)
    config.init_from = str(whole)
    init, _ = make_steps(make_objective(config, tmp_path / "next"), OptimConfig())
    state = jax.jit(init)(jax.random.key(0))
    before = load_params(whole, ema=True)
    assert not np.array_equal(before["patch_in/kernel"], load_params(whole, ema=False)["patch_in/kernel"])
    for model in (state.params, state.ema):
        after = named_leaves(model)
        assert after.keys() == before.keys()
        for name in before:
            np.testing.assert_array_equal(after[name], before[name], err_msg=name)


def test_a_run_knows_the_schedule_it_was_trained_with(whole):
    wanted = tiny_config(whole.parent, 9).flow.base_tokens
    assert load(whole).bundle.base_tokens == wanted != 64.0


def test_a_run_of_another_model_is_refused(whole):
    config = tiny_config(whole.parent, 9)
    config.dit.layers = 3
    with pytest.raises(UserError, match="layers"):
        run(config, whole)


@pytest.mark.slow
def test_killed_at_three_random_steps_the_parameters_are_the_same_bit_for_bit(whole, tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path / "run"), "9"]
    environment = os.environ | {"PYTHONPATH": f"{SCRIPT.parents[2]}{os.pathsep}{SCRIPT.parents[1]}"}
    random_steps = sorted(random.Random(time.time_ns()).sample(range(1, 9), 3))
    for step in random_steps:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        metrics = tmp_path / "run" / "metrics.jsonl"
        while process.poll() is None:
            rows = metrics.read_text().splitlines() if metrics.exists() else []
            if rows and json.loads(rows[-1])["step"] >= step:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        process.wait()
    assert subprocess.run(command, env=environment).returncode == 0
    assert_equal_runs(whole, tmp_path / "run")
