"""Each ablation that comes with the package: its docstring, and its debug form.

A debug form takes a minute or more of processor time, nearly all of it compiling: all of it is run by `pytest -m slow`.
Otherwise every arm goes as far as the compiler: its clips are encoded and packed, and its loss is traced.
"""

from __future__ import annotations

import ast
import pathlib
import re
import shlex

import jax
import numpy as np
import pytest
from flax import nnx
from helpers.slow import rest_slow
from helpers.tiny_model import TINY_VAE, measured_bundle

from sora_jax.checkpoints.bundle import save_bundle
from sora_jax.cli.main import main
from sora_jax.distributed.mesh import WHOLE
from sora_jax.models.dit import DiT
from sora_jax.sweep.points import Point, load, loss_config, resolve, shipped, training_config
from sora_jax.sweep.results import DONE, collect, write_point
from sora_jax.sweep.table import as_markdown, make_table
from sora_jax.sweep.worker import work
from sora_jax.train.dit import DiTObjective

NAMES = (
    *("aspect_ratio", "canvas", "captions", "compute", "conditioning", "coordinates"),
    *("duration", "packing", "resolution", "sigma"),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, str]:
    """Overrides by which a debug form compiles faster still: a tiny autoencoder, plain attention, two steps."""
    folder = tmp_path_factory.mktemp("tiny")
    save_bundle(measured_bundle(), folder / "vae", dtype="float32")
    own = {"autoencoder": folder / "vae", "dit.channels": TINY_VAE["channels"], "dit.attention": "reference"}
    short = {"steps": 2, "log.every": 1, "log.heldout_every": 0, "log.sheet_every": 0, "latents.clips": 16}
    short |= {"pipeline.num_packing_bins": 2, "pipeline.prefetch": 0}
    return {key: str(value) for key, value in (own | short).items()}


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("latents")


def test_the_ablations_that_come_with_the_package():
    assert tuple(sorted(shipped())) == NAMES


@pytest.fixture
def uncompiled(monkeypatch):
    """Encoding that gives latents of the right shape, without a program for each shape of clip."""

    def encode(vae, clips):
        B, T, Y, X, _ = clips.shape
        return np.zeros((B, 1 + (T - 1) // 4, Y // 8, X // 8, vae.config.channels), np.float32)

    monkeypatch.setattr("sora_jax.data.encode._to_latent", encode)


def trace(point: Point, workdir: pathlib.Path, latents: pathlib.Path) -> None:
    """Encodes and packs the point's clips, and traces its loss on a batch of them."""
    config = training_config(point, latents)
    objective = DiTObjective(config, workdir)
    batch = next(iter(objective.data(config, WHOLE)))
    key = jax.random.key(0)
    model = jax.eval_shape(lambda: DiT(objective.dit, rngs=nnx.Rngs(0)))
    loss, _ = jax.eval_shape(objective.loss, model, batch, key)
    assert loss.shape == () and objective.tokens(batch)[0] > 0
    for one in point.evaluations:
        if one.kind == "loss":
            settings = one.settings
            measured = loss_config(
                point.common, config, settings.get("overrides", {}), settings.get("own", ())
            )
            assert measured.dit == config.dit and not measured.flow.text_dropout


@pytest.mark.parametrize("name", rest_slow(NAMES, 3))
def test_every_arm_of_the_debug_form_reads_its_clips_and_has_a_loss(name, tiny, uncompiled, tmp_path):
    points = resolve(load(f"{name}:debug"), tiny)
    assert len(points) == len({tuple(point.labels.items()) for point in points}) >= 3
    for point in points:
        trace(point, tmp_path / point.folder, tmp_path / "latents")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_debug_form_runs_all_parts_of_every_arm(name, tiny, latents, tmp_path):
    sweep = load(f"{name}:debug")
    for point in resolve(sweep, tiny):
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
        "On one GPU: not run.",
    ):
        assert f" {part}" in words
    assert re.search(r" Time \((estimated, not )?measured\):", words)
    assert "Equal compute:" in text or name == "compute"
    commands = re.findall(r"^ +sora-jax (.+)$", text, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["sweep"] * 3
    run, table, debug = map(shlex.split, commands)
    assert table[1:3] == ["table", name] and debug == ["sweep", name, "--debug"]
    assert main([*run, "--print"]) == 0
    assert capsys.readouterr().out.count("--only") == int(re.search(r"(\d+) runs", text)[1])
