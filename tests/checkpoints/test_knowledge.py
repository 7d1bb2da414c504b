"""What a model knows: every caption of toyworld's grammar, and nothing of cats."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from helpers.tiny_model import tiny_bundle

from sora_jax.checkpoints.bundle import BUNDLED
from sora_jax.checkpoints.components import Limits
from sora_jax.checkpoints.knowledge import Knowledge, knowledge_of
from sora_jax.errors import UserError
from sora_jax.pipeline import temporal_abilities
from sora_jax.pipeline.pipeline import Pipeline, Request
from sora_jax.pipeline.request import text_to_video
from sora_jax.pipeline.review import review
from sora_jax.toyworld import captions
from sora_jax.toyworld.render import Toyworld

TOYWORLD = knowledge_of(
    {
        "data": {
            "source": "toyworld",
            "resolutions": (64, 64, 128),
            "aspects": ("1:1", "16:9", "9:16"),
            "rates": (8.0, 24.0),
            "durations": (0.0, 2.0, 3.0),
        }
    }
)


@pytest.mark.parametrize("paraphrase", [False, True])
@pytest.mark.parametrize("split", ["train", "heldout", "paraphrase"])
def test_every_caption_of_the_grammar_is_known(split, paraphrase):
    world = Toyworld(split=split, shapes=((17, 64, 64, 8.0), (1, 64, 64, 8.0)))
    for index in range(150):
        scene, rng = world.scene(index), np.random.default_rng(index)
        texts = [
            captions.short_caption(scene, rng, paraphrase),
            captions.detailed_caption(scene, rng, paraphrase),
        ]
        texts += [text for _, text in captions.timed_captions(scene, rng, paraphrase)]
        for text in texts:
            assert TOYWORLD.unknown_words(text) == (), text
            assert TOYWORLD.names_a_thing(text), text


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a red circle moves left", ()),
        ("Two RED circles are moving to the left, then they stop.", ("stop",)),
        ("spinning stars, a bouncing ball and falling squares", ()),
        ("a green triangle's edge on a cherry red background", ()),
        ("a ring on a gray background", ()),
        ("a light-grey backdrop behind a ring", ()),
        ("a star. The background is plain dark grey.", ()),
        ("the background is a gradient of white and a red star moves", ()),
        ("the background is white and a black star moves", ("black",)),
        ("a white circle moves left", ("white",)),
        ("a white circle on a white background", ("white",)),
        ("a dark red ring on a dark grey background", ("dark",)),
        ("light grey squares", ("light", "grey")),
        ("The background is plain. White circles move", ("white",)),
        ("three-sided thing", ()),
        ("a white cat by the window", ("white", "cat", "window")),
        ("a cat, a Cat and two cats", ("cat", "cats")),
        ("grass and sunflowers", ("grass", "sunflowers")),
        ("a cat-like ring", ("cat-like",)),
        ("日本", ("日本",)),
        ("🐈", ("🐈",)),
        ("4k", ("4k",)),
        ("", ()),
        ("the of and", ()),
    ],
)
def test_words_outside_of_the_vocabulary_are_named_once(prompt, unknown):
    assert TOYWORLD.unknown_words(prompt) == unknown


@pytest.mark.parametrize("source", ["clips/", "toyworld:0.5,clips/:0.5", ""])
def test_footage_has_no_closed_vocabulary(source):
    known = knowledge_of({"data": {"source": source, "rates": (24.0, 24.0)}})
    assert known.unknown_words("a white cat by the window") == () and known.rates == (24.0,)
    assert Knowledge().unknown_words("anything") == ()


def test_files_own_aspects_say_nothing_of_shapes():
    assert knowledge_of({"data": {"source": "clips/", "aspects": ("1:1", "native")}}).aspects == ()
    assert knowledge_of({"data": {"source": "clips/", "aspects": ("1:1",)}}).aspects == ("1:1",)


def test_the_bundled_model_says_what_it_learned():
    """After `experiments/bundled_model/run.py export`, or a change of captions.py, its card must be written again."""
    card = json.loads((BUNDLED / "toyworld" / "config.json").read_text())["card"]
    assert card["knows"] == json.loads(json.dumps(dataclasses.asdict(knowledge_of(card["config"]))))


@pytest.fixture
def pipeline() -> Pipeline:
    bundle = dataclasses.replace(tiny_bundle(), card={"knows": dataclasses.asdict(TOYWORLD)})
    return Pipeline(bundle, notify=lambda note: said.append(note))


said: list[str] = []


def noted(pipeline: Pipeline, **fields: object) -> str:
    said.clear()
    length = {} if "frames" in fields else {"duration": 0.5}
    request = Request(**{"prompt": "a red circle", "size": (64, 64), "steps": 1} | length | fields)
    pipeline.make_streams([text_to_video(pipeline, request)])  # nothing is made before it is read
    return " ".join(said)


def test_a_note_names_unknown_words_and_what_the_model_draws(pipeline):
    assert noted(pipeline) == ""
    note = noted(pipeline, prompt="a white cat by a window")
    assert "knows nothing of 'white', 'cat' and 'window'" in note and "circles, squares" in note
    assert "for example 'a red circle moves left'." in note
    assert "'blurry'" in noted(pipeline, negative="blurry")
    with pytest.raises(UserError, match="knows nothing of 'cat'"):
        pipeline.check(Request("a cat", size=(64, 64), strict=True))
    pipeline.check(Request("a red circle", size=(64, 64), strict=True))


def test_a_prompt_that_names_no_thing_is_noted_and_refused_if_strict(pipeline):
    for prompt in ("the moves of and behind", "red", "moves left", "a gradient of white background"):
        assert f"names nothing that the model {pipeline.name!r} draws: it draws circles" in noted(
            pipeline, prompt=prompt
        )
        with pytest.raises(UserError, match="names nothing"):
            pipeline.check(Request(prompt, size=(64, 64), strict=True))
    with pytest.raises(UserError, match="knows nothing of 'white'"):
        pipeline.check(Request("a white circle moves left", size=(64, 64), strict=True))
    given = temporal_abilities.animate(
        pipeline, np.zeros((64, 64, 3), np.uint8), "moves left", duration=0.5, strict=True, steps=1
    )
    assert review(pipeline, given) == []  # the picture has the thing
    assert Knowledge(vocabulary=("moves",)).names_a_thing("moves")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"fps": 60.0}, "60 fps is beyond"),
        ({"fps": 2.0, "duration": 2.0}, "2 fps is beyond"),
        ({"size": (32, 32)}, "32 pixels is beyond"),
        ({"size": (160, 64), "frames": 1}, "64×160 is beyond"),
        ({"duration": 5.0}, "5 s is beyond"),
        ({"duration": 5.0, "fps": 60.0}, "60 fps and 5 s are beyond"),
        ({"fps": 24.0, "duration": 3.0}, ""),
        ({"frames": 25}, ""),
        ({"frames": 1, "fps": 60.0}, ""),
    ],
    ids=str,
)
def test_what_training_never_showed_gets_a_note(pipeline, fields, words):
    note = noted(pipeline, **fields)
    assert words in note if words else note == ""


def test_a_refusal_names_what_gives_good_pictures_not_what_fits():
    bundle = tiny_bundle()
    limits = dataclasses.replace(bundle.limits, resolution=32)
    pipeline = Pipeline(dataclasses.replace(bundle, limits=limits))
    with pytest.raises(UserError, match="a resolution of 32, ask for that"):
        pipeline.check(Request("a ring", resolution=256))


@pytest.mark.parametrize(
    ("size", "resolution", "words"),
    [
        ((16, 9999), 0, "aspect ratio of 16:9 at a resolution of 64."),
        ((9999, 16), 0, "aspect ratio of 9:16 at a resolution of 64."),
        ((64, 3200), 0, "aspect ratio of 16:9 at a resolution of 64."),
        ((16, 9999), 48, "aspect ratio of 16:9 at a resolution of 48."),
    ],
)
def test_for_a_strip_the_nearest_learned_shape_is_named(size, resolution, words):
    limits = Limits(tokens=400, latent_frames=4, frame_tokens=200, resolution=resolution)
    pipeline = Pipeline(
        dataclasses.replace(tiny_bundle(limits), card={"knows": dataclasses.asdict(TOYWORLD)})
    )
    with pytest.raises(UserError) as error:
        pipeline.check(Request("a ring", size=size))
    assert str(error.value).endswith(words), error.value
    with pytest.raises(UserError) as error:
        pipeline.outpaint(np.zeros((16, 16, 3), np.uint8), size=size)
    assert str(error.value).endswith(words), error.value
