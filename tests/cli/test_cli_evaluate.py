"""`sora-jax evaluate`: tables, figures and sheets."""

import errno
import json
import pathlib

import numpy as np
from helpers.fake_pipeline import written_files

from sora_jax.cli import main as cli
from sora_jax.media.video import Video, read_video


def test_evaluate_vae_prints_a_table_and_writes_its_files(fake, capsys):
    rng = np.random.default_rng(0)
    Video(rng.integers(0, 255, (6, 48, 64, 3), np.uint8), 8.0).save("a.mp4")
    Video(np.full((1, 40, 40, 3), 100, np.uint8), 1.0).save("b.png")
    assert (
        cli.main(
            [
                "evaluate",
                "vae",
                "a.mp4",
                "b.png",
                "--resolution",
                "32",
                "--json",
                "j/x.json",
                "--sheet",
                "s.png",
            ]
        )
        == 0
    )
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split() == ["file", "size", "frames", "PSNR", "dB", "SSIM"]
    assert lines[1].split()[:3] == ["a.mp4", "42×32", "6"] and lines[2].split()[3] == "lossless"
    assert lines[3].startswith("mean") and lines[4:] == ["wrote j/x.json", "wrote s.png"]
    assert "7/7" in err
    result = json.loads(pathlib.Path("j/x.json").read_text())
    assert result["model"] == "fake" and len(result["files"]) == 2
    assert read_video("s.png").size[1] > 200


def test_evaluate_toyworld_prints_shares_and_writes_its_files(fake, capsys):
    arguments = [
        "evaluate",
        "toyworld",
        "--truth",
        "--clips",
        "2",
        "--durations",
        "1,2",
        "--split",
        "validation",
    ]
    assert cli.main([*arguments, "--json", "x.json", "--sheet", "s.png"]) == 0
    out, err = capsys.readouterr()
    rows = {line[:9].strip(): line[9:].split() for line in out.splitlines()[:8]}
    assert list(rows) == ["attribute", "colour", "shape", "direction", "size", "count", "inside", "all three"]
    assert rows["colour"][:2] == ["2/2", "100.0%"] and rows["count"][-1] == "-"
    assert "64×64, 8 frames" in out and "64×64, 16 frames" in out
    assert "2/2" in err and "clip/s" in err
    assert fake.loads == [], "true clips need no model"
    result = json.loads(pathlib.Path("x.json").read_text())
    assert result["settings"]["source"] == "truth" and len(result["clips"]) == 2
    assert cli.main(["evaluate", "toyworld", "--clips", "1", "--steps", "3", "--model", "m", "-q"]) == 0
    assert fake.loads == ["m"] and fake.requests[0].steps == 3


def test_figures_that_cannot_be_written_leave_the_old_ones(fake, capsys, monkeypatch):
    pathlib.Path("figures.json").write_text("{}")
    Video(np.zeros((1, 32, 32, 3), np.uint8), 1.0).save("x.png")

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("json.dumps", refuse)
    assert cli.main(["evaluate", "vae", "x.png", "--resolution", "32", "--json", "figures.json"]) == 2
    assert "No space is left on the disk that holds figures.json" in capsys.readouterr().err
    assert pathlib.Path("figures.json").read_text() == "{}" and written_files() == ["figures.json", "x.png"]
