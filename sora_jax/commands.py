"""The abilities as commands: `sora-jax animate`, `extend`, `loop`, … See docs/abilities.md."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import click

from sora_jax.errors import UserError
from sora_jax.options import OUTPUT, QUIET, as_settings, common, make, said, settings, shape
from sora_jax.terminal import ListOf, Number, Output, progress_bar

SECONDS = Number(above=0)
_VIDEO = click.argument("video", type=click.Path())
_PROMPT = click.option("--prompt", default="", help="What is to be seen; none: what the video suggests.")
_START = click.option("--start", type=Number(at_least=0), default=0.0, help="Seconds into the input.")
_END = click.option("--end", type=Number(above=0), help="Seconds into the input at which it is cut off.")
COMMANDS: list[click.Command] = []


def _ability(
    *options: Callable[..., Any], name: str | None = None
) -> Callable[[Callable[..., Any]], click.Command]:
    """A command with these options and those that all abilities have."""

    def decorate(function: Callable[..., Any]) -> click.Command:
        wrappers: tuple[Any, ...] = (click.pass_context, common, *reversed((*options, OUTPUT)), settings)
        for option in wrappers:
            function = option(function)
        command = click.command(name)(function)
        COMMANDS.append(command)
        return command

    return decorate


def _input(studio: Any, video: str, start: float, end: float | None, fps: float | None = None) -> Any:
    from sora_jax import plans

    return plans.take(studio, video, fps=fps, start=start, seconds=_length(video, start, end))


def _length(video: str, start: float, end: float | None) -> float | None:
    if end is not None and end <= start:
        raise UserError(f"--end {end:g} is not after --start {start:g}: nothing of {video} is left.")
    return None if end is None else end - start


@_ability(
    click.argument("prompt"),
    click.option("--resolution", type=click.IntRange(1), default=64, help="The short side in pixels."),
    click.option("--aspect", default="1:1", help="Width to height, such as 16:9 or 1.78."),
)
def image(context: click.Context, prompt: str, model: str, output: str, **fields: Any) -> None:
    """A picture of PROMPT."""
    from sora_jax.studio import Request

    request = Request(prompt, frames=1, **as_settings(fields), **fields)

    def plan(studio: Any) -> Any:
        studio.check(request)
        return studio.plan(request)

    make(
        context, model, str(pathlib.Path(output).with_suffix(".png")) if output == "out.mp4" else output, plan
    )


@_ability(
    click.argument("picture", type=click.Path()),
    click.argument("prompt", default=""),
    click.option("--at", default="0", help="Where the picture is: seconds, first or last."),
    click.option("--duration", type=SECONDS, default=2.0, help="Seconds."),
    click.option("--fps", type=SECONDS, default=8.0, help="Frames a second."),
    click.option("--aspect", help="Width to height; the picture's own where it isn't named."),
)
def animate(
    context: click.Context, picture: str, prompt: str, at: str, model: str, output: str, **fields: Any
) -> None:
    """A video that begins with PICTURE, or has it where --at says."""
    from sora_jax import plans

    place: float | str = at
    if at not in ("first", "last"):
        place = Number(at_least=0).convert(at, None, context)
    own = as_settings(fields)
    make(
        context,
        model,
        output,
        lambda studio: plans.animate(studio, picture, prompt, at=place, **own, **fields),
    )


@_ability(
    _VIDEO,
    click.option("--seconds", type=SECONDS, required=True, help="How much longer it becomes."),
    click.option("--backward", is_flag=True, help="What came before, instead of what comes after."),
    _PROMPT,
    _START,
    _END,
)
def extend(
    context: click.Context,
    video: str,
    seconds: float,
    backward: bool,
    prompt: str,
    start: float,
    end: float | None,
    model: str,
    output: str,
    **fields: Any,
) -> None:
    """VIDEO goes on, forward or backward in time."""
    from sora_jax import plans

    own = as_settings(fields)

    def plan(studio: Any) -> Any:
        return plans.extend(
            studio, _input(studio, video, start, end), seconds, prompt, backward=backward, **own
        )

    make(context, model, output, plan, (video, start, seconds if backward else 0.0))


@_ability(
    _VIDEO,
    click.option("--start", type=Number(at_least=0), required=True, help="Seconds into the input."),
    click.option("--end", type=SECONDS, required=True, help="Seconds into the input."),
    click.option("--seconds", type=SECONDS, required=True, help="How much longer it becomes."),
    _PROMPT,
)
def recut(
    context: click.Context,
    video: str,
    start: float,
    end: float,
    seconds: float,
    prompt: str,
    model: str,
    output: str,
    **fields: Any,
) -> None:
    """VIDEO from --start to --end, and what the model lets come after it."""
    from sora_jax import plans

    own = as_settings(fields)
    make(
        context,
        model,
        output,
        lambda studio: plans.recut(studio, video, start, end, seconds, prompt, **own),
        (video, start, 0.0),
    )


@_ability(
    click.argument("video", type=click.Path(), required=False),
    _PROMPT,
    click.option("--seconds", type=SECONDS, default=1.5, help="How long it takes back to the beginning."),
    click.option("--duration", type=SECONDS, default=1.5, help="Without VIDEO: seconds before it goes back."),
    click.option("--aspect", default="1:1", help="Without VIDEO: width to height."),
    shape,
)
def loop(
    context: click.Context,
    video: str | None,
    prompt: str,
    seconds: float,
    model: str,
    output: str,
    **fields: Any,
) -> None:
    """An endless loop of VIDEO, or of --prompt alone."""
    from sora_jax import plans
    from sora_jax.studio import Request

    if video is None and not prompt:
        raise click.UsageError("There is nothing to loop: name a video, or give a --prompt.")
    own = as_settings(fields)

    def plan(studio: Any) -> Any:
        clip: Any = video
        if clip is None:
            with progress_bar(not context.meta[QUIET], "step") as progress:
                clip = studio.generate_batch([Request(prompt, **own, **fields)], progress)[0]
        return plans.loop(studio, clip, seconds, prompt, **own)

    make(context, model, output, plan)


@_ability(
    _VIDEO,
    click.option(
        "--at", type=ListOf(click.STRING), required=True, help="What is missing: 0.5-1,1.5-2 (seconds)."
    ),
    _PROMPT,
)
def fill(
    context: click.Context,
    video: str,
    at: tuple[str, ...],
    prompt: str,
    model: str,
    output: str,
    **fields: Any,
) -> None:
    """VIDEO with frames painted that are missing."""
    from sora_jax import plans

    missing = [_span(text) for text in at]
    own = as_settings(fields)
    make(
        context,
        model,
        output,
        lambda studio: plans.fill(studio, video, missing, prompt, **own),
        (video, 0.0, 0.0),
    )


@_ability(
    _VIDEO,
    click.option("--fps", type=SECONDS, default=24.0, help="Frames a second of the result."),
    _PROMPT,
    _START,
    _END,
)
def smooth(
    context: click.Context,
    video: str,
    fps: float,
    prompt: str,
    start: float,
    end: float | None,
    model: str,
    output: str,
    **fields: Any,
) -> None:
    """VIDEO at a higher frame rate."""
    from sora_jax import plans

    own = as_settings(fields)
    make(
        context,
        model,
        output,
        lambda studio: plans.smooth(studio, _input(studio, video, start, end), fps, prompt, **own),
        (video, start, 0.0),
    )


@_ability(
    click.argument("a", type=click.Path()),
    click.argument("b", type=click.Path()),
    click.option("--seconds", type=SECONDS, default=1.5, help="How long the passage takes."),
    click.option("--strength", type=click.FloatRange(0, 1), help="1: free; less: nearer to a cross-fade."),
    _PROMPT,
)
def connect(
    context: click.Context,
    a: str,
    b: str,
    seconds: float,
    strength: float | None,
    prompt: str,
    model: str,
    output: str,
    **fields: Any,
) -> None:
    """Clip A turns into clip B."""
    from sora_jax import plans

    own = as_settings(fields) | ({} if strength is None else {"strength": strength})
    make(context, model, output, lambda studio: plans.connect(studio, a, b, seconds, prompt, **own))


@_ability(
    click.argument("a", type=click.Path()),
    click.argument("b", type=click.Path()),
    click.option("--curve", type=ListOf(click.STRING), help="seconds:weight of B, such as 0:0,1:0.5,2:1."),
    click.option("--strength", type=click.FloatRange(0, 1), help="How far what is mixed is repainted."),
    _PROMPT,
)
def blend(
    context: click.Context,
    a: str,
    b: str,
    curve: tuple[str, ...] | None,
    strength: float | None,
    prompt: str,
    model: str,
    output: str,
    **fields: Any,
) -> None:
    """Clips A and B at once, by a weight over time."""
    from sora_jax import plans

    points = None if curve is None else [_pair(text) for text in curve]
    own = as_settings(fields) | ({} if strength is None else {"strength": strength})
    make(context, model, output, lambda studio: plans.blend(studio, a, b, points, prompt, **own))


@_ability(
    _VIDEO,
    click.argument("prompt", default=""),
    click.option("--box", type=ListOf(click.INT), help="left,top,width,height in the input's pixels."),
    click.option("--mask", type=click.Path(), help="A picture or video, light where it is painted anew."),
)
def inpaint(
    context: click.Context,
    video: str,
    prompt: str,
    box: tuple[int, ...] | None,
    mask: str | None,
    model: str,
    output: str,
    **fields: Any,
) -> None:
    """VIDEO with a part of the picture painted anew."""
    from sora_jax import plans

    if box is not None and len(box) != 4:
        raise click.UsageError("--box is four numbers: left,top,width,height.")
    own = as_settings(fields)
    make(
        context,
        model,
        output,
        lambda studio: plans.inpaint(studio, video, prompt, box=box, mask=mask, **own),
        (video, 0.0, 0.0),
    )


@_ability(
    _VIDEO,
    click.option("--aspect", required=True, help="Width to height, such as 9:16."),
    _PROMPT,
)
def outpaint(
    context: click.Context, video: str, aspect: str, prompt: str, model: str, output: str, **fields: Any
) -> None:
    """VIDEO in a larger frame of another aspect ratio."""
    from sora_jax import plans

    own = as_settings(fields)
    make(
        context,
        model,
        output,
        lambda studio: plans.outpaint(studio, video, aspect, prompt, **own),
        (video, 0.0, 0.0),
    )


@_ability(
    _VIDEO,
    click.argument("prompt"),
    click.option(
        "--strength", type=click.FloatRange(0, 1), default=0.7, help="0: all stays; 1: nothing does."
    ),
    click.option("--motion", is_flag=True, help="Keep the motion, free the colours."),
    _START,
    _END,
)
def edit(
    context: click.Context,
    video: str,
    prompt: str,
    strength: float,
    motion: bool,
    start: float,
    end: float | None,
    model: str,
    output: str,
    **fields: Any,
) -> None:
    """VIDEO as PROMPT has it."""
    from sora_jax import plans

    own = as_settings(fields)

    def plan(studio: Any) -> Any:
        return plans.edit(studio, _input(studio, video, start, end), prompt, strength, motion=motion, **own)

    make(context, model, output, plan, (video, start, 0.0))


@_ability(click.argument("file", type=click.Path()))
def storyboard(context: click.Context, file: str, model: str, output: str, **fields: Any) -> None:
    """The video that FILE tells in cards (YAML)."""
    from sora_jax.storyboard import read_storyboard

    board, own = read_storyboard(file), as_settings(fields)
    make(context, model, output, lambda studio: board.plan(studio, **own))


@_ability(
    _VIDEO,
    click.option("--resolution", type=click.IntRange(1), required=True, help="The short side in pixels."),
    click.option("--strength", type=click.FloatRange(0, 1), help="How far details are repainted."),
    _PROMPT,
    _START,
    _END,
)
def upscale(
    context: click.Context,
    video: str,
    resolution: int,
    strength: float | None,
    prompt: str,
    start: float,
    end: float | None,
    model: str,
    output: str,
    **fields: Any,
) -> None:
    """VIDEO at a higher resolution."""
    from sora_jax import plans

    own = as_settings(fields) | ({} if strength is None else {"strength": strength})

    length = _length(video, start, end)

    def plan(studio: Any) -> Any:
        return plans.upscale(studio, video, resolution, prompt, start=start, seconds=length, **own)

    make(context, model, output, plan, (video, start, 0.0))


@click.command()
@click.argument("prompt")
@click.option("--count", type=click.IntRange(1), default=4, help="How many.")
@click.option("--duration", type=SECONDS, default=2.0, help="Seconds.")
@click.option("--aspect", default="1:1", help="Width to height, such as 16:9 or 1.78.")
@click.option("-o", "--output", type=Output(".png"), default="variations.png", help="The contact sheet.")
@shape
@settings
@common
@click.pass_context
def variations(
    context: click.Context, prompt: str, count: int, model: str, output: pathlib.Path, **fields: Any
) -> None:
    """PROMPT under several seeds, as one contact sheet."""
    from sora_jax import studio as face
    from sora_jax.errors import atomic_path
    from sora_jax.sheet import contact_sheet

    own = as_settings(fields)
    with progress_bar(not context.meta[QUIET], "step") as progress:
        videos = face.load(model).variations(prompt, count, progress, **own, **fields)
    labels = [f"seed {own['seed'] + i}" for i in range(count)]
    with atomic_path(output) as temporary:
        contact_sheet(videos, labels, 2).save(temporary)
    said(output, videos[0], f", {count} seeds")


COMMANDS.append(variations)


def _span(text: str) -> tuple[float, float]:
    """ "0.5-1" or "0.5": seconds."""
    begin, dash, end = text.partition("-")
    try:
        return float(begin), float(end if dash else begin)
    except ValueError:
        raise UserError(f"--at {text!r} is no time: write seconds, 0.5 or 0.5-1.") from None


def _pair(text: str) -> tuple[float, float]:
    seconds, _, weight = text.partition(":")
    try:
        return float(seconds), float(weight)
    except ValueError:
        raise UserError(f"--curve {text!r} is no point: write seconds:weight, for example 0:0,2:1.") from None
