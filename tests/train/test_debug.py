"""The `debug` argument of every configuration: all parts of a run, in seconds."""

from __future__ import annotations

import json
import pathlib

import pytest
from flax import nnx

from sora_jax.checkpoints.bundle import Bundle, save_bundle
from sora_jax.models.vae import VAE, VAEConfig
from sora_jax.train import __main__ as command
from sora_jax.train.config_files import shipped


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> list[str]:
    """Flags that put a tiny one in the place of the bundled one, and plain attention: both compile faster."""
    shape = VAEConfig(
        channels=4, encoder_widths=(8, 8, 8), decoder_widths=(8, 8, 8), decoder_blocks=(0, 1, 1)
    )
    folder = tmp_path_factory.mktemp("autoencoder")
    save_bundle(Bundle("vae", VAE(shape, rngs=nnx.Rngs(0))), folder)
    return [f"--config.autoencoder={folder}", "--config.dit.channels=4", "--config.dit.attention=reference"]


@pytest.mark.parametrize("name", shipped())
def test_a_debug_run_has_all_parts_of_a_run(name, tmp_path, autoencoder, capsys):
    # A student has its teacher's parts.
    flags = {"toyworld_vae": [], "distill": autoencoder[-1:]}.get(name, autoencoder)
    assert command.main([f"--config={name}:debug", f"--workdir={tmp_path}", *flags]) == 0
    assert "done: 10 steps" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "sheets").iterdir()] == ["step_0000010.png"]
    assert (tmp_path / "checkpoints" / "10").is_dir()
    rows = [json.loads(line) for line in pathlib.Path(tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "heldout_loss" in row] == [5, 10]
    assert all(row["loss"] > 0 for row in rows)
