"""Training on a folder of a few short clips, as people have it: what will be needed is tried first, and all is said."""

from __future__ import annotations

import json
import pathlib

import pytest
from helpers.film_files import pictures, write
from helpers.tiny_model import TINY_VAE
from helpers.tiny_run import tiny_config
from ml_collections import ConfigDict

from sora_jax.data import encode
from sora_jax.errors import UserError
from sora_jax.models.text import TextConfig
from sora_jax.train.__main__ import run
from sora_jax.train.objectives import make_objective
from sora_jax.train.sheets import ClipSheets


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """Three clips of two seconds with captions, and one that was cut off while it was copied."""
    place = tmp_path / "clips"
    place.mkdir()
    for name in "abcd":
        write(place / f"{name}.mp4", pictures(16, 32, 48), fps=8)
        (place / f"{name}.txt").write_text(f"a grey card number {name}")
    data = write(place / "cut.mkv", pictures(40, 32, 48), fps=8).read_bytes()
    (place / "cut.mkv").write_bytes(data[: len(data) // 2])
    return place


def vae_config(folder: pathlib.Path, **data) -> ConfigDict:
    return ConfigDict(
        {
            "objective": "vae",
            "steps": 2,
            "vae": TINY_VAE,
            "loss": {"batch_size": 2, "crop": (5, 16, 16)},
            "data": {"source": str(folder), "resolutions": (32,), "rates": (4.0, 8.0)} | data,
            "optim": {"lr": 1e-3},
            "log": {"every": 1, "sheet_every": 2, "heldout_every": 2, "heldout_batches": 1},
        }
    )


@pytest.mark.slow
def test_an_autoencoder_learns_from_a_folder_to_its_last_sheet(folder, tmp_path, capsys):
    run(vae_config(folder), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "sheets").iterdir()] == ["step_0000002.png"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["data/skipped_files"] for row in rows] == [1, 1]
    assert ["heldout_loss" in row for row in rows] == [False, True]
    told = capsys.readouterr().err
    assert told.index("data: ") < told.index("parameters"), "before the work"
    assert "4 videos (8.0 seconds); 4 of 4 with captions; 4 of 48×32; 4 of 8 fps" in told
    assert "skipped 1 file that can't be read" in told and "cut.mkv" in told


def test_a_folder_is_refused_before_the_first_step(folder, tmp_path):
    with pytest.raises(UserError, match="cut.mkv"):
        run(vae_config(folder, damaged="refuse"), tmp_path / "run")
    config = vae_config(folder)
    config.loss.crop = (41, 16, 16)
    with pytest.raises(UserError, match="a clip takes 41 frames"):
        run(config, tmp_path / "other")
    assert not list(tmp_path.glob("*/checkpoints/[0-9]*")) and not list(tmp_path.glob("*/sheets/*"))


def test_an_autoencoders_sheet_shows_what_is_held_out(folder, tmp_path):
    objective = make_objective(vae_config(folder), tmp_path)
    assert [label for _, label in objective.sheet_clips] == ["true"] * 4
    for name in "bcd":
        (folder / f"{name}.mp4").unlink()
    objective = make_objective(vae_config(folder), tmp_path)
    assert [label for _, label in objective.sheet_clips] == ["true (a training clip)"] * 4


def dit_objective(folder: pathlib.Path, tmp_path: pathlib.Path, **data):
    config = tiny_config(tmp_path, 2)
    config.data.update({"source": str(folder), "aspects": ("native",)} | data)
    config.log.sheet_every = 1
    return make_objective(config, tmp_path / "run", ClipSheets)


def test_a_transformers_sheet_is_tried_before_its_first_step(folder, tmp_path, capsys):
    (folder / "d.txt").write_text("many words " * 60)
    objective = dit_objective(folder, tmp_path)
    objective.check()
    told = capsys.readouterr().err
    assert told.startswith("data: ") and "cut.mkv" in told
    assert "1 of 4 captions have more than the 64 tokens that the text encoder takes and are cut" in told
    assert len(objective.sheets.clips) == 6
    for clip, request, label in objective.sheets.clips:
        assert clip.key.startswith("d.mp4") and clip.video.size == request.size == (32, 48)
        assert objective.text_encoder.count_tokens(request.prompt) <= objective.limits.text
        assert label == request.prompt and request.prompt.startswith("many words many")


def test_a_sheet_asks_for_what_a_row_holds(folder, tmp_path, capsys):
    objective = dit_objective(folder, tmp_path, resolutions=(32, 640))
    sizes = {(clip.video.size, request.size) for clip, request, _ in objective.sheets.clips}
    assert ((640, 960), (32, 48)) in sizes and ((32, 48), (32, 48)) in sizes
    objective = dit_objective(folder, tmp_path, resolutions=(640,))
    assert objective.sheets.clips == [] and "sheets of samples leave d.mp4" in capsys.readouterr().err
    assert objective.sample_sheet(None, 1) is None


def test_captions_that_a_row_has_no_room_for_are_refused(folder, tmp_path):
    config = tiny_config(tmp_path, 2)
    config.text.max_tokens = 256
    with pytest.raises(UserError, match="256 tokens .* room for 192"):
        make_objective(config, tmp_path / "run", ClipSheets).check()


def test_as_many_clips_are_encoded_as_the_footage_gives(folder, tmp_path, monkeypatch):
    objective = dit_objective(folder, tmp_path, durations=(1.0,))
    asked = []
    monkeypatch.setattr(encode, "write_latents", lambda *args, **kwargs: asked.append(args) or [])
    settings = encode.LatentsConfig(clips=24_000)
    encode.encode_sources(
        settings, objective.data_config, objective.vae, TextConfig(kind="hash"), tmp_path, objective.sources
    )
    [(source, *_, clips, _)] = asked
    assert clips == source.natural_clips == 8 * 6
