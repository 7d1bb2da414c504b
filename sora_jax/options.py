"""Options that commands share, and how a command that makes a video ends."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import click

from sora_jax.errors import UserError
from sora_jax.terminal import VIDEO_SUFFIXES, ListOf, Number, check_output, progress_bar

QUIET = "sora_jax.quiet"
MODEL = click.option(
    "--model",
    default="toyworld",
    help="A bundled model, a folder that holds one, or a training run's workdir.",
)
OUTPUT = click.option(
    "-o", "--output", default="out.mp4", help=f"The file to write ({', '.join(VIDEO_SUFFIXES)})."
)


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that every command has."""

    def hush(context: click.Context, _: click.Parameter, quiet: bool) -> None:
        context.meta[QUIET] = quiet or context.meta.get(QUIET, False)

    silence = click.option(
        "-q", "--quiet", is_flag=True, expose_value=False, callback=hush, help="No progress bar."
    )
    # main() looks for it, since an error may come before the options are read.
    trace = click.option("--traceback", is_flag=True, expose_value=False, help="Show where an error arose.")
    return trace(silence(command))


def settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """The fields of `filling.Settings`, and the model."""
    seeds, share = click.IntRange(0, 2**31 - 1), click.FloatRange(0, 1)
    for option in (
        click.option("--negative", default="", help="Words for what is not to be seen."),
        click.option(
            "--given-guidance", type=Number(), default=1.0, help="Of pictures and clips that are given."
        ),
        click.option(
            "--guidance-rescale", type=share, default=0.0, help="Takes back contrast that guidance adds."
        ),
        click.option(
            "--guidance-interval",
            type=ListOf(share),
            default="0,1",
            help="Noise levels between which guidance acts: lowest,highest.",
        ),
        click.option("--guidance-method", type=click.Choice(["cfg", "zero", "apg"]), default="cfg"),
        click.option("--seed", type=seeds, default=0, help="Another one, another video."),
        click.option("--solver", type=click.Choice(["euler", "heun", "dpm"]), default="euler"),
        click.option(
            "--guidance", type=Number(), default=3.0, help="Of the prompt; 1: none, more: stricter."
        ),
        click.option("--steps", type=click.IntRange(1), default=30, help="Of the solver."),
        MODEL,
    ):
        command = option(command)
    return command


def shape(command: Callable[..., Any]) -> Callable[..., Any]:
    """Rate and size of what is made from words."""
    for option in (
        click.option("--fps", type=Number(above=0), default=8.0, help="Frames a second."),
        click.option("--resolution", type=click.IntRange(1), default=64, help="The short side in pixels."),
    ):
        command = option(command)
    return command


def as_settings(fields: dict[str, Any]) -> dict[str, Any]:
    """What `settings` read, as keywords of `filling.Settings`; takes them out of `fields`.

    Raises:
      UserError: the interval is not two numbers.
    """
    names = ("negative", "given_guidance", "guidance_rescale", "guidance_interval", "guidance_method")
    own = {name: fields.pop(name) for name in (*names, "seed", "solver", "guidance", "steps")}
    if len(own["guidance_interval"]) != 2:
        raise UserError(
            "--guidance-interval is two numbers, the lowest and the highest level: for example 0.2,0.9."
        )
    return own


def make(
    context: click.Context,
    model: str,
    output: str,
    plan: Callable[[Any], Any],
    sound: tuple[str, float, float] | None = None,
) -> None:
    """Makes what `plan(studio)` returns and writes it.

    Args:
      sound: (file, seconds into it, seconds into the result) whose sound goes along, where it has some.
    """
    path = pathlib.Path(output)
    check_output(path, VIDEO_SUFFIXES)

    from sora_jax import studio as face
    from sora_jax.media import keep_sound

    studio = face.load(model)
    studio.say = lambda note: click.echo(f"note: {note}", err=True)
    wanted = plan(studio)
    with progress_bar(not context.meta[QUIET], "step") as progress:
        video = studio.make([wanted], progress)[0]
    video.save(path)
    heard = sound is not None and keep_sound(sound[0], path, start=sound[1], at=sound[2])
    said(path, video, ", with the input's sound" if heard else "")


def said(path: pathlib.Path, video: Any, more: str = "") -> None:
    """One line about a file that was written."""
    size = f"{video.size[1]}×{video.size[0]}"
    click.echo(f"{path}  {size}, {len(video)} frames at {video.fps:g} fps ({video.duration:g} s){more}")
