"""Keywords of the public API: spelled out in signatures, known by other libraries' names, answered with the nearest."""

from __future__ import annotations

import dataclasses
import inspect

import click
import pytest
from click.testing import CliRunner
from helpers.tiny_model import tiny_bundle

from sora_jax.cli.main import cli
from sora_jax.errors import UserError
from sora_jax.pipeline.keywords import explicit_keywords, known_keywords, option_name
from sora_jax.pipeline.pipeline import BUILDERS, Pipeline, Request
from sora_jax.pipeline.registry import ABILITIES
from sora_jax.pipeline.settings import Settings
from sora_jax.pipeline.shape import Shape

METHODS = [
    name
    for name, value in vars(Pipeline).items()
    if inspect.isfunction(value) and "seed" in inspect.signature(getattr(Pipeline, name)).parameters
]


def test_every_ability_is_among_them():
    assert set(METHODS) >= {"generate", "image", "stream", "variations", "fill_frames", "loop", "storyboard"}
    assert {ability.method or name for name, ability in ABILITIES.items()} <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_signatures_are_explicit_keywords_with_types_and_defaults(name):
    parameters = inspect.signature(getattr(Pipeline, name)).parameters
    assert not any(p.kind is p.VAR_KEYWORD or p.kind is p.VAR_POSITIONAL for p in parameters.values())
    assert next(iter(parameters)) == "self" and "progress" in parameters and "model" not in parameters
    for field in dataclasses.fields(Settings):
        assert field.name in parameters, field.name
        assert not isinstance(parameters[field.name].annotation, str)
    assert parameters["seed"].annotation is int and parameters["seed"].default == 0
    if name not in ("storyboard", "loop"):
        assert getattr(Pipeline, name).__doc__
    shape = {
        field.name for field in dataclasses.fields(Request if "prompt" in list(parameters)[1] else Shape)
    }
    left_out = {"duration", "fps", "frames"} if name == "image" else set()
    assert shape - left_out <= set(parameters)


def test_functions_of_jobs_and_storyboards_are_explicit_keywords_too():
    for name in ("animate", "fill", "edit", "upscale", "storyboard"):
        parameters = inspect.signature(BUILDERS[name]).parameters
        assert {"model", "seed", "steps", "fps", "size", "strict"} <= set(parameters)


def test_defaults_of_a_signature_are_those_that_hold():
    parameters = inspect.signature(Pipeline.generate).parameters
    for field in dataclasses.fields(Request):
        if field.name != "prompt":
            assert parameters[field.name].default == field.default


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(tiny_bundle())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"num_inference_steps": 3},
            "generate has no keyword 'num_inference_steps': it is called steps here.",
        ),
        ({"guidance_scale": 3}, "it is called guidance here."),
        ({"negative_prompt": "x"}, "it is called negative here."),
        ({"generator": 1}, "it is called seed here."),
        ({"stpes": 3}, "did you mean steps?"),
        ({"resolutoin": 3}, "did you mean resolution?"),
        ({"zzz": 3}, "it takes prompt, progress"),
        ({"width": 32}, "one of width and height"),
        ({"width": 32, "height": 32, "size": (32, 32)}, "which mean the same"),
        ({"num_frames": 3, "frames": 3}, "which mean the same"),
        ({"num_frames": 4, "duration": 2}, "duration and frames both set"),
        ({"frames": 4, "duration": 0.5}, "give one of the two"),
        ({"width": 32, "height": 32, "resolution": 64}, "size sets the whole"),
        ({"size": (32, 32), "aspect": "1:1"}, "leave out resolution and aspect"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_an_unknown_keyword_is_answered_with_the_right_one(pipeline, given, words):
    with pytest.raises(UserError) as error:
        pipeline.generate("a ring", **given)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"foo": 1}, "Request has no keyword 'foo': it takes"),
        ({"stpes": 3}, "did you mean steps?"),
        ({"guidance_scale": 3}, "it is called guidance here."),
        ({"frames": 4, "duration": 0.5}, "give one of the two"),
        ({"size": (32, 32), "resolution": 32}, "size sets the whole"),
        ({"size": (32, 32), "aspect": "16:9"}, "size sets the whole"),
    ],
    ids=str,
)
def test_a_request_answers_so(given, words):
    with pytest.raises(UserError) as error:
        Request("a ring", **given).check()
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_request_takes_other_libraries_names_and_can_be_changed():
    request = Request("a ring", num_frames=4, width=48, height=32)
    assert request == Request("a ring", frames=4, size=(32, 48))
    dataclasses.replace(request, seed=3).check()
    assert list(inspect.signature(Request).parameters)[:2] == ["prompt", "duration"]


@pytest.mark.parametrize("name", ["edit", "extend", "loop", "animate", "upscale", "storyboard"])
def test_every_ability_answers_so(pipeline, name):
    with pytest.raises(UserError, match="did you mean guidance"):
        getattr(pipeline, name)(guidence=2)


def test_other_libraries_names_of_the_shape_are_taken():
    known = ["frames", "size", "seed"]
    given = {"num_frames": 9, "width": 64, "height": 36, "seed": 1}
    assert known_keywords("f", given, known) == {"frames": 9, "size": (36, 64), "seed": 1}


def test_a_keyword_of_the_function_itself_is_not_doubled():
    @explicit_keywords(Settings, leave_out=("steps",))
    def function(a: int, *, seed: int = 7, **keywords: object) -> dict:
        return {"a": a, "seed": seed, **keywords}

    parameters = inspect.signature(function).parameters
    assert parameters["seed"].default == 7 and "steps" not in parameters
    assert function(1, guidance=2.0) == {"a": 1, "seed": 7, "guidance": 2.0}
    with pytest.raises(UserError, match="no keyword 'steps'"):
        function(1, steps=3)


def test_a_keyword_is_called_an_option_by_our_command_line_alone():
    theirs = click.Command("theirs", callback=lambda: print(option_name("conditioning_guidance")))
    assert CliRunner().invoke(theirs, []).output == "conditioning_guidance\n"
    with click.Context(cli) as context:
        context.invoke(cli.callback)
        assert option_name("conditioning_guidance") == "--conditioning-guidance"
    assert option_name("conditioning_guidance") == "conditioning_guidance"
