"""A real sweep, small: trained, measured, recorded, and never made twice; a run that stops or fails says so."""

from __future__ import annotations

import json
import pathlib
import re
import types

import pytest
from helpers.tiny_model import TINY_VAE, measured_bundle

from sora_jax.checkpoints.bundle import save_bundle
from sora_jax.cli.main import main
from sora_jax.errors import UserError
from sora_jax.sweep import worker
from sora_jax.sweep.points import load, resolve
from sora_jax.sweep.results import DONE, FAILED, STOPPED, read_row, read_rows, write_point

FILE = """
from sora_jax.sweep.algebra import product, seeds
from sora_jax.sweep.evaluations import evaluation
from sora_jax.sweep.points import Sweep

def get_sweep():
    small = {{
        "autoencoder": {vae!r}, "dit.channels": {channels}, "dit.attention": "reference", "steps": 2,
        "latents.clips": 16, "log.every": 1, "log.heldout_every": 0, "log.sheet_every": 0,
        "pipeline.num_packing_bins": 2, "data.aspects": ("16:9",), "data.crop": "square", "data.durations": (0.0,),
    }}
    return Sweep("toyworld_dit:debug", seeds(1), small, [{evaluations}])
"""
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "sweeps.md"
PICTURES = 'evaluation("loss", "pictures", clips=8, batches=1)'
SAME = 'evaluation("loss", "the same", clips=8, batches=1)'


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("sweep")
    save_bundle(measured_bundle(), folder / "vae", dtype="float32")
    return folder


def write_file(folder: pathlib.Path, *evaluations: str) -> None:
    text = FILE.format(
        vae=str(folder / "vae"), channels=TINY_VAE["channels"], evaluations=", ".join(evaluations)
    )
    (folder / "s.py").write_text(text)


@pytest.mark.slow
def test_a_sweep_trains_measures_and_records_and_nothing_twice(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    write_file(folder, PICTURES)
    assert main(["sweep", "s.py"]) == 0
    out, err = capfd.readouterr()
    assert "pictures/loss" in out and "1 of 1 runs are done" in err
    results = pathlib.Path("runs/sweeps/s/results.jsonl")
    [row] = read_rows(results)
    assert row["labels"] == {"seed": "0"} and row["status"] == DONE and row["error"] is None
    assert row["steps"] == 2 and row["seed"] == 0 and row["tokens"] > 0 and row["processor_seconds"] > 0
    assert row["commit"] is None or (len(row["commit"]) == 40 and isinstance(row["dirty"], bool))
    assert {"training loss", "pictures/loss"} == set(row["metrics"]) and row["overrides"]["steps"] == "2"

    lines = re.findall(r"^\| (`.*?) \|", PAGE.read_text(), re.MULTILINE)
    named = {name for line in lines for name in re.findall("`(.+?)`", line)}
    assert len(named) > 12 and named <= set(row), "docs/sweeps.md names fields that a row hasn't"

    made = [*pathlib.Path("runs").rglob("metrics.jsonl"), *pathlib.Path("runs").rglob("checkpoints/2")]
    times = {path: path.stat().st_mtime_ns for path in (results, *made)}
    assert main(["sweep", "s.py"]) == 0
    assert len(times) == 3 and {path: path.stat().st_mtime_ns for path in times} == times
    write_file(folder, PICTURES, SAME)  # measured again, not trained again
    [point] = resolve(load("s.py"))
    workdir = write_point(point, "s", pathlib.Path("runs/sweeps/s"), pathlib.Path("runs/sweeps/latents"))
    assert worker.work(workdir) == DONE
    assert {path: path.stat().st_mtime_ns for path in times} == times
    again = read_row(workdir)
    assert again["key"] == point.key != row["key"]
    assert again["metrics"]["pictures/loss"] == again["metrics"]["the same/loss"]
    assert again["metrics"]["pictures/loss"] == pytest.approx(row["metrics"]["pictures/loss"], rel=1e-4)


def failing(error: Exception):
    def run(*_):
        raise error

    return run


@pytest.mark.parametrize(
    ("run", "status", "words"),
    [
        (failing(UserError("Training stopped at step 3.")), FAILED, "Training stopped at step 3."),
        (
            failing(RuntimeError("odd\nmore")),
            FAILED,
            "The program failed (RuntimeError: odd): the folder's log.txt",
        ),
        (lambda *_: types.SimpleNamespace(step=1), STOPPED, None),
    ],
)
def test_a_run_that_fails_says_why_and_one_that_stops_has_no_row(
    folder, monkeypatch, tmp_path, run, status, words
):
    write_file(folder)
    [point] = resolve(load(str(folder / "s.py")))
    workdir = write_point(point, "s", tmp_path, tmp_path / "latents")
    monkeypatch.setattr(worker.training, "run", run)
    assert worker.main([str(workdir)]) == {FAILED: 2, STOPPED: 130}[status]
    row = read_row(workdir)
    if words is None:
        assert row is None
        return
    assert row["status"] == FAILED and row["error"].startswith(words) and row["labels"] == {"seed": "0"}
    assert json.loads((workdir / "point.json").read_text())["config"]["steps"] == 2
