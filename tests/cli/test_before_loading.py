"""Mistakes that cost nothing to find are found before the model's files are read."""

from __future__ import annotations

import pathlib
import shlex

import numpy as np
import pytest

from sora_jax.cli import main as cli
from sora_jax.errors import UserError
from sora_jax.media.video import Video
from sora_jax.pipeline import pipeline

BAD = {
    "no resolution": ("upscale a.png", "--resolution"),
    "no aspect": ("outpaint a.png", "--aspect"),
    "no length": ("extend a.png", "--seconds"),
    "no box": ("inpaint a.png 'a ring'", "--box"),
    "a box of three": ("inpaint a.png --box 0,0,16", "four numbers"),
    "an aspect in words": ("edit a.png 'a ring' --aspect wide", "'wide'"),
    "an aspect for words alone": ("image 'a ring' --aspect 16:0", "16:0"),
    "an empty prompt": ("edit a.png ''", "prompt is empty"),
    "nothing to vary": ("variations ' '", "prompt is empty"),
    "nothing to loop": ("loop", "nothing to loop"),
    "too many steps": ("animate a.png --steps 5000", "from 1 to 1000"),
    "no picture": ("animate text.txt", "text.txt can't be read"),
    "an end before the start": ("smooth a.png --start 1 --end 0.5", "not after the start"),
    "a storyboard's field": ("storyboard prompt.yaml", "card 1 has no 'prompt': it is called text here"),
    "a key twice": ("storyboard twice.yaml", "twice.yaml, line 4: 'text' is a duplicate key"),
    "a card too late": ("storyboard late.yaml", "Card 2"),
    "a file that is there": ("image 'a ring' --no-clobber -o a.png", "is there already"),
    "a picture that is there": ("image 'a ring' --no-clobber", "out.png is there already"),
    "a file that can't be written": ("smooth a.png -o text.txt/b.mp4", "is a file, not a folder"),
    "a mistyped figure": ("evaluate abilities exten", "did you mean extend?"),
    "no file to measure": ("evaluate vae nowhere.mp4", "no file nowhere.mp4"),
    "a mistyped model": ("smooth a.png --model toywrld", "did you mean toyworld?"),
    "a mistyped run": ("smooth a.png --model runs/ona", "did you mean runs/one?"),
}


@pytest.fixture
def home(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.chdir(tmp_path)
    Video(np.zeros((1, 32, 48, 3), np.uint8), 1.0).save("a.png")
    pathlib.Path("out.png").write_bytes(b"")
    pathlib.Path("text.txt").write_text("a text")
    pathlib.Path("prompt.yaml").write_text("cards: [{at: 0, prompt: a ring}]")
    pathlib.Path("twice.yaml").write_text("cards:\n  - at: 0\n    text: a ring\n    text: a star\n")
    pathlib.Path("late.yaml").write_text("cards: [{text: a ring}, {at: 9, text: a star}]")
    pathlib.Path("runs/one").mkdir(parents=True)
    pathlib.Path("runs/one/config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_found_before_the_model_is_loaded(name, home, monkeypatch, capsys):
    loaded: list[tuple] = []
    monkeypatch.setattr(pipeline, "load_model", lambda *arguments: loaded.append(arguments))
    line, words = BAD[name]
    assert cli.main(shlex.split(line)) == 2
    out, err = capsys.readouterr()
    assert words in err and err.startswith("error: ") and err.count("\n") == 1 and out == "", err
    assert loaded == []


def test_a_model_that_is_loaded_at_once_is_checked_at_once(home):
    with pytest.raises(UserError, match="runs/one"):
        pipeline.load("runs/one")
    lazy = pipeline.load("runs/one", lazy=True)
    with pytest.raises(UserError, match="runs/one"):
        lazy.image("a ring")


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda s: s.extend("a.png"), "is missing: give seconds (of what is new) or duration (of all)"),
        (lambda s: s.upscale("a.png"), "by resolution, the short side in pixels, or size"),
        (lambda s: s.outpaint("a.png"), "by aspect (16:9) or size"),
        (lambda s: s.inpaint("a.png"), "by box or mask"),
        (lambda s: s.loop(), "give a prompt."),
        (lambda s: s.edit("a.png", "a ring", size=(9, 9), resolution=9), "size sets the whole"),
        (lambda s: s.edit("a.png", "a ring", size=9), "give (height, width) in pixels"),
    ],
)
def test_python_is_answered_with_keywords(ask, words, home):
    with pytest.raises(UserError) as error:
        ask(pipeline.load("toyworld", lazy=True))
    assert words in str(error.value) and "--" not in str(error.value)
