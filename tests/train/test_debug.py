"""The `debug` argument of every configuration: all parts of a run, in seconds."""

from __future__ import annotations

import json
import pathlib

import pytest
from helpers.tiny_finetune import write_base
from helpers.tiny_model import TINY_VAE, tiny_bundle

from sora_jax.checkpoints.bundle import save_bundle
from sora_jax.train import __main__ as command
from sora_jax.train.config_files import shipped


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> pathlib.Path:
    """A folder of bundled models, whose "toyworld" compiles faster, and of a diffusers model."""
    folder = tmp_path_factory.mktemp("bundled")
    bundle = tiny_bundle(absolute=True, pooled_text=True, reference_frames=True)
    save_bundle(bundle, folder / "toyworld", dtype="float32")
    for model in ("wan", "ltx"):
        write_base(folder / f"tiny-{model}", model)
    return folder


# What fits the tiny model, and for two of the three transformers plain attention, which compiles faster.
FLAGS = {
    "toyworld_dit": [f"--config.dit.channels={TINY_VAE['channels']}"],
    "ladder": [f"--config.dit.channels={TINY_VAE['channels']}", "--config.dit.attention=reference"],
    "distill": ["--config.dit.attention=reference"],
    "finetune_wan": ["--config.pretrained=FOLDER/tiny-wan"],
    "finetune_ltx": ["--config.pretrained=FOLDER/tiny-ltx"],
    "finetune_vae": ["--config.pretrained=FOLDER/tiny-wan"],
}


@pytest.mark.slow  # three quarters of a minute each; the parts are tested in files of their own
@pytest.mark.parametrize("name", shipped())
def test_a_debug_run_has_all_parts_of_a_run(name, tmp_path, tiny, capsys, monkeypatch):
    monkeypatch.setattr("sora_jax.checkpoints.bundle.BUNDLED", tiny)
    flags = [flag.replace("FOLDER", str(tiny)) for flag in FLAGS.get(name, [])]
    assert command.main([f"--config={name}:debug", f"--workdir={tmp_path}", *flags]) == 0
    assert "done: 10 steps" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "sheets").iterdir()] == ["step_0000010.png"]
    assert (tmp_path / "checkpoints" / "10").is_dir()
    rows = [json.loads(line) for line in pathlib.Path(tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "heldout_loss" in row] == [5, 10]
    assert all(row["loss"] > 0 for row in rows)
