"""One table of abilities: functions, methods, commands, evaluations and the documented page agree with it."""

from __future__ import annotations

import inspect
import pathlib

import click
import pytest

from sora_jax.cli.main import cli
from sora_jax.errors import UserError
from sora_jax.evaluation.abilities import TRIALS
from sora_jax.pipeline import spatial_abilities, temporal_abilities
from sora_jax.pipeline.pipeline import BUILDERS, Pipeline, load
from sora_jax.pipeline.registry import ABILITIES

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "abilities.md").read_text()


def test_every_function_of_abilities_is_in_the_table():
    functions = {
        name
        for module in (temporal_abilities, spatial_abilities)
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }
    assert functions | {"storyboard"} == set(BUILDERS) == set(ABILITIES)


@pytest.mark.parametrize("name", ABILITIES)
def test_an_ability_takes_what_its_function_takes(name):
    taken = dict(inspect.signature(BUILDERS[name]).parameters)
    for param in ABILITIES[name].params:
        own = taken[param.name]
        assert param.required == (own.default is own.empty), param.name
        assert param.default in (None, own.default), param.name
    method = getattr(Pipeline, ABILITIES[name].method or name)
    assert method.__doc__ == BUILDERS[name].__doc__
    assert set(inspect.signature(method).parameters) == set(taken) - {"model"} | {"self", "progress"}


@pytest.mark.parametrize("name", ABILITIES)
def test_an_ability_has_its_command_with_help_and_its_section(name):
    command, own = cli.commands[name], ABILITIES[name]
    assert command.help == own.help and own.help.endswith(".")
    options = {parameter.name: parameter for parameter in command.params}
    for param in own.params:
        option = options[param.name]
        assert param.argument == isinstance(option, click.Argument) and option.required == param.required
        assert param.argument or (option.help.startswith(param.help) and param.help)
        assert param.kind != "video" or {f"start_{param.name}", f"end_{param.name}"} <= set(options)
    section = PAGE.split(f"\n## {name}\n")[1].split("\n## ")[0]
    assert f"\nsora-jax {name} " in section


def test_an_unknown_ability_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="no ability 'exten': did you mean extend?"):
        load("toyworld", lazy=True).job("exten")


def test_evaluations_are_those_of_abilities():
    assert {name.split()[0] for name in TRIALS} <= set(ABILITIES)  # "extend backward" is extend's
