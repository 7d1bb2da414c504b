"""Each ablation that comes with the package: its docstring, and its debug form, all parts of every arm."""

from __future__ import annotations

import ast
import pathlib
import re
import shlex

import pytest
from helpers.tiny_model import TINY_VAE, tiny_bundle

from sora_jax.checkpoints.bundle import save_bundle
from sora_jax.cli.main import main
from sora_jax.sweep.points import load, resolve, shipped
from sora_jax.sweep.results import DONE, collect, write_point
from sora_jax.sweep.table import as_markdown, make_table
from sora_jax.sweep.worker import work

NAMES = (
    *("aspect_ratio", "captions", "compute", "conditioning", "coordinates"),
    *("duration", "packing", "resolution", "sigma"),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, str]:
    """Overrides by which a debug form compiles faster still: a tiny autoencoder, plain attention, two steps."""
    folder = tmp_path_factory.mktemp("tiny")
    save_bundle(tiny_bundle(), folder / "vae", dtype="float32")
    own = {"autoencoder": folder / "vae", "dit.channels": TINY_VAE["channels"], "dit.attention": "reference"}
    short = {"steps": 2, "log.every": 1, "log.heldout_every": 0, "log.sheet_every": 0, "latents.clips": 16}
    return {key: str(value) for key, value in (own | short).items()}


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("latents")


def test_the_ablations_that_come_with_the_package():
    assert tuple(sorted(shipped())) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_debug_form_has_all_parts_of_every_arm(name, tiny, latents, tmp_path):
    sweep = load(f"{name}:debug")
    points = resolve(sweep, tiny)
    assert len(points) == len({tuple(point.labels.items()) for point in points}) >= 3
    for point in points:
        workdir = write_point(point, name, tmp_path, latents)
        assert work(workdir) == DONE, (workdir / "result.json").read_text()
    table = as_markdown(make_table(collect(tmp_path)))
    for evaluation in sweep.evaluations:
        assert f"{evaluation.name}/" in table


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_has_question_commands_prediction_and_time(name, capsys):
    text = ast.get_docstring(ast.parse(shipped()[name].read_text()))
    assert "?" in text.split("\n")[0]
    words = " ".join(text.split())
    for part in (
        "Arms",
        "Expected (a prediction):",
        "Time (estimated, not measured):",
        "On one GPU: not run.",
    ):
        assert f" {part}" in words
    assert "Equal compute:" in text or name == "compute"
    commands = re.findall(r"^ +sora-jax (.+)$", text, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["sweep"] * 3
    run, table, debug = map(shlex.split, commands)
    assert table[1:3] == ["table", name] and debug == ["sweep", name, "--debug"]
    assert main([*run, "--print"]) == 0
    assert capsys.readouterr().out.count("--only") == int(re.search(r"(\d+) runs", text)[1])
