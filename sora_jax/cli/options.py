"""Options that commands share, and how a command that makes a video ends."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import click

from sora_jax.cli import terminal
from sora_jax.cli.terminal import ListOf, Number, Size
from sora_jax.errors import UserError, user_path
from sora_jax.pipeline.keywords import check_conflicts

QUIET = "sora_jax.quiet"
METADATA = "sora_jax.metadata"
LOADING = "sora_jax.loading"
MODEL = click.option(
    "-m",
    "--model",
    default="toyworld",
    help="A bundled model, a folder (of a model, a training run or a diffusers pipeline), or hf:OWNER/NAME.",
)
OUTPUT = click.option(
    "-o",
    "--output",
    help=f"The file to write ({', '.join(terminal.VIDEO_SUFFIXES)}).  [default: out.mp4, of a picture out.png]",
)
SHAPE = {
    "duration": click.option(
        "-d", "--duration", type=Number(above=0), metavar="SECONDS", help="Length of the result."
    ),
    "frames": click.option(
        "--frames", type=click.IntRange(1), help="The length as a number of frames, instead of --duration."
    ),
    "fps": click.option("--fps", type=Number(above=0), help="Frames a second of the result."),
    "resolution": click.option(
        "--resolution", type=click.IntRange(1), help="The short side of the result in pixels."
    ),
    "aspect": click.option(
        "--aspect", help="Width to height of the result, such as 16:9 or 1.78; what sticks out is cropped."
    ),
    "size": click.option(
        "--size",
        type=Size(),
        metavar="WxH",
        help="Width x height in pixels, as in 96x64, instead of --resolution and --aspect; Python's size is (height, "
        "width).",
    ),
}


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that every command but `train` has."""

    def hush(context: click.Context, _: click.Parameter, quiet: bool) -> None:
        context.meta[QUIET] = quiet or context.meta.get(QUIET, False)

    silence = click.option(
        "-q", "--quiet", is_flag=True, expose_value=False, callback=hush, help="No progress bar."
    )
    # main() looks for it, since an error may come before the options are read.
    trace = click.option("--traceback", is_flag=True, expose_value=False, help="Show where an error arose.")
    return trace(silence(command))


def writing(command: Callable[..., Any]) -> Callable[..., Any]:
    """Whether files are overwritten, and metadata written."""

    def keep(context: click.Context, _: click.Parameter, value: bool) -> None:
        context.meta[terminal.NO_CLOBBER] = value

    def leave_out(context: click.Context, _: click.Parameter, value: bool) -> None:
        context.meta[METADATA] = not value

    for option in (
        click.option(
            "--no-metadata",
            is_flag=True,
            expose_value=False,
            callback=leave_out,
            help="Write no prompt, seed, model and settings into the file; else `sora-jax info` shows them.",
        ),
        click.option(
            "--no-clobber",
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=keep,
            help="Refuse to overwrite a file; else a note says so.",
        ),
    ):
        command = option(command)
    return command


def settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """The fields of `settings.Settings`, and the model."""
    seeds, share = click.IntRange(0, 2**31 - 1), click.FloatRange(0, 1)
    for option in (
        click.option(
            "--max-frames",
            type=click.IntRange(1),
            help="The most frames, of all videos together.  [default: ten minutes' at the model's highest rate]",
        ),
        click.option("--strict", is_flag=True, help="Refuse words that the model doesn't know."),
        click.option(
            "--anchor/--no-anchor",
            default=None,
            help="Show later windows of a long video an early frame too.  [default: the model's own]",
        ),
        click.option(
            "--context-noise",
            type=click.FloatRange(0, 0.99),
            help="Noise level (sigma) at which a window of a long video sees those before it, so that it repairs "
            "what they got wrong (0 = off).  [default: the model's own]",
        ),
        click.option(
            "--step-cache",
            type=share,
            default=0.0,
            help="Take later layers' part from the step before where the first layer's changed by less, relative to "
            "itself; some 0.05 to 0.15 (0 = off).",
        ),
        click.option(
            "--negative", help="Negative prompt.  [default: none; of a diffusers folder its reference's]"
        ),
        click.option(
            "--low-noise-guidance",
            type=Number(),
            help="Guidance scale where the second of two transformers denoises (Wan2.2-A14B).  "
            "[default: that of --guidance; with --reference original the original's]",
        ),
        click.option(
            "--conditioning-guidance",
            type=Number(),
            default=1.0,
            help="Guidance scale of input pictures and clips (1 = off).",
        ),
        click.option(
            "--guidance-rescale", type=share, default=0.0, help="Reduces the contrast that guidance adds."
        ),
        click.option(
            "--guidance-interval",
            type=ListOf(share),
            default="0,1",
            help="Noise levels (sigmas) between which guidance is applied: lowest,highest.",
        ),
        click.option(
            "--guidance-method",
            type=click.Choice(["cfg", "zero", "apg"]),
            default="cfg",
            help="Classifier-free, CFG-Zero* or adaptive projected.",
        ),
        click.option("-S", "--seed", type=seeds, default=0, help="Random seed."),
        click.option(
            "--solver",
            type=click.Choice(["euler", "heun", "dpm", "unipc", "sde"]),
            help="heun evaluates the model twice a step, sde draws new noise in each.  "
            "[default: euler; of a diffusers folder its scheduler's]",
        ),
        click.option(
            "--sigmas",
            type=ListOf(share),
            metavar="1,…",
            help="Noise levels of the steps, from 1 down, in place of the model's schedule of so many --steps.",
        ),
        click.option(
            "--guidance",
            type=Number(),
            help="Classifier-free guidance scale (1 = off).  [default: 3; between two clips 1]",
        ),
        click.option(
            "-s",
            "--steps",
            type=click.IntRange(1),
            help="Steps of the solver.  [default: 12; of a distilled model 4]",
        ),
        *loading(),
        MODEL,
    ):
        command = option(command)
    return command


def loading() -> tuple[Callable[..., Any], ...]:
    """How a model is loaded; `load_model` reads them."""

    def keep(context: click.Context, parameter: click.Parameter, value: Any) -> None:
        if value is not None:
            context.meta.setdefault(LOADING, {})[parameter.name] = value

    def keep_loras(context: click.Context, _: click.Parameter, values: tuple[str, ...]) -> None:
        for value in values:
            file, mark, scale = value.rpartition("@")
            try:
                one = (file, float(scale)) if mark else (value, 1.0)
            except ValueError:
                one = value, 1.0
            context.meta.setdefault(LOADING, {}).setdefault("lora", []).append(one)

    return (
        click.option(
            "--lora",
            multiple=True,
            metavar="FILE[@SCALE]",
            expose_value=False,
            callback=keep_loras,
            help="A LoRA file for a diffusers folder, merged when it is loaded; several add up.",
        ),
        click.option(
            "--reference",
            type=click.Choice(["diffusers", "original"]),
            expose_value=False,
            callback=keep,
            help="Whose arithmetic, schedule and defaults are followed for a diffusers folder.  [default: diffusers]",
        ),
        click.option(
            "--dtype",
            type=click.Choice(["float32", "bfloat16", "float16"]),
            expose_value=False,
            callback=keep,
            help="Of the arithmetic.  [default: the model's own; of a diffusers folder float32]",
        ),
        click.option(
            "--weights",
            type=click.Choice(["float32", "bfloat16", "float16", "int8"]),
            expose_value=False,
            callback=keep,
            help="Of a diffusers folder's transformer in memory; int8 takes half of bfloat16.  [default: as --dtype]",
        ),
        click.option(
            "--decoder",
            metavar="FILE",
            expose_value=False,
            callback=keep,
            help="TAEHV's weights for this model, such as taew2_1.safetensors for Wan 2.1: a fast preview.",
        ),
        click.option(
            "--offload",
            is_flag=True,
            default=None,
            expose_value=False,
            callback=keep,
            help="Bring the layers of a diffusers folder's transformer to the device one by one: slower, and it fits.",
        ),
    )


def load_model(model: str) -> Any:
    """The pipeline of a model, which reads its files when they are first needed."""
    from sora_jax.pipeline import pipeline as api

    return api.load(model, lazy=True, **click.get_current_context().meta.get(LOADING, {}))


def shape(*leave_out: str, **defaults: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The fields of `shape.Shape`, one set for every command that makes video.

    Args:
      leave_out: of them.
      defaults: what --help says of those that aren't named, where that isn't the input's own.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for name, option in reversed(SHAPE.items()):
            if name not in leave_out:
                command = option(command)
                parameter = command.__click_params__[-1]  # type: ignore[attr-defined]
                default = defaults.get(name, "" if name in ("size", "frames") else "the input's own")
                parameter.help += f"  [default: {default}]" if default else ""
        return command

    return decorate


def as_settings(fields: dict[str, Any]) -> dict[str, Any]:
    """What `settings` read, as keywords of `settings.Settings`; takes them out of `fields`.

    Raises:
      UserError: the interval is not two numbers.
    """
    names = """seed steps guidance low_noise_guidance solver negative conditioning_guidance guidance_rescale
        guidance_interval guidance_method context_noise anchor step_cache sigmas strict max_frames"""
    own = {name: value for name in names.split() if (value := fields.pop(name)) is not None}
    if len(own["guidance_interval"]) != 2:
        raise UserError(
            "--guidance-interval is two numbers, the lowest and the highest level: for example 0.2,0.9."
        )
    return own


def as_shape(fields: dict[str, Any]) -> dict[str, Any]:
    """What `shape` read, as keywords of `shape.Shape`, those alone that were named; takes them out of `fields`.

    Raises:
      UserError: the size is named twice.
    """
    own = {name: value for name in SHAPE if (value := fields.pop(name, None)) is not None}
    check_conflicts(own)
    return own


def check_overrides(overrides: Sequence[str]) -> None:
    """Raises ClickException for the first of a command's further arguments that sets no value of a configuration."""
    odd = next((word for word in overrides if not word.startswith(("--config.", "-config."))), "")
    context = click.get_current_context()
    if odd.startswith("-"):
        raise click.NoSuchOption(odd.partition("=")[0], ctx=context)
    if odd:
        name = context.info_name
        raise click.UsageError(f"{odd!r} is no option of {name}: values are set as --config.key=value.")


def bar(unit: str = "step") -> contextlib.AbstractContextManager[Callable[[int, int], None]]:
    """The bar of the command that runs, where it isn't to be quiet."""
    return terminal.progress_bar(not click.get_current_context().meta[QUIET], unit)


def make(model: str, output: str, build: Callable[[Any, Any], Any]) -> None:
    """Makes the job that `build(pipeline, progress)` returns and writes the video."""
    path = user_path(output or "out.mp4")
    terminal.check_output(path, terminal.VIDEO_SUFFIXES)

    from sora_jax.media.audio import keep_sound

    pipeline = load_model(model)
    pipeline.notify = note
    with bar() as progress:
        job = build(pipeline, progress)
    with bar() as progress:
        (video,) = pipeline.make_streams([job], progress)
        if not output and len(video) == 1:
            path = path.with_suffix(".png")
            terminal.check_output(path)
        save(video, path)
    try:
        heard = job.sound is not None and keep_sound(job.sound[0], path, *job.sound[1:])
    except UserError as error:  # the pictures are there
        note(str(error))
        heard = False
    report_written(path, video, ", with the input's sound" if heard else "")


def save(video: Any, path: pathlib.Path) -> None:
    """Writes a video, with its metadata unless that is to be left out."""
    own = click.get_current_context().meta.get(METADATA, True)
    video.save(path) if own else video.save(path, metadata=None)


def note(sentence: str) -> None:
    """Prints a note on what differs from what was asked for."""
    click.echo(f"note: {sentence}", err=True)


def report_written(path: pathlib.Path, video: Any, more: str = "") -> None:
    """One line about a file that was written."""
    size = f"{video.size[1]}×{video.size[0]}"
    time = f", {len(video)} frames at {video.fps:g} fps ({video.duration:g} s)" if len(video) > 1 else ""
    click.echo(f"{path}  {size}{time}{more}")
    report_overwritten(path)


def report_overwritten(path: pathlib.Path) -> None:
    """A note where a file of that name was there before."""
    if path in click.get_current_context().meta.get(terminal.EXISTED, ()):
        note(f"{path} was there before and was overwritten.")
