"""`sora-jax export`: what a run learned, as a LoRA file or a diffusers folder, is what the run's own model does."""

from __future__ import annotations

import functools
import json
import shutil

import jax
import ltx_check
import numpy as np
import pytest
import wan_check
from click.testing import CliRunner
from finetune_write import write_run
from helpers.diffusers_folder import golden
from helpers.parity import relative_error
from helpers.tiny_finetune import write_base
from helpers.tiny_run import tiny_config as tiny_dit_config

import sora_jax
from sora_jax.checkpoints.finetuned import load_lora, lora_config
from sora_jax.cli.main import cli
from sora_jax.models.low_rank import with_lora

VELOCITY = {"wan": wan_check.run, "ltx": ltx_check.run}
NAMES = ("lora", "full")


@pytest.fixture(scope="module", params=VELOCITY)
def model(request):
    return request.param


@pytest.fixture(scope="module")
def velocity(model):
    """Of a transformer, for the latent of the model's golden file."""
    return functools.partial(VELOCITY[model], npz=golden(f"{model}_tiny"))


@pytest.fixture(scope="module")
def place(tmp_path_factory, model):
    """Two runs, and their exports."""
    place = tmp_path_factory.mktemp("export")
    base = write_base(place / "base", model)
    write_run(place / "lora", base, model, lora__alpha="8")
    write_run(place / "full", base, model, lora__rank="0")
    for name in NAMES:
        result = CliRunner().invoke(cli, ["export", str(place / name), "--to", str(place / f"{name}-out")])
        assert result.exit_code == 0, result.output
    return place


def test_an_exported_lora_merges_to_what_the_run_does(place, velocity):
    """Alpha is twice the rank: a file that left it out would be off."""
    base = sora_jax.load(place / "base").dit
    unmerged = velocity(with_lora(base, load_lora(place / "lora"), lora_config(place / "lora")))
    merged = velocity(sora_jax.load(place / "lora").dit)
    file = place / "lora-out" / "pytorch_lora_weights.safetensors"
    exported = velocity(sora_jax.load(place / "base", lora=file).dit)
    assert relative_error(merged, unmerged) < 1e-5
    assert relative_error(exported, unmerged) < 1e-5
    assert relative_error(velocity(base), unmerged) > 0.01


def test_an_exported_folder_is_the_runs_model(place, velocity):
    own, exported = (sora_jax.load(place / name) for name in ("full", "full-out"))
    for leaf, other in zip(jax.tree.leaves(own.dit), jax.tree.leaves(exported.dit), strict=True):
        np.testing.assert_array_equal(leaf, other)
    base = sora_jax.load(place / "base").dit
    assert relative_error(velocity(base), velocity(own.dit)) > 0.01
    own8, exported8 = (sora_jax.load(place / name, weights="int8").dit for name in ("full", "full-out"))
    assert own8.blocks.up.kernel.dtype == np.int8
    jax.tree.map(np.testing.assert_array_equal, own8, exported8)
    assert exported.sampling == own.sampling
    given = {path.relative_to(place / "base") for path in (place / "base").rglob("*")}
    assert {path.relative_to(place / "full-out") for path in (place / "full-out").rglob("*")} == given


def test_what_can_not_be_exported_is_said(place, tmp_path):
    def says(*words):
        result = CliRunner().invoke(cli, ["export", *map(str, words)])
        return str(result.exception)

    assert "is there already" in says(place / "lora", "--to", place / "lora-out")
    assert "choose one of" in says(place / "lora", "--to", tmp_path / "x", "--weights", "int4")
    assert "no checkpoint of step 7" in says(place / "lora", "--to", tmp_path / "x", "--step", 7)
    assert "holds no training run" in says(tmp_path, "--to", tmp_path / "x")
    other = tmp_path / "dit"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(tiny_dit_config(tmp_path, 3).to_dict()))
    assert "is of objective dit: runs on top of a diffusers folder" in says(other, "--to", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    moved = tmp_path / "moved"
    shutil.copytree(place / "lora", moved)
    config = json.loads((moved / "config.json").read_text()) | {"pretrained": "nowhere"}
    (moved / "config.json").write_text(json.dumps(config))
    assert "trained on top of 'nowhere', which isn't there" in says(moved, "--to", tmp_path / "x")
