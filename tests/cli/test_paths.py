"""Paths as people write them: the home as ~, names as long as the disk allows, links."""

from __future__ import annotations

import os

import numpy as np
import pytest
from helpers.tiny_model import tiny_bundle

from sora_jax.checkpoints.bundle import find, save_bundle
from sora_jax.cli import main as cli
from sora_jax.cli.terminal import check_output, place_outputs
from sora_jax.errors import UserError, atomic_path
from sora_jax.media.reader import read_media
from sora_jax.media.texts import read_text
from sora_jax.media.video import Video, probe, read_video
from sora_jax.media.writing import read_metadata
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.pipeline.storyboard import read_storyboard

CLIP = Video(np.zeros((1, 16, 16, 3), np.uint8), 8.0, {"prompt": "a ring"})


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The home, and next to it the working folder."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "home"
    assert "~" not in os.listdir()


def test_a_tilde_is_the_home_wherever_python_takes_a_path(home):
    assert CLIP.save("~/clip.png") == home / "clip.png"
    assert len(read_video("~/clip.png")) == 1 and probe("~/clip.png").size == (16, 16)
    assert read_media("~/clip.png").path == home / "clip.png"
    assert read_metadata("~/clip.png")["prompt"] == "a ring"
    (home / "board.yaml").write_text("cards:\n  - at: 0\n    image: ~/clip.png\n")
    assert read_storyboard("~/board.yaml").cards[0].image == home / "clip.png"
    assert read_text("~/board.yaml").startswith("cards")
    save_bundle(tiny_bundle(), "~/model")
    assert find("~/model") == home / "model"
    CLIP.save("~nobody-of-that-name.png")  # a name like any other
    assert os.path.isfile("~nobody-of-that-name.png")


def test_a_tilde_is_the_home_on_the_command_line(home, monkeypatch, capsys):
    CLIP.save(home / "clip.png")
    (home / "prompts.txt").write_text("a ring\n")
    loaded: list[str] = []

    def load(name, lazy):
        loaded.append(name)
        return Pipeline(tiny_bundle(), notify=lambda _: None)

    monkeypatch.setattr("sora_jax.pipeline.pipeline.load", load)
    wanted = [
        ["generate", "--prompt-file", "~/prompts.txt", "-o", "~/new/out.png", "-d", "0.1"],
        ["generate", "a ring", "-o", "~/folder/", "-d", "0.1"],
        ["animate", "~/clip.png", "-o", "~/animated.png", "-d", "0.1"],
        ["variations", "a ring", "-n", "1", "-o", "~/sheet.png", "-d", "0.1"],
        ["info", "~/clip.png"],
    ]
    small = ["-s", "1", "--guidance", "1", "--resolution", "16", "-q"]
    for arguments in wanted:
        status = cli.main(arguments + (small if arguments[0] != "info" else []))
        assert status == 0, (arguments, capsys.readouterr().err)
    made = {str(path.relative_to(home)) for path in home.rglob("*.*")}
    assert {"new/out.png", "folder/a-ring-0.mp4", "animated.png", "sheet.png"} <= made


@pytest.mark.parametrize("letters", [255, 254, 200])
def test_names_as_long_as_the_disk_allows_are_written(letters):
    name = "x" * (letters - 4) + ".png"
    check_output(place_outputs(name, [("a ring", 0)])[0])
    assert os.path.isfile(CLIP.save(name)) and len(os.listdir()) == 1


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "new/" + "x" * 252 + ".png", "y" * 300 + "/x.png"])
def test_names_that_are_too_long_are_refused_before_the_work(name, capsys):
    assert cli.main(["generate", "a ring", "-o", name]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "too long" in error and len(error) < 200
    with pytest.raises(UserError, match="too long"), atomic_path(name):
        raise AssertionError("work began")
    assert cli.main(["generate", "a ring", "-m", "x" * 300]) == 2


def test_a_link_is_followed_and_stays():
    os.makedirs("disk")
    os.symlink("disk/out.png", "link.png")
    os.symlink("link.png", "again.png")
    for _ in range(2):  # it points to nothing, then to a file
        check_output(place_outputs("again.png", [("a ring", 0)])[0])
        CLIP.save("again.png")
        assert os.path.islink("link.png") and os.path.islink("again.png")
        assert os.path.isfile("disk/out.png") and os.listdir("disk") == ["out.png"]
    with pytest.raises(ZeroDivisionError), atomic_path("link.png") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert probe("disk/out.png").size == (16, 16) and os.listdir("disk") == ["out.png"]
