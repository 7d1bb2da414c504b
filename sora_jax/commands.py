"""The abilities as commands: `sora-jax animate`, `extend`, `loop`, … See docs/abilities.md."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import click

from sora_jax.errors import UserError
from sora_jax.options import OUTPUT, as_settings, bar, common, make, said, settings, shape
from sora_jax.terminal import ListOf, Number, Output, Pair, Place

COMMANDS: list[click.Command] = []
Option = Callable[..., Any]

_SECONDS, _AT_LEAST_0, _SHARE = Number(above=0), Number(at_least=0), click.FloatRange(0, 1)
_FILE = click.Path(exists=True, dir_okay=False)
_PROMPT = click.option("--prompt", default="", help="What is to be seen; none: what the input suggests.")
_WORDS = click.argument("prompt")
_VIDEO = click.argument("video", type=_FILE)
_A, _B = click.argument("a", type=_FILE), click.argument("b", type=_FILE)
_ASPECT = click.option("--aspect", default="1:1", help="Width to height, such as 16:9 or 1.78.")
_LONGER = click.option("--seconds", type=_SECONDS, required=True, help="How much longer it becomes.")


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


def _ability(name: str, says: str, *options: Option, plan: Callable[..., Any] | str | None = None) -> None:
    """Adds a command with these options and those that all abilities have.

    Args:
      name: of the command.
      says: its help.
      options: its own; their values, where not None, are keywords of `plan`.
      plan: called with the studio, or the name of a function of `plans`; None: the command's.
    """

    def command(model: str, output: str | None, **fields: Any) -> None:
        own = as_settings(fields)

        def wanted(studio: Any) -> Any:
            from sora_jax import inputs, plans

            for video, mark in (("video", ""), ("a", "_a"), ("b", "_b")):
                if f"start{mark}" in fields:
                    begin, end = fields.pop(f"start{mark}"), fields.pop(f"end{mark}")
                    if fields[video] is not None:
                        fields[video] = inputs.Part(fields[video], begin, end)
            made = plan if callable(plan) else getattr(plans, plan or name)
            return made(studio, **{key: value for key, value in fields.items() if value is not None}, **own)

        make(model, output, wanted)

    function: Any = command
    for option in (common, settings, OUTPUT, *reversed(options)):
        function = option(function)
    COMMANDS.append(click.command(name, help=says)(function))


def _image(studio: Any, prompt: str, **fields: Any) -> Any:
    from sora_jax.studio import Request

    request = Request(prompt, frames=1, **fields)
    studio.check(request)
    return studio.plan(request)


def _loop(studio: Any, seconds: float, video: Any = None, prompt: str = "", **fields: Any) -> Any:
    from sora_jax import plans

    made = {name: fields.pop(name) for name in ("duration", "fps", "resolution", "aspect")}
    if video is None:
        if not prompt.strip():
            raise UserError("There is nothing to loop: name a video, or give a --prompt.")
        with bar() as progress:
            video = studio.generate(prompt, progress, **made, **fields)
    return plans.loop(studio, video, seconds, prompt, **fields)


def _storyboard(studio: Any, file: str, **fields: Any) -> Any:
    from sora_jax.storyboard import read_storyboard

    return read_storyboard(file).plan(studio, **fields)


_ability(
    "image",
    "A picture of PROMPT.",
    _WORDS,
    click.option("--resolution", type=click.IntRange(1), default=64, help="The short side in pixels."),
    _ASPECT,
    plan=_image,
)
_ability(
    "animate",
    "A video that begins with PICTURE, or has it where --at says.",
    click.argument("picture", type=_FILE),
    click.argument("prompt", default=""),
    click.option("--at", type=Place(), default="first", help="Where PICTURE is: first, last or seconds."),
    click.option("--duration", type=_SECONDS, default=2.0, help="Seconds."),
    click.option("--fps", type=_SECONDS, default=8.0, help="Frames a second."),
    click.option("--aspect", help="Width to height; PICTURE's own where it isn't named."),
)
_ability(
    "extend",
    "VIDEO goes on, forward or backward in time.",
    _VIDEO,
    _LONGER,
    click.option("--backward", is_flag=True, help="What came before, instead of what comes after."),
    _PROMPT,
    *_part(),
)
_ability(
    "recut",
    "VIDEO from --start to --end, and what the model lets come after it.",
    _VIDEO,
    *_part(required=True),
    _LONGER,
    _PROMPT,
    plan="extend",
)
_ability(
    "loop",
    "An endless loop of VIDEO, or of --prompt alone.",
    click.argument("video", type=_FILE, required=False),
    _PROMPT,
    click.option("--seconds", type=_SECONDS, default=1.5, help="How long it takes back to the beginning."),
    *_part(),
    click.option(
        "--duration", type=_SECONDS, default=1.5, help="Without VIDEO: seconds before it goes back."
    ),
    click.option("--fps", type=_SECONDS, default=8.0, help="Without VIDEO: frames a second."),
    click.option("--resolution", type=click.IntRange(1), default=64, help="Without VIDEO: the short side."),
    click.option("--aspect", default="1:1", help="Without VIDEO: width to height."),
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
    click.option("--fps", type=_SECONDS, default=24.0, help="Frames a second of the result."),
    _PROMPT,
    *_part(),
)
_ability(
    "connect",
    "Clip A turns into clip B.",
    _A,
    _B,
    click.option("--seconds", type=_SECONDS, default=2.0, help="How long the passage takes."),
    click.option("--strength", type=_SHARE, help="1: free; less: nearer to a cross-fade."),
    _PROMPT,
    *_part("A", "-a"),
    *_part("B", "-b"),
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
    click.option("--aspect", required=True, help="Width to height, such as 9:16."),
    _PROMPT,
    *_part(),
)
_ability(
    "edit",
    "VIDEO as PROMPT has it.",
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
    plan=_storyboard,
)
_ability(
    "upscale",
    "VIDEO at a higher resolution.",
    _VIDEO,
    click.option("--resolution", type=click.IntRange(1), required=True, help="The short side in pixels."),
    click.option("--strength", type=_SHARE, help="How far details are repainted."),
    _PROMPT,
    *_part(),
)


@click.command()
@_WORDS
@click.option("--count", type=click.IntRange(1), default=4, help="How many.")
@click.option("--duration", type=_SECONDS, default=2.0, help="Seconds.")
@_ASPECT
@shape
@click.option("-o", "--output", type=Output(".png"), default="variations.png", help="The contact sheet.")
@settings
@common
def variations(prompt: str, count: int, model: str, output: pathlib.Path, **fields: Any) -> None:
    """PROMPT under several seeds, as one contact sheet."""
    from sora_jax import studio as face
    from sora_jax.errors import atomic_path
    from sora_jax.sheet import contact_sheet

    own = as_settings(fields)
    with bar() as progress:
        videos = face.load(model).variations(prompt, count, progress, **own, **fields)
    labels = [f"seed {own['seed'] + i}" for i in range(count)]
    with atomic_path(output) as temporary:
        contact_sheet(videos, labels, 2).save(temporary)
    said(output, videos[0], f", {count} seeds")


COMMANDS.append(variations)
