"""The abilities as commands: `sora-jax animate`, `extend`, `loop`, … See docs/abilities.md."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import click

from sora_jax.cli.options import (
    OF_WORDS,
    OUTPUT,
    as_settings,
    as_shape,
    bar,
    common,
    make,
    said,
    settings,
    shape,
    writing,
)
from sora_jax.cli.terminal import InputFile, ListOf, Number, Output, Pair, Place

COMMANDS: list[click.Command] = []
Option = Callable[..., Any]

_SECONDS, _AT_LEAST_0, _SHARE = Number(above=0), Number(at_least=0), click.FloatRange(0, 1)
_FILE = InputFile()
_PROMPT = click.option("--prompt", default="", help="What is to be seen; none: what the input suggests.")
_WORDS = click.argument("prompt")
_VIDEO = click.argument("video", type=_FILE)
_A, _B = click.argument("a", type=_FILE), click.argument("b", type=_FILE)
_LONGER = click.option("--seconds", type=_SECONDS, help="How much longer it becomes; or name its --duration.")
_OF_A = dict.fromkeys(("fps", "resolution", "aspect"), "A's own")


def _part(of: str = "VIDEO", mark: str = "", required: bool = False) -> tuple[Option, Option]:
    """Which part of a video is taken."""
    first: dict[str, Any] = {"required": True} if required else {"default": 0.0}
    return (
        click.option(
            f"--start{mark}", type=_AT_LEAST_0, help=f"Seconds into {of} where it is begun.", **first
        ),
        click.option(
            f"--end{mark}", type=_SECONDS, help=f"Seconds into {of} where it is cut off.", required=required
        ),
    )


def _ability(
    name: str,
    says: str,
    *options: Option,
    shaped: Option | None = None,
    plan: Callable[..., Any] | str | None = None,
) -> None:
    """Adds a command with these options and those that all abilities have.

    Args:
      name: of the command.
      says: its help.
      options: its own; their values, where not None, are keywords of `plan`.
      shaped: `options.shape`, where its defaults are not all the input's own.
      plan: called with the studio, or the name of a function of `plans`; None: the command's.
    """

    def command(model: str, output: str | None, **fields: Any) -> None:
        own = as_settings(fields) | as_shape(fields)

        def wanted(studio: Any) -> Any:
            from sora_jax.pipeline import inputs, tasks

            for video, mark in (("video", ""), ("a", "_a"), ("b", "_b")):
                if f"start{mark}" in fields:
                    begin, end = fields.pop(f"start{mark}"), fields.pop(f"end{mark}")
                    if fields[video] is not None:
                        fields[video] = inputs.Part(fields[video], begin, end)
            made = plan if callable(plan) else getattr(tasks, plan or name)
            return made(studio, **{key: value for key, value in fields.items() if value is not None}, **own)

        make(model, output or ("out.png" if name == "image" else None), wanted)

    function: Any = command
    for option in (common, settings, writing, OUTPUT, shaped or shape(), *reversed(options)):
        function = option(function)
    COMMANDS.append(click.command(name, help=says)(function))


def _image(studio: Any, prompt: str, **fields: Any) -> Any:
    from sora_jax.pipeline.pipeline import Request

    return studio.job(Request(prompt, frames=1, **fields))


def _loop(studio: Any, video: Any = None, prompt: str = "", **fields: Any) -> Any:
    with bar() as progress:
        return studio.loop_job(video, prompt, progress=progress, **fields)


def _storyboard(studio: Any, file: str, **fields: Any) -> Any:
    from sora_jax.pipeline.storyboard import read_storyboard

    return read_storyboard(file).job(studio, **fields)


_ability(
    "image",
    "A picture of PROMPT.",
    _WORDS,
    shaped=shape("duration", "fps", **OF_WORDS),
    plan=_image,
)
_ability(
    "animate",
    "A video that begins with PICTURE, or has it where --at says.",
    click.argument("picture", type=_FILE),
    click.argument("prompt", default=""),
    click.option("--at", type=Place(), default="first", help="Where PICTURE is: first, last or seconds."),
    shaped=shape(duration="2", fps="8"),
)
_ability(
    "extend",
    "VIDEO goes on, forward or backward in time.",
    _VIDEO,
    _LONGER,
    click.option("--backward", is_flag=True, help="What came before, instead of what comes after."),
    _PROMPT,
    *_part(),
    shaped=shape(duration="of VIDEO and --seconds"),
)
_ability(
    "recut",
    "VIDEO from --start to --end, and what the model lets come after it.",
    _VIDEO,
    *_part(required=True),
    _LONGER,
    _PROMPT,
    shaped=shape(duration="of the part and --seconds"),
    plan="extend",
)
_ability(
    "loop",
    "An endless loop of VIDEO, or of --prompt alone.",
    click.argument("video", type=_FILE, required=False),
    _PROMPT,
    click.option("--seconds", type=_SECONDS, help="How long it takes back to the beginning.  [default: 1.5]"),
    *_part(),
    shaped=shape(
        duration="of VIDEO and --seconds; without VIDEO 3",
        **{name: f"VIDEO's own, else {OF_WORDS[name]}" for name in ("fps", "resolution", "aspect")},
    ),
    plan=_loop,
)
_ability(
    "fill",
    "VIDEO with frames painted that are missing.",
    _VIDEO,
    click.option(
        "--at",
        "missing",
        type=ListOf(Pair("-", alone=True)),
        required=True,
        help="What is missing, in seconds of what is taken: 0.5-1,1.5-2.",
    ),
    _PROMPT,
    *_part(),
)
_ability(
    "smooth",
    "VIDEO at a higher frame rate.",
    _VIDEO,
    _PROMPT,
    *_part(),
    shaped=shape(fps="24"),
)
_ability(
    "connect",
    "Clip A turns into clip B.",
    _A,
    _B,
    click.option("--seconds", type=_SECONDS, help="How long the passage takes.  [default: 2]"),
    click.option("--strength", type=_SHARE, help="1: free; less: nearer to a cross-fade."),
    _PROMPT,
    *_part("A", "-a"),
    *_part("B", "-b"),
    shaped=shape(duration="of A, B and --seconds", **_OF_A),
)
_ability(
    "blend",
    "Clips A and B at once, by a weight over time.",
    _A,
    _B,
    click.option("--curve", type=ListOf(Pair(":")), help="seconds:weight of B, such as 0:0,1:0.5,2:1."),
    click.option("--strength", type=_SHARE, help="How far what is mixed is repainted."),
    _PROMPT,
    *_part("A", "-a"),
    *_part("B", "-b"),
    shaped=shape(duration="of the shorter one", **_OF_A),
)
_ability(
    "inpaint",
    "VIDEO with a part of the picture painted anew.",
    _VIDEO,
    click.argument("prompt", default=""),
    click.option("--box", type=ListOf(click.INT), help="left,top,width,height in VIDEO's pixels."),
    click.option("--mask", type=_FILE, help="A picture or video, light where it is painted anew."),
    *_part(),
)
_ability(
    "outpaint",
    "VIDEO in a larger frame of another aspect ratio.",
    _VIDEO,
    _PROMPT,
    *_part(),
    shaped=shape(aspect="must be named, or --size"),
)
_ability(
    "edit",
    "Edit VIDEO to match PROMPT (SDEdit).",
    _VIDEO,
    _WORDS,
    click.option("--strength", type=_SHARE, default=0.7, help="0: all stays; 1: nothing does."),
    click.option("--motion", is_flag=True, help="Keep the motion, free the colours."),
    *_part(),
)
_ability(
    "storyboard",
    "The video that FILE tells in cards (YAML; see docs/abilities.md).",
    click.argument("file", type=_FILE),
    shaped=shape(**dict.fromkeys(OF_WORDS, "what FILE says")),
    plan=_storyboard,
)
_ability(
    "upscale",
    "VIDEO at a higher resolution.",
    _VIDEO,
    click.option("--strength", type=_SHARE, help="How far details are repainted."),
    _PROMPT,
    *_part(),
    shaped=shape(resolution="must be named, or --size"),
)


@click.command()
@_WORDS
@click.option("-n", "--count", type=click.IntRange(1, 1000), default=4, help="How many.")
@shape(**OF_WORDS)
@click.option("-o", "--output", type=Output(".png"), default="variations.png", help="The contact sheet.")
@writing
@settings
@common
def variations(prompt: str, count: int, model: str, output: pathlib.Path, **fields: Any) -> None:
    """PROMPT under several seeds, as one contact sheet."""
    from sora_jax.errors import atomic_path
    from sora_jax.media.contact_sheet import contact_sheet
    from sora_jax.pipeline import pipeline as face

    own = as_settings(fields) | as_shape(fields)
    with bar() as progress:
        videos = face.load(model, lazy=True).variations(prompt, count, progress, **own)
    labels = [f"seed {own['seed'] + i}" for i in range(count)]
    with atomic_path(output) as temporary:
        contact_sheet(videos, labels, 2).save(temporary)
    said(output, videos[0], f", {count} seeds")


COMMANDS.append(variations)
