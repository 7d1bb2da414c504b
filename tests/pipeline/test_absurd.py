"""Absurd requests and values of the wrong kind: one sentence, before any memory is allocated or anything is made."""

from __future__ import annotations

import dataclasses
import resource
import tracemalloc

import numpy as np
import pytest
from helpers.tiny_model import tiny_bundle

from sora_jax.checkpoints.components import Limits
from sora_jax.cli.main import main
from sora_jax.errors import UserError
from sora_jax.media.video import Video
from sora_jax.pipeline import temporal_abilities
from sora_jax.pipeline.budget import VideoCost, in_words
from sora_jax.pipeline.pipeline import Pipeline, Request
from sora_jax.pipeline.request import text_to_video
from sora_jax.pipeline.storyboard import Card, Storyboard

LIMITS = Limits(tokens=36, latent_frames=4, frame_tokens=6, resolution=32, fps=24, text=12, text_len=24)
CLIP = Video(np.zeros((4, 32, 48, 3), np.uint8), 8.0)
BOARD = Storyboard((Card(0, "a ring"),), resolution=32)
GIVEN = Storyboard((Card(0, "a ring", image=CLIP.frames[0]),), resolution=32)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(tiny_bundle(LIMITS))


def never(*_):
    raise AssertionError("work began")


@pytest.fixture(autouse=True)
def nothing_is_made(pipeline, monkeypatch):
    monkeypatch.setattr("sora_jax.pipeline.pipeline.iter_latents", never)
    monkeypatch.setattr(pipeline, "prepare_latents", never)


LONG = {
    "generate": lambda s, n: s.generate("a ring", duration=n, resolution=32),
    "generate frames": lambda s, n: s.generate("a ring", num_frames=int(8 * n), resolution=32),
    "generate fps": lambda s, n: s.generate("a ring", duration=n / 100, fps=800, resolution=32),
    "several": lambda s, n: s.generate(["a ring", "a star"], duration=n, resolution=32),
    "stream": lambda s, n: s.stream("a ring", duration=n, resolution=32),
    "variations": lambda s, n: s.variations("a ring", 2, duration=n, resolution=32),
    "animate": lambda s, n: s.animate(CLIP, duration=n),
    "animate frames": lambda s, n: s.animate(CLIP, num_frames=int(8 * n)),
    "extend": lambda s, n: s.extend(CLIP, n),
    "extend backward": lambda s, n: s.extend(CLIP, n, backward=True),
    "extend to a duration": lambda s, n: s.extend(CLIP, duration=n),
    "recut": lambda s, n: s.recut(CLIP, 0.0, 0.25, n),
    "loop": lambda s, n: s.loop(CLIP, seconds=n),
    "loop of a prompt": lambda s, n: s.loop(prompt="a ring", duration=n, resolution=32),
    "connect": lambda s, n: s.connect(CLIP, CLIP, n),
    "connect to a duration": lambda s, n: s.connect(CLIP, CLIP, duration=n),
    "storyboard": lambda s, n: s.storyboard(BOARD, duration=n),
    "storyboard with a picture": lambda s, n: s.storyboard(GIVEN, duration=n),
    "storyboard's own": lambda s, n: s.storyboard(dataclasses.replace(GIVEN, duration=n)),
    "storyboard's loop": lambda s, n: s.storyboard(dataclasses.replace(GIVEN, loop=n)),
}


@pytest.mark.parametrize(
    ("name", "seconds"),
    [*((name, 1e5) for name in LONG), ("generate", 1e9), ("extend", 1e300), ("loop", 1e300)],
)
def test_a_video_of_days_is_refused_with_its_cost_and_a_way_out(pipeline, name, seconds):
    tracemalloc.start()
    with pytest.raises(UserError) as error:
        LONG[name](pipeline, seconds)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    message = str(error.value)
    for words in (
        "frames of",
        "tokens in",
        "windows",
        "rough estimate",
        "14,400 frames are the limit",
        "--max-frames",
    ):
        assert words in message, message
    assert "\n" not in message and len(message) < 400 and peak < 5e6


def test_smooth_counts_the_frames_that_it_adds(pipeline):
    clip = Video(np.zeros((100, 16, 16, 3), np.uint8), 2.0)
    with pytest.raises(UserError, match="49,501 frames of 16×16"):
        pipeline.smooth(clip, 1000.0)
    with pytest.raises(UserError, match="fps=1000000000.0 can't be used"):
        pipeline.smooth(clip, 1e9)


@pytest.mark.parametrize(
    "ask",
    [
        lambda s: s.upscale(CLIP, 100_000),
        lambda s: s.upscale(CLIP, size=(100_000, 150_000)),
        lambda s: s.edit(CLIP, "a ring", resolution=100_000),
        lambda s: s.inpaint(CLIP, box=(0, 0, 9, 9), resolution=100_000),
        lambda s: s.outpaint(CLIP, "1:1", resolution=100_000),
        lambda s: s.extend(CLIP, 1.0, resolution=100_000),
        lambda s: s.animate(CLIP, resolution=100_000),
        lambda s: s.image("a ring", resolution=100_000),
        lambda s: s.image("a ring", width=100_000, height=100_000),
        lambda s: s.storyboard(GIVEN, resolution=100_000),
    ],
    ids=range(10),
)
def test_a_frame_that_fits_nowhere_is_refused_before_it_is_made(pipeline, ask):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="GiB of memory|in a segment of two or more"):
        ask(pipeline)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_max_frames_raises_the_limit_and_lowers_it(pipeline):
    request = Request("a ring", duration=3000.0, resolution=32)
    with pytest.raises(UserError, match="at most 1800 s at 8 fps"):
        pipeline.check(request)
    pipeline.check(dataclasses.replace(request, max_frames=30_000))
    with pytest.raises(UserError, match="10 frames are the limit"):
        pipeline.check(Request("a ring", duration=2.0, resolution=32, max_frames=10))


MANY = {
    "prompts": lambda s, n, **own: s.generate(["a ring"] * n, duration=60.0, resolution=32, **own),
    "variations": lambda s, n, **own: s.variations("a ring", n, duration=60.0, resolution=32, **own),
    "streams": lambda s, n, **own: s.stream_batch([Request("a ring", 60.0, 32, **own)] * n),
    "lengths": lambda s, n, **own: s.stream_batch(
        [Request("a ring", 40.0 + 40 * (i % 2), 32, **own) for i in range(n)]
    ),
    "abilities": lambda s, n, **own: s.make(
        [temporal_abilities.animate(s, CLIP, duration=60.0, fps=8, **own)] * n
    ),
}


@pytest.mark.parametrize("name", MANY)
def test_a_batch_of_days_is_refused_with_its_cost_and_a_way_out(pipeline, name):
    with pytest.raises(UserError) as error:
        MANY[name](pipeline, 100)
    message = str(error.value)
    for words in (
        "100 videos with 48,000 frames together",
        "rough estimate",
        "14,400 frames are the limit",
        "at most 30 videos of that length",
        "--max-frames",
    ):
        assert words in message, message
    assert "\n" not in message and len(message) < 400
    for own in ({}, {"max_frames": 48_000}):  # what is within the limit begins
        with pytest.raises(AssertionError, match="work began"):
            MANY[name](pipeline, 100 if own else 30, **own)


def test_the_command_line_refuses_a_batch_of_days(pipeline, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sora_jax.pipeline.pipeline.load", lambda name, lazy: pipeline)
    out = str(tmp_path / "out.mp4")
    asked = ["generate", "a ring", "--count", "200", "-d", "500", "--resolution", "32", "-o", out]
    assert main(asked) == 2
    assert "200 videos with 800,000 frames together" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_limit_of_one_frame_is_singular(pipeline):
    with pytest.raises(UserError, match="1 frame is the limit"):
        pipeline.check(Request("a ring", resolution=32, max_frames=1))


def test_what_a_batch_takes_is_estimated_once(pipeline, monkeypatch):
    notes: list[str] = []
    monkeypatch.setattr(pipeline, "notify", notes.append)
    requests = [Request("a ring", 10.0, 32, seed=i) for i in range(50)]
    job = text_to_video(pipeline, requests[0])
    one = pipeline.cost(80, (32, 32), job.settings).seconds("cpu")
    monkeypatch.setattr("sora_jax.pipeline.budget.LONG", 10 * one)  # none of them alone takes so long
    with pytest.raises(AssertionError, match="work began"):
        pipeline.stream_batch(requests)
    assert len(notes) == 1 and "A batch of 50 videos with 4,000 frames together takes" in notes[0]


def test_what_takes_long_is_estimated(pipeline, monkeypatch):
    notes: list[str] = []
    monkeypatch.setattr(pipeline, "notify", notes.append)
    monkeypatch.setattr("sora_jax.pipeline.pipeline.iter_latents", lambda *_: [])
    monkeypatch.setattr(pipeline, "prepare_latents", lambda sketch: None)
    request = Request("a ring", duration=1e7, resolution=32, max_frames=10**8)
    with pytest.raises(ValueError, match="zip"):  # nothing is filled here
        pipeline.stream_batch([request])
    assert len(notes) == 1 and "80,000,000 frames" in notes[0] and "by a rough estimate" in notes[0]


def test_windows_tokens_and_words():
    cost = VideoCost(
        25,
        64,
        64,
        frame_tokens=64,
        latent_frames=7,
        max_latent_frames=7,
        steps=12,
        passes=2,
        parameters=10**6,
    )
    assert (cost.windows, cost.tokens) == (1, 7 * 64)
    assert dataclasses.replace(cost, latent_frames=15).windows == 3  # four new ones each
    assert dataclasses.replace(cost, latent_frames=15, anchor=True).windows == 4  # three
    assert cost.seconds("gpu") < cost.seconds("cpu")
    assert [in_words(s) for s in (0.1, 30, 120, 7200, 3e5, 1e9)] == [
        "about a second", "about 30 seconds", "about 2 minutes", "about 2 hours", "about 3 days", "about 32 years",
    ]  # fmt: skip


LONG_PROMPT = "a" * 100_000
PROMPTS = {
    "generate": lambda s, p: s.generate(p, resolution=32),
    "one of several": lambda s, p: s.generate(["a ring", p], resolution=32),
    "negative": lambda s, p: s.generate("a ring", negative=p, resolution=32),
    "image": lambda s, p: s.image(p, resolution=32),
    "animate": lambda s, p: s.animate(CLIP, p),
    "extend": lambda s, p: s.extend(CLIP, 1.0, p),
    "recut": lambda s, p: s.recut(CLIP, 0, 0.25, 1.0, p),
    "loop": lambda s, p: s.loop(CLIP, p),
    "loop of a prompt": lambda s, p: s.loop(prompt=p, resolution=32),
    "fill": lambda s, p: s.fill_frames(CLIP, [(0.1, 0.2)], p),
    "smooth": lambda s, p: s.smooth(CLIP, 24, p),
    "connect": lambda s, p: s.connect(CLIP, CLIP, 1.0, p),
    "blend": lambda s, p: s.blend(CLIP, CLIP, prompt=p),
    "inpaint": lambda s, p: s.inpaint(CLIP, p, box=(0, 0, 9, 9)),
    "outpaint": lambda s, p: s.outpaint(CLIP, "1:1", p),
    "edit": lambda s, p: s.edit(CLIP, p),
    "upscale": lambda s, p: s.upscale(CLIP, 64, p),
    "storyboard": lambda s, p: s.storyboard(Storyboard((Card(0, p),), resolution=32)),
}


@pytest.mark.parametrize(
    "prompt", [LONG_PROMPT, "a b " * 25_000, "🐈" * 100_000], ids=["a", "words", "signs"]
)
@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_of_100_000_letters_is_refused_wherever_it_is_given(pipeline, name, prompt, monkeypatch):
    counted = pipeline.text_encoder.count_tokens
    monkeypatch.setattr(
        pipeline.text_encoder, "count_tokens", lambda text: never() if len(text) > 1000 else counted(text)
    )
    with pytest.raises(
        UserError, match=r"100,000 letters, about 25,000 tokens, and the model 'tiny' reads 12"
    ):
        PROMPTS[name](pipeline, prompt)


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        *((name, None) for name in PROMPTS),
        *(("edit", value) for value in (3, b"a ring", "a \udcff ring", True)),
    ],
    ids=repr,
)
def test_a_prompt_that_is_no_text_is_refused(pipeline, name, prompt):
    with pytest.raises(UserError) as error:
        PROMPTS[name](pipeline, prompt)
    assert str(error.value).count("\n") == 0


WRONG = {
    "seed": (-1, 1.5, "3", None, True, 2**31, float("nan"), 10**30, [1]),
    "steps": (0, -1, 1.0, "12", None, True, 10**9),
    "guidance": ("3", None, True, float("nan"), float("inf"), 101, [3]),
    "low_noise_guidance": ("3", True, float("nan"), 101),
    "conditioning_guidance": ("3", None, float("nan"), False),
    "context_noise": (-0.1, 1, 1.5, "0.2", None, True, float("nan")),
    "anchor": (None, 1, "yes"),
    "step_cache": (-0.1, 1.5, "0.1", None, True, float("nan")),
    "sigmas": (None, 0.5, "1,0.5", (0.9, 0.5), (1, 0), (1, 0.5, 0.5), (1, float("nan")), (True, "a")),
    "guidance_rescale": (-0.1, 1.1, "0", None, True),
    "guidance_interval": (None, 0.5, (0.1,), (0.9, 0.1), ("0", "1"), (0, float("nan")), (False, True)),
    "guidance_method": ("magic", None, 3, ["cfg"]),
    "solver": ("magic", None, 3),
    "negative": (None, 3, ["x"]),
    "strict": (None, 1, "yes"),
    "max_frames": (0, -1, 1.5, "9", True),
    "fps": (0, -8, "8", True, float("nan"), float("inf"), 1e6),
    "duration": (0, -1, "2", True, float("nan"), float("inf")),
    "frames": (0, -1, 2.5, "9", True),
    "resolution": (0, -64, 64.0, "64", True, float("nan"), 10**12),
    "aspect": ("wide", 0, -1, True, float("nan"), "1:0", (16, 9), 1e9, "1" * 99),
    "size": (64, (64,), (0, 64), (64.0, 64), ("64", "64"), (64, 64, 3), (64, 10**9)),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values], ids=str
)
def test_a_setting_of_the_wrong_kind_is_named_wherever_it_is_given(pipeline, name, value):
    if name not in ("duration", "frames", "fps", "resolution", "aspect", "size"):
        abilities = (pipeline.generate, pipeline.image, pipeline.extend, pipeline.edit, pipeline.storyboard)
    else:
        abilities = (pipeline.generate, pipeline.edit, pipeline.storyboard)
    for ability in abilities:
        if ability == pipeline.image and name in ("duration", "fps", "frames"):
            continue
        given = {pipeline.extend: (CLIP, 1.0), pipeline.edit: (CLIP, "a ring"), pipeline.storyboard: (BOARD,)}
        first = given.get(ability, ("a ring",))
        with pytest.raises(UserError) as error:
            ability(*first, **{name: value})
        message = str(error.value)
        word = {"guidance_method": "guidance", "aspect": "aspect"}.get(name, name)
        assert word in message and "\n" not in message and len(message) < 300, message


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda s: s.edit(CLIP, "a ring", strength="0.5"), "strength='0.5'"),
        (lambda s: s.edit(CLIP, "a ring", strength=float("nan")), "strength=nan"),
        (lambda s: s.edit(CLIP, "a ring", motion="yes"), "motion='yes'"),
        (lambda s: s.blend(CLIP, CLIP, strength=2), "strength=2"),
        (lambda s: s.blend(CLIP, CLIP, curve=3), "curve=3"),
        (lambda s: s.extend(CLIP, "1"), "seconds='1'"),
        (lambda s: s.extend(CLIP), "give seconds (of what is new) or duration"),
        (lambda s: s.extend(CLIP, 1.0, duration=2.0), "given twice"),
        (lambda s: s.extend(CLIP, duration=0.25), "already"),
        (lambda s: s.extend(CLIP, 1.0, backward=1), "backward=1"),
        (lambda s: s.fill_frames(CLIP, 3), "missing=3"),
        (lambda s: s.fill_frames(CLIP, [("0", "1")]), "missing="),
        (lambda s: s.animate(CLIP, at="middle"), "'middle'"),
        (lambda s: s.animate(CLIP, at=float("nan")), "at=nan"),
        (lambda s: s.inpaint(CLIP, box=(0, 0, 9.5, 9)), "box's width=9.5"),
        (lambda s: s.inpaint(CLIP, box=3), "box=3"),
        (lambda s: s.variations("a ring", 0), "count=0"),
        (lambda s: s.variations("a ring", 10**9), "count=1000000000"),
        (lambda s: s.recut(CLIP, "0", 1.0, 1.0), "start='0'"),
        (lambda s: s.upscale(CLIP), "higher resolution is missing"),
        (lambda s: s.outpaint(CLIP), "aspect"),
        (lambda s: s.edit(CLIP, "a ring", size=(32, 32), aspect="1:1"), "size sets the whole"),
        (lambda s: s.animate(CLIP, duration=1.0, frames=8), "give one of the two"),
    ],
    ids=range(23),
)
def test_an_abilitys_own_values_are_checked_too(pipeline, ask, words):
    with pytest.raises(UserError) as error:
        ask(pipeline)
    assert words in str(error.value) and "\n" not in str(error.value), str(error.value)
