"""The abilities as commands: `sora-jax animate`, `extend`, `loop`, … See docs/abilities.md."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import click

from sora_jax.cli import options
from sora_jax.cli.terminal import InputFile, ListOf, Number, Output, Pair, Place
from sora_jax.pipeline.registry import ABILITIES, TEXT_TO_VIDEO, Ability, Param

_TYPES: dict[str, click.ParamType] = {
    "text": click.STRING,
    "file": InputFile(),
    "video": InputFile(),
    "seconds": Number(above=0),
    "time": Number(at_least=0),
    "factor": click.IntRange(2),
    "share": click.FloatRange(0, 1),
    "place": Place(),
    "spans": ListOf(Pair("-", alone=True)),
    "curve": ListOf(Pair(":")),
    "box": ListOf(click.INT),
}


def _command(ability: Ability) -> click.Command:
    """The command of an ability: its arguments and options, and those that all abilities have."""
    videos = [param.name for param in ability.params if param.kind == "video"]

    def command(model: str, output: str | None, **fields: Any) -> None:
        own = options.as_settings(fields) | options.as_shape(fields)

        def build(pipeline: Any, progress: Any) -> Any:
            from sora_jax.pipeline.inputs import Part

            for name in videos:
                start, end = (fields.pop(f"{word}_{name}") for word in ("start", "end"))
                if fields[name] is not None:
                    fields[name] = Part(fields[name], start, end)
            given = {name: value for name, value in fields.items() if value is not None}
            return pipeline.job(ability.name, progress=progress, **given, **own)

        options.make(model, output or ability.output, build)

    parts = [option for name in videos for option in _part(name)]
    function: Any = command
    shape = options.shape(*ability.leave_out, **ability.shape)
    shared = (options.common, options.settings, options.writing, options.OUTPUT, shape)
    for option in (*shared, *reversed([*map(_option, ability.params), *parts])):
        function = option(function)
    return click.command(ability.name, help=ability.help)(function)


def _option(param: Param) -> Callable[..., Any]:
    given: dict[str, Any] = {"default": param.default} if not param.required else {}
    kind = _TYPES.get(param.kind)
    if param.argument:
        metavar: dict[str, Any] = {"metavar": param.option.upper()} if param.option else {}
        return click.argument(param.name, type=kind, required=param.required, **given, **metavar)
    name = f"--{(param.option or param.name).replace('_', '-')}"
    if param.kind == "flag":
        return click.option(name, param.name, is_flag=True, help=param.help)
    return click.option(name, param.name, type=kind, required=param.required, help=param.help, **given)


def _part(video: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The options that say which part of a video is taken."""
    mark = "" if video == "video" else f"-{video}"
    of = video.upper()
    return (
        click.option(
            f"--start{mark}",
            f"start_{video}",
            type=_TYPES["time"],
            default=0.0,
            help=f"Seconds into {of} where it begins.",
        ),
        click.option(
            f"--end{mark}", f"end_{video}", type=_TYPES["seconds"], help=f"Seconds into {of} where it ends."
        ),
    )


@click.command()
@click.argument("prompt")
@click.option("-n", "--count", type=click.IntRange(1, 1000), default=4, help="How many.")
@options.shape(**TEXT_TO_VIDEO)
@click.option("-o", "--output", type=Output(".png"), default="variations.png", help="The contact sheet.")
@options.writing
@options.settings
@options.common
def variations(prompt: str, count: int, model: str, output: pathlib.Path, **fields: Any) -> None:
    """PROMPT under several seeds, as one contact sheet."""
    from sora_jax.errors import atomic_path
    from sora_jax.media.contact_sheet import contact_sheet

    own = options.as_settings(fields) | options.as_shape(fields)
    with options.bar() as progress:
        videos = options.load_model(model).variations(prompt, count, progress, **own)
    labels = [f"seed {own['seed'] + i}" for i in range(count)]
    with atomic_path(output) as temporary:
        contact_sheet(videos, labels, 2).save(temporary)
    options.report_written(output, videos[0], f", {count} seeds")


COMMANDS = [*map(_command, ABILITIES.values()), variations]
