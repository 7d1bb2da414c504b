"""The command line: `sora-jax generate`, `models`, `train`; the abilities are in `cli/edit.py`.

What can be found wrong is found before the work begins. Heavy imports wait inside the commands, so that `--help`
answers at once. Exit status: 0, 2 after `error: <sentence>`, 130 when stopped, 1 where the program itself is at
fault.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from sora_jax.backend import __version__, check_version, restart_with_huge_pages
from sora_jax.cli import options
from sora_jax.cli.config import config_command
from sora_jax.cli.convert import convert
from sora_jax.cli.edit import COMMANDS
from sora_jax.cli.evaluate import evaluate
from sora_jax.cli.evaluate_videos import evaluate_videos_command
from sora_jax.cli.export import export
from sora_jax.cli.info import info
from sora_jax.cli.plan import plan
from sora_jax.cli.sweep import sweep
from sora_jax.cli.terminal import VIDEO_SUFFIXES, Number, place_outputs, table
from sora_jax.errors import UserError, user_path
from sora_jax.media.texts import read_text
from sora_jax.pipeline.keywords import AS_OPTIONS, suggestion
from sora_jax.pipeline.registry import TEXT_TO_VIDEO


class Group(click.Group):
    """Commands in the order in which they were added; one that is mistyped is answered with the nearest."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100},
)
@click.version_option(__version__, prog_name="sora-jax", message="%(prog)s %(version)s")
@options.common
@click.pass_context
def cli(context: click.Context) -> None:
    """Open video generation: any duration, resolution and aspect ratio."""
    token = AS_OPTIONS.set(True)
    context.call_on_close(lambda: AS_OPTIONS.reset(token))


@cli.command()
@click.argument("prompts", metavar="PROMPT...", nargs=-1)
@click.option("--prompt-file", type=click.Path(), help="One prompt a line; # begins a comment.")
@click.option("-n", "--count", type=click.IntRange(1, 1000), default=1, help="Videos a prompt, seeds rising.")
@click.option(
    "-d",
    "--duration",
    "--seconds",
    "duration",
    type=Number(above=0),
    metavar="SECONDS",
    help=f"Length, as long as you like.  [default: {TEXT_TO_VIDEO['duration']}]",
)
@options.shape("duration", **TEXT_TO_VIDEO)
@click.option("-o", "--output", default="out.mp4", help=f"A file ({', '.join(VIDEO_SUFFIXES)}) or a folder.")
@click.option("--noise", type=click.Path(), help="FILE.npy, float32[c,t,y,x], in place of the seed's noise.")
@click.option("--latents-out", type=click.Path(), help="FILE.npy for the denoised latents, float32[c,t,y,x].")
@options.writing
@options.settings
@options.common
def generate(
    prompts: tuple[str, ...],
    prompt_file: str | None,
    model: str,
    count: int,
    output: str,
    noise: str | None,
    latents_out: str | None,
    **fields: Any,
) -> None:
    """Make a video of each PROMPT.

    Several prompts, or --count, make several files: out-1.mp4, out-2.mp4, ... All are sampled together. A video is
    written while it is made: a minute takes no more memory than seconds do.
    """
    prompts = (*prompts, *_read_prompts(prompt_file)) if prompt_file is not None else prompts
    if not prompts:
        raise click.UsageError("There is no prompt: say what is to be seen, in quotes.")
    if len(prompts) > 2 and not any(" " in prompt for prompt in prompts):
        options.note("Each word is a prompt of its own here: put a prompt of several in quotes.")
    own = options.as_settings(fields)
    seed = own.pop("seed")
    wanted = [(prompt, seed + i) for prompt in prompts for i in range(count)]
    paths = place_outputs(output, wanted)

    from sora_jax.pipeline import pipeline as api

    own |= options.as_shape(fields)
    for prompt, number in wanted:  # before a model is looked for
        api.Request(prompt, seed=number, **own)
    pipeline = options.load_model(model)
    own = pipeline.request_defaults(own)
    requests = [api.Request(prompt, seed=number, **own) for prompt, number in wanted]
    for request in requests:
        pipeline.check(request)
    with options.bar() as progress:
        if noise or latents_out:
            videos = [_compare(pipeline, requests, noise, latents_out, progress)]
        else:
            videos = pipeline.stream_batch(requests, progress)
        for video, path in zip(videos, paths, strict=True):
            options.save(video, path)
    for video, path in zip(videos, paths, strict=True):
        options.report_written(path, video)


def _compare(
    pipeline: Any, requests: Sequence[Any], noise: str | None, latents_out: str | None, progress: Any
) -> Any:
    """The video of one request, from a file's noise and with its latents written."""
    import numpy as np

    from sora_jax.errors import atomic_path

    if len(requests) != 1:
        raise UserError("--noise and --latents-out are for one video: give one prompt.")
    (request,) = requests
    given = None
    if noise is not None:
        path = user_path(noise)
        try:
            given = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(
                f"{path} can't be read as an array ({error}): write one with numpy.save."
            ) from error
    job = pipeline.request_job(
        request.prompt, given, **{k: v for k, v in vars(request).items() if k != "prompt"}
    )
    (latents,) = pipeline.sample_latents([job], progress)
    if latents_out is not None:
        with atomic_path(user_path(latents_out)) as temporary, temporary.open("wb") as file:
            np.save(file, latents)
    return pipeline.decode_job(job, latents)


@cli.command()
@click.argument("folders", metavar="[PATH...]", nargs=-1)
@options.common
def models(folders: tuple[str, ...]) -> None:
    """List what can be loaded: bundled models, and models and training runs in each PATH (default: runs)."""
    from sora_jax.pipeline import pipeline as api

    folders = tuple(str(user_path(folder)) for folder in folders)
    for folder in folders:
        if not os.path.isdir(folder):
            raise UserError(f"There is no folder {folder}: check the name.")
    entries = api.list_models(folders or ("runs",))
    rows = [(entry.name, entry.kind, entry.summary) for entry in entries]
    click.echo(table(("model", "kind", "what it is"), rows) if rows else "There is no model here yet.")


@cli.command(
    add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def train(context: click.Context, arguments: tuple[str, ...]) -> None:
    """Train: --config toyworld_dit --workdir runs/x [--config.key=value ...]."""
    restart_with_huge_pages()
    from sora_jax.train.__main__ import main as train_main

    context.exit(train_main(list(arguments) or ["--help"]))


for command in (*COMMANDS, info, evaluate, plan, config_command, sweep, convert, export):
    cli.add_command(command)
evaluate.add_command(evaluate_videos_command)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        check_version()
        return cli.main(arguments or ["--help"], prog_name="sora-jax", standalone_mode=False) or 0
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped", err=True)
        return 130
    except Exception as error:
        if "--traceback" in arguments:
            traceback.print_exc()
        if isinstance(error, click.ClickException):
            context = getattr(error, "ctx", None)
            says = _unknown_option(error) if isinstance(error, click.NoSuchOption) else error.format_message()
            joint = " See" if says.endswith("?") else "; see"
            see = f"{joint} {context.command_path} --help" if context else ""
            click.echo(f"error: {says.rstrip('.')}{see}.", err=True)
            return 2
        if isinstance(error, UserError):
            click.echo(f"error: {error}", err=True)
            return 2
        what = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no more is known'])[0]}"
        click.echo(f"error: the program failed ({what}): run it with --traceback to see where.", err=True)
        return 1


def _unknown_option(error: click.NoSuchOption) -> str:
    """A sentence with the option or the argument of the command that is meant."""
    written = {}
    for parameter in error.ctx.command.params if error.ctx else ():
        name = parameter.name or ""
        if isinstance(parameter, click.Argument):
            written[name] = f"{(parameter.metavar or name.upper()).strip('[].')} (an argument, without --)"
        else:
            long = f"--{name.replace('_', '-')}"
            written[name] = " ".join(
                [long if long in parameter.opts else parameter.opts[-1], parameter.metavar or ""]
            ).strip()
    name = error.option_name.lstrip("-").replace("-", "_")
    hint = suggestion(name, written, written)
    return f"No such option {error.option_name!r}{': ' if hint else ''}{hint}"


def _read_prompts(path: str) -> list[str]:
    lines = [line.strip() for line in read_text(path).split("\n")]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise UserError(f"{path} has no prompt in it: write one a line.")
    return prompts


if __name__ == "__main__":
    sys.exit(main())
