"""Storyboards: what a file says, what becomes of it, and what is refused."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pytest
from helpers.tiny_model import tiny_bundle
from PIL import Image

from sora_jax.checkpoints.components import Limits
from sora_jax.errors import UserError
from sora_jax.media.video import Video
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.pipeline.storyboard import Card, Storyboard, read_storyboard, storyboard

WHOLE = """
duration: 3
fps: 8
resolution: 32
aspect: 16:9
loop: 0.5
cards:
  - at: 0
    text: no
    image: red.png
  - at: 1.5
    text: a blue ring
  - at: 2
    clip: film.gif
    start: 0.25
    end: 0.75
    text:
"""


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    limits = Limits(tokens=36, latent_frames=4, frame_tokens=8, resolution=32, fps=24, text=12, text_len=24)
    return Pipeline(tiny_bundle(limits))


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    Image.new("RGB", (32, 32), (255, 0, 0)).save(tmp_path / "red.png")
    frames = np.repeat(np.arange(8, dtype=np.uint8)[:, None, None, None] * 20, 32 * 48 * 3, 1)
    Video(frames.reshape(8, 32, 48, 3), 8.0).save(tmp_path / "film.gif")
    return tmp_path


def written(folder: pathlib.Path, text: str) -> pathlib.Path:
    (folder / "board.yaml").write_text(text)
    return folder / "board.yaml"


def test_a_file_is_read_as_it_is_written(folder):
    board = read_storyboard(written(folder, WHOLE))
    assert board == Storyboard(
        cards=(
            Card(0.0, "no", image=folder / "red.png"),
            Card(1.5, "a blue ring"),
            Card(2.0, "", clip=folder / "film.gif", start=0.25, end=0.75),
        ),
        duration=3.0,
        fps=8.0,
        resolution=32,
        aspect="16:9",
        loop=0.5,
    )
    assert read_storyboard(written(folder, "cards: [{text: a ring}]")) == Storyboard((Card(0.0, "a ring"),))


def test_pictures_and_clips_stand_at_their_times_and_the_rest_is_open(folder, pipeline):
    job = storyboard(pipeline, read_storyboard(written(folder, WHOLE)), steps=2, seed=3)
    sketch = job.sketch
    assert sketch.frames.shape == (24 + 4 + 1, 32, 56, 3) and sketch.fps == 8
    assert np.flatnonzero(sketch.conditioning_frames).tolist() == [0, 16, 17, 18, 19, 28]
    assert (sketch.strength[~sketch.conditioning_frames] == 1).all()
    assert (sketch.frames[[0, 28]] == (255, 0, 0)).all(), "it leads back to the first card's picture"
    assert [round(float(frame.mean()) / 20) for frame in sketch.frames[16:20]] == [2, 3, 4, 5]
    assert job.keep == slice(28) and job.captions == ((0.0, "no"), (1.5, "a blue ring"))
    assert (job.settings.steps, job.settings.seed) == (2, 3)
    assert any("cropped" in note for note in job.notes)


def test_without_pictures_all_is_open(pipeline):
    job = storyboard(
        pipeline, Storyboard((Card(0, "a ring"), Card(1, "a star")), duration=2, fps=6, resolution=32)
    )
    assert (job.sketch.strength == 1).all() and len(job.sketch.frames) == 12
    assert job.keep == slice(None) and job.notes == ()


def test_a_storyboard_becomes_a_video(folder, pipeline, monkeypatch):
    said = []
    monkeypatch.setattr(pipeline, "notify", said.append)
    board = dataclasses.replace(read_storyboard(written(folder, WHOLE)), aspect="3:2")
    video = pipeline.storyboard(board, steps=2)
    assert video.frames.shape == (28, 32, 48, 3) and video.fps == 8
    assert len(said) == len(set(said))


BAD = {
    "nothing in it": ("", "needs a list of cards"),
    "a list": ("- at: 0", "needs a list of cards"),
    "no cards": ("duration: 2", "needs a list of cards"),
    "empty cards": ("cards: []", "has no cards"),
    "cards that are one": ("cards: {at: 0, text: a}", "needs a list of cards"),
    "a card that is a text": ("cards: [a ring]", "card 1 is no card"),
    "no YAML": ("cards: [", "is no YAML (line 1)"),
    "an unknown key": ("cards: [{at: 0, text: a}]\nsize: 3", "has no 'size': it may have cards, duration"),
    "an unknown key of a card": ("cards: [{at: 0, txt: a}]", "card 1 has no 'txt': did you mean text?"),
    "no words": ("cards: [{at: 0}]", "neither text nor picture"),
    "a time in words": ("cards: [{at: soon, text: a}]", "card 1's at is 'soon'"),
    "a time that is no number": ("cards: [{at: .nan, text: a}]", "card 1's at is '.nan'"),
    "not a number": ("cards: [{at: nan, text: a}]", "Card 1 of the storyboard has at=nan"),
    "a text that is a list": ("cards: [{at: 0, text: [a, b]}]", "give a text"),
    "out of order": ("cards: [{at: 1, text: a}, {at: 0.5, text: b}]", "order of their times"),
    "at the same time": ("cards: [{at: 1, text: a}, {at: 1, text: b}]", "Cards 1 and 2"),
    "in the same frame": ("cards: [{at: 1, text: a}, {at: 1.01, text: b}]", "Cards 1 and 2"),
    "after the end": ("duration: 2\ncards: [{at: 2, text: a}]", "outside of the video's 2 s"),
    "before the beginning": ("cards: [{at: -1, text: a}]", "outside of the video"),
    "no duration": ("duration: 0\ncards: [{at: 0, text: a}]", "duration=0.0 can't be used"),
    "an endless duration": ("duration: inf\ncards: [{at: 0, text: a}]", "duration=inf can't be used"),
    "a rate in words": ("fps: fast\ncards: [{at: 0, text: a}]", "fps is 'fast'"),
    "half a pixel": ("resolution: 32.5\ncards: [{at: 0, text: a}]", "resolution is '32.5'"),
    "a negative loop": ("loop: -1\ncards: [{at: 0, text: a}]", "loop=-1.0 can't be used"),
    "an aspect in words": ("aspect: wide\ncards: [{at: 0, text: a}]", "'wide'"),
    "a loop to nothing": ("loop: 1\ncards: [{at: 0, text: a}]", "begins with a picture"),
    "a missing picture": ("cards: [{at: 0, image: absent.png}]", "absent.png"),
    "a missing clip": ("cards: [{at: 0, clip: absent.mp4}]", "absent.mp4"),
    "picture and clip": ("cards: [{at: 0, image: red.png, clip: film.gif}]", "give one of the two"),
    "a clip into the next card": (
        "cards: [{at: 0, clip: film.gif}, {at: 0.5, text: a}]",
        "beyond 0.5 s, where the next card begins",
    ),
    "a clip beyond the end": ("cards: [{at: 1.5, clip: film.gif}]", "beyond 2 s, where the video ends"),
    "a part that is none": ("cards: [{at: 0, clip: film.gif, start: 1, end: 0.5}]", "is not after the start"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_storyboard_is_refused_in_one_sentence(name, folder, pipeline):
    text, words = BAD[name]
    with pytest.raises(UserError) as error:
        storyboard(pipeline, written(folder, text))
    message = str(error.value)
    assert words in message and "\n" not in message and message.endswith((".", "?")), message


def test_a_missing_file_or_a_folder_is_told(tmp_path):
    for path, words in ((tmp_path / "absent.yaml", "There is no file"), (tmp_path, "can't be read")):
        with pytest.raises(UserError, match=words):
            read_storyboard(path)
