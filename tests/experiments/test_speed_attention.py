"""experiments/speed/attention.py at toy size: it times what is right, and names what is wrong."""

import importlib.util
import json
import pathlib
import sys

import pytest
from click.testing import CliRunner

SCRIPT = pathlib.Path(__file__).parents[2] / "experiments" / "speed" / "attention.py"
TOY = ["--tokens", "96", "--heads", "1", "--head-width", "16", "--repeats", "1", "--runs", "50,30,9"]


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("speed_of_attention", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_attention_s_contenders_are_timed_or_say_why_not(script, tmp_path, monkeypatch):
    ignorant = lambda q, k, v, ids: script.masked("xla", q, k, v, ids > 0)
    real = script.contenders
    monkeypatch.setattr(script, "contenders", lambda *given: real(*given) | {"ignores runs": ignorant})
    out = tmp_path / "figures.json"
    done = CliRunner().invoke(script.main, [*TOY, "--json", str(out)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text())["rows"]
    for name in ("ours, cpu", "ours, reference", "jax.nn, mask, xla"):
        for work, products in (("forward", 2), ("with gradient", 7)):
            row = rows[name][work]
            worth_doing = 2 * products * 16 * (50**2 + 30**2 + 9**2)
            assert row["tflops"] * 1e12 == pytest.approx(worth_doing / (row["ms"] / 1e3))
            assert row["ratio"] == pytest.approx(row["ms"] / rows["ours, cpu"][work]["ms"])
    assert rows["cudnn, packed"]["forward"] == {"reason": "needs an NVIDIA GPU"}
    assert "ms" not in rows["ignores runs"]["forward"]
    assert "its output is off by" in rows["ignores runs"]["forward"]["reason"]


def test_runs_must_fit(script):
    done = CliRunner().invoke(script.main, ["--tokens", "96", "--runs", "50,47"])
    assert done.exit_code == 2
    assert "don't fit into --tokens 96" in done.output
