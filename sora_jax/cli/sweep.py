"""`sora-jax sweep`: many runs of training that differ in a few settings, and the table of what they found."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import click

from sora_jax.cli.options import check_overrides, common
from sora_jax.cli.terminal import Output
from sora_jax.errors import UserError, user_path

OUT, LATENTS = "runs/sweeps", "runs/sweeps/latents"


class SweepGroup(click.Group):
    """`sora-jax sweep FILE` is `sora-jax sweep run FILE`."""

    default = "run"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        named = args and (args[0] in self.commands or args[0] in ("-h", "--help"))
        return super().parse_args(ctx, args if named or not args else [self.default, *args])


@click.group("sweep", cls=SweepGroup, no_args_is_help=True)
def sweep() -> None:
    """Train and measure many runs that differ in a few settings: sora-jax sweep FILE.

    FILE is a sweep that comes with sora_jax (resolution, duration, aspect_ratio, ...) or a Python file with a function
    get_sweep; see docs/sweeps.md.
    """


@sweep.command("run", context_settings={"ignore_unknown_options": True})
@click.argument("file", metavar="FILE[:ARGUMENT]")
@click.argument("overrides", metavar="[--config.KEY=VALUE ...]", nargs=-1, type=click.UNPROCESSED)
@click.option("--out", type=click.Path(), help=f"Of runs and results.jsonl.  [default: {OUT}/NAME]")
@click.option(
    "--latents", type=click.Path(), default=LATENTS, help="Of encoded clips, which sweeps may share."
)
@click.option("--jobs", type=click.IntRange(1), default=1, help="Runs at a time.")
@click.option(
    "--only", multiple=True, metavar="KEY|INDEX|FIRST-LAST", help="Of these runs alone; may be repeated."
)
@click.option(
    "--debug", is_flag=True, help="The debug form: all parts of every run, in which nothing is learned."
)
@click.option(
    "--print", "as_list", is_flag=True, help="Print a command for each run instead, and run nothing."
)
@click.option(
    "--slurm", "as_slurm", is_flag=True, help="Print a script for sbatch instead: an array of the runs."
)
@click.option(
    "--xpk", "as_xpk", is_flag=True, help="Print commands for xpk instead: a workload for each run."
)
@common
def run_command(
    file: str,
    overrides: tuple[str, ...],
    out: str | None,
    latents: str,
    jobs: int,
    only: tuple[str, ...],
    debug: bool,
    as_list: bool,
    as_slurm: bool,
    as_xpk: bool,
) -> None:
    """Make the runs of a sweep that have no result yet, and show the table.

    --config.KEY=VALUE sets a key of all runs (--config.steps=500). It may be stopped and started again at any time:
    finished runs are kept, others go on. A run that fails is marked, and the rest goes on.
    """
    if as_list + as_slurm + as_xpk > 1:
        raise click.UsageError("--print, --slurm and --xpk exclude each other: choose one.")
    _need_extra()
    from sora_jax.sweep import clusters, points, runner
    from sora_jax.train.__main__ import split_overrides

    changes, rest = split_overrides(overrides)
    check_overrides(rest)
    file = f"{file}:{points.DEBUG}" if debug and not file.endswith(f":{points.DEBUG}") else file
    loaded, name = points.load(file), points.name_of(file)
    chosen = _choose(points.resolve(loaded, changes), only)
    folder, latents_folder = user_path(out or os.path.join(OUT, name)), user_path(latents)
    command = ["sora-jax", "sweep", file, "--out", str(folder)]
    command += [] if latents == LATENTS else ["--latents", str(latents_folder)]
    command += [f"--config.{key}={text}" for key, text in changes.items()]
    if as_list:
        click.echo(clusters.list_commands(chosen, command))
    elif as_slurm:
        click.echo(clusters.slurm_script(chosen, command, name), nl=False)
    elif as_xpk:
        click.echo(clusters.xpk_commands(chosen, command, name, folder, latents_folder))
    else:
        one_process = jobs == 1 and file.endswith(f":{points.DEBUG}")
        rows = runner.run_sweep(chosen, name, folder, latents_folder, jobs, one_process)
        _report(rows, folder)


@sweep.command("table")
@click.argument("file", metavar="FILE|results.jsonl")
@click.option("--by", default="", metavar="AXIS", help="Means over all other axes too.")
@click.option("--metric", "metrics", multiple=True, help="Columns whose names have this; may be repeated.")
@click.option(
    "--against", default="", metavar="ARM", help="Whose differences are shown.  [default: the first]"
)
@click.option("--plot", type=Output(".png"), help="Draw the table here.")
@click.option("--markdown", type=Output(".md"), help="Write the table here too.")
@common
def table_command(
    file: str,
    by: str,
    metrics: Sequence[str],
    against: str,
    plot: pathlib.Path | None,
    markdown: pathlib.Path | None,
) -> None:
    """Means and 95% intervals over seeds of a sweep's finished runs, as Markdown and as a picture.

    FILE is the sweep, whose results are in runs/sweeps/NAME, a folder that --out named, or a results.jsonl.
    """
    _need_extra()
    from sora_jax.sweep import results, table

    path = _find_results(file)
    rows = results.read_rows(path)
    shown = table.latest(rows)
    made = table.make_table(shown, by, metrics)
    text = table.as_markdown(made, against)
    click.echo(text)
    failed = sum(row["status"] == results.FAILED for row in shown)
    for count, what in ((failed, "failed"), (len(rows) - len(shown), "of other settings were left out")):
        if count:
            click.echo(f"note: {count} run{'' if count == 1 else 's'} {what}.", err=True)
    if plot:
        table.draw(made, plot, shown[0].get("sweep", path.parent.name))
        click.echo(f"wrote {plot}")
    if markdown:
        from sora_jax.errors import atomic_path

        with atomic_path(markdown) as temporary:
            temporary.write_text(text + "\n")
        click.echo(f"wrote {markdown}")


def _find_results(file: str) -> pathlib.Path:
    from sora_jax.sweep.points import name_of
    from sora_jax.sweep.results import RESULTS

    path = user_path(file)
    if path.is_dir():
        path = path / RESULTS
    elif path.suffix != ".jsonl":
        path = user_path(OUT) / name_of(file) / RESULTS
    if not path.is_file():
        raise UserError(f"There are no results in {path.parent}: run the sweep first, or name its {RESULTS}.")
    return path


def _choose(chosen: list[Any], only: Sequence[str]) -> list[Any]:
    """The points of these keys or indices; all where none is named."""
    known = {point.key: point for point in chosen} | {str(point.index): point for point in chosen}
    wanted: list[str] = []
    for one in only:
        span = re.fullmatch(r"(\d+)-(\d+)", one)
        wanted += [str(index) for index in range(int(span[1]), int(span[2]) + 1)] if span else [one]
    for one in wanted:
        if one not in known:
            raise UserError(
                f"The sweep has no run {one!r}: give a number from 0 to {len(chosen) - 1}, two of them as 0-3, or a "
                "key that --print shows."
            )
    return [known[one] for one in dict.fromkeys(wanted)] if only else chosen


def _report(rows: list[dict[str, Any]], folder: pathlib.Path) -> None:
    from sora_jax.sweep import results, table

    done = [row for row in rows if row["status"] == results.DONE]
    failed = [row for row in rows if row["status"] == results.FAILED]
    if done:
        click.echo(table.as_markdown(table.make_table(done)))
    click.echo(f"{len(done)} of {len(rows)} runs are done: {folder / results.RESULTS}", err=True)
    if failed:
        first = ", ".join(failed[0]["labels"].values())
        raise UserError(
            f"{len(failed)} of {len(rows)} runs failed ({first}: {failed[0]['error'].rstrip('.')}): the same command "
            "tries them again, and keeps the others."
        )


def _need_extra() -> None:
    try:
        import scipy  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"A sweep needs {error.name}: install it with pip install 'sora_jax[eval]'."
        ) from error
