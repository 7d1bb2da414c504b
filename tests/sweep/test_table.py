"""The table: means and Student's intervals over seeds, differences run by run, as Markdown and as a picture."""

from __future__ import annotations

import json
import math
import pathlib

import numpy as np
import PIL.Image
import pytest
from scipy import stats

from sora_jax.cli.main import main
from sora_jax.errors import UserError
from sora_jax.sweep.results import collect, read_rows, training_figures
from sora_jax.sweep.table import as_markdown, draw, estimate, latest, make_table


def row(index: int, arm: str, seed: int, size: str = "S", **changes) -> dict:
    metrics = {"loss": 1.0 + 0.1 * (arm == "b") + 0.5 * seed + 0.01 * seed * (arm == "b"), "64 px/shape": 0.5}
    own = {"key": f"k{index}", "index": index, "labels": {"frames": arm, "size": size, "seed": str(seed)}}
    cost = {"steps": 10, "tokens": 2000, "positions": 3000, "flops": 2e15, "processor_seconds": 12.0}
    return own | cost | {"status": "done", "metrics": metrics, "sweep_key": "s", "finished": "1"} | changes


ROWS = [row(3 * n + seed, arm, seed) for n, arm in enumerate("ab") for seed in range(3)]


def test_the_interval_is_students():
    rng = np.random.default_rng(0)
    values = rng.normal(size=5)
    found = estimate(values.tolist())
    low, high = stats.t.interval(0.95, 4, values.mean(), stats.sem(values))
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high)) and found.n == 5
    assert estimate([2.0]).half is None and estimate([2.0]).mean == 2.0
    assert math.isnan(estimate([]).mean) and str(estimate([])) == "–"
    # It holds the true mean in 95% of cases.
    many = rng.normal(size=(4000, 3))
    inside = [abs(one.mean) <= one.half for one in (estimate(three.tolist()) for three in many)]
    assert 0.935 < np.mean(inside) < 0.965


def test_means_are_over_seeds_and_differences_run_by_run():
    table = make_table(ROWS)
    assert table.axes == ("frames", "size") and table.arms == (("a", "S"), ("b", "S"))
    assert table.estimate(0, "loss").mean == pytest.approx(1.5) and table.estimate(0, "loss").n == 3
    difference = table.difference(1, 0, "loss")
    assert difference.mean == pytest.approx(0.11)
    # Seeds differ by half, arms by a tenth: run by run that is seen all the same.
    assert difference.half < 0.03 < 0.5 < table.estimate(1, "loss").half
    text = as_markdown(table)
    assert "| frames | size | n | loss | 64 px/shape | tokens | TFLOP | processor seconds |" in text
    assert "| a | S | 3 | 1.5 ± 1.2 | 0.5 ± 0 | 2,000 | 2000 | 12 |" in text
    assert "Difference from a, S, run by run of the same seed" in text and "| b | S | 0.110 ± 0.025 |" in text
    assert "Difference from b, S" in as_markdown(table, "b, S")


def test_by_one_axis_runs_of_the_others_come_together():
    rows = ROWS + [row(6 + 3 * n + seed, arm, seed, "B") for n, arm in enumerate("ab") for seed in range(3)]
    table = make_table(rows, by="frames")
    assert table.arms == (("a",), ("b",)) and table.estimate(0, "loss").n == 6
    assert table.difference(1, 0, "loss").n == 6
    assert make_table(rows, metrics=("px",)).metrics == ("64 px/shape",)


def test_failed_and_other_runs_have_no_part_in_it():
    rows = [*ROWS, row(6, "a", 3, status="failed", metrics={}), row(7, "c", 0, metrics={"loss": None})]
    table = make_table(rows)
    assert table.estimate(0, "loss").n == 3 and table.estimate(2, "loss").n == 0
    old = [one | {"sweep_key": "old", "finished": "0"} for one in ROWS]
    assert latest([*old, *ROWS]) == ROWS and latest([*ROWS, *old]) == ROWS
    assert "| c | S | 0 | – | – |" in as_markdown(table)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: make_table([]), "No run of the sweep has finished yet"),
        (lambda: make_table(ROWS, by="frame"), "has no axis 'frame': did you mean 'frames'?"),
        (lambda: make_table(ROWS, metrics=("fvd",)), "No metric's name has fvd: there are loss, 64 px/shape"),
        (lambda: as_markdown(make_table(ROWS), "d"), "The sweep has no arm 'd': did you mean"),
    ],
)
def test_what_is_not_in_the_results_is_said(call, words):
    with pytest.raises(UserError, match=words):
        call()


def test_the_picture_has_a_panel_a_metric(tmp_path):
    draw(make_table(ROWS), tmp_path / "one.png", "frames")
    draw(make_table(ROWS, metrics=("loss",)), tmp_path / "two.png", "frames")
    both, one = (PIL.Image.open(tmp_path / name).size for name in ("one.png", "two.png"))
    assert both[0] > one[0] > 300
    draw(make_table([row(0, "a", 0)]), tmp_path / "single.png", "no interval")


def test_the_command_reads_any_results(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in ROWS))
    files = ["--plot", "table.png", "--markdown", "table.md"]
    assert main(["sweep", "table", "results.jsonl", "--metric", "loss", *files]) == 0
    assert "1.5 ± 1.2" in capsys.readouterr().out and "1.5 ± 1.2" in pathlib.Path("table.md").read_text()
    assert PIL.Image.open("table.png").size[0] > 300
    pathlib.Path("results.jsonl").write_text('{"key": \n')
    assert main(["sweep", "table", "results.jsonl"]) == 2
    assert "error: results.jsonl is no file of results" in capsys.readouterr().err


def test_results_are_those_of_the_folders_and_of_before(tmp_path):
    for number, status in ((0, "done"), (1, "failed")):
        (tmp_path / f"run{number}").mkdir()
        (tmp_path / f"run{number}" / "result.json").write_text(
            json.dumps(row(number, "a", number, status=status))
        )
    (tmp_path / "results.jsonl").write_text(
        "".join(json.dumps(one) + "\n" for one in (row(1, "a", 1), row(2, "a", 2)))
    )
    rows = collect(tmp_path)
    assert [one["key"] for one in rows] == ["k0", "k1", "k2"] and rows == read_rows(
        tmp_path / "results.jsonl"
    )
    assert rows[1]["status"] == "done", "a failure replaced a result"


def test_what_a_run_cost_is_the_sum_of_its_log(tmp_path):
    rates = ("tokens_per_step", "flops_per_step", "padding", "processor_seconds")
    lines = [
        {"step": 5, "loss": 2.0} | dict(zip(rates, (80, 3e6, 0.2, 4.0), strict=True)),
        {"step": 8, "loss": 1.5} | dict(zip(rates, (90, 4e6, 0.1, 2.5), strict=True)),
        {"step": 9, "loss": 1.25, "heldout_loss": 1.75, "processor_seconds": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert training_figures(tmp_path) == {
        "steps": 9,
        "tokens": 5 * 80 + 3 * 90,
        "positions": 8 * 100,
        "flops": 5 * 3e6 + 3 * 4e6,
        "processor_seconds": 7.5,
        "metrics": {"training loss": 1.25, "held-out loss of its own data": 1.75},
    }
    assert training_figures(tmp_path / "nothing")["metrics"] == {}
