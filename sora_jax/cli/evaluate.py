"""`sora-jax evaluate`: a model measured, figures as tables, JSON and sheets."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import click

from sora_jax.cli.options import (
    MODEL,
    as_settings,
    bar,
    common,
    load_model,
    note,
    report_overwritten,
    settings,
)
from sora_jax.cli.terminal import ListOf, Number, Output, table
from sora_jax.errors import UserError, atomic_path

_SHEET_CLIPS = 24


@dataclasses.dataclass
class Results:
    """Where a command writes its figures and the first clips that it shows, if anywhere."""

    json_path: pathlib.Path | None
    sheet: pathlib.Path | None
    shown: list[tuple[str, Any]] = dataclasses.field(default_factory=list)

    def show(self, *clips: tuple[str, Any]) -> None:
        """Puts labels and videos on the sheet, where there is one and it has room."""
        if self.sheet and len(self.shown) < _SHEET_CLIPS:
            self.shown.extend(clips)

    def write(self, figures: dict[str, Any], columns: int) -> None:
        """Writes the figures and the sheet where asked, and names the files."""
        if self.json_path:
            with atomic_path(self.json_path) as temporary:
                temporary.write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n")
        if self.sheet:
            from sora_jax.media.contact_sheet import contact_sheet

            labels, videos = zip(*self.shown, strict=True)
            with atomic_path(self.sheet) as temporary:
                contact_sheet(videos, labels, columns).save(temporary)
        for path in filter(None, (self.json_path, self.sheet)):
            click.echo(f"wrote {path}")
            report_overwritten(path)


def _results(command: Callable[..., None]) -> Callable[..., None]:
    """The options of `Results`, handed over as `results`, and the common ones."""

    @functools.wraps(command)
    def collected(json_path: pathlib.Path | None, sheet: pathlib.Path | None, **fields: Any) -> None:
        command(results=Results(json_path, sheet), **fields)

    to_json = click.option("--json", "json_path", type=Output(), help="Write the figures here.")
    to_sheet = click.option("--sheet", type=Output(".png"), help="Write the first clips here, to look at.")
    return to_json(to_sheet(common(collected)))


@click.group()
@common
def evaluate() -> None:
    """Measure a model, or videos."""


@evaluate.command("vae")
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@MODEL
@click.option(
    "--resolution", type=click.IntRange(16), default=128, help="Each file's short side is scaled to it."
)
@click.option(
    "--seconds", type=Number(at_least=0), default=4.0, help="At most this much of each file; 0: all."
)
@click.option("--start", type=Number(at_least=0), default=0.0, help="Seconds into each file.")
@_results
def evaluate_vae_command(files: tuple[str, ...], model: str, results: Results, **fields: Any) -> None:
    """PSNR and SSIM of what the autoencoder makes of videos and pictures."""
    report = _report()
    from sora_jax.pipeline import pipeline as api

    def show(label: str, pair: Sequence[Any]) -> None:
        results.show(("the original of", pair[0]), (label, pair[1]))

    with bar("frame") as progress:
        result = report.evaluate_vae(
            api.load(model, lazy=True), files, **fields, progress=progress, show=show
        )

    def cells(name: str, size: str, frames: str, row: dict[str, Any]) -> tuple[str, ...]:
        psnr = "lossless" if row["psnr"] is None else f"{row['psnr']:.2f}"
        return name, size, frames, psnr, f"{row['ssim']:.4f}"

    rows = [
        cells(row["file"], f"{row['width']}×{row['height']}", str(row["frames"]), row)
        for row in result["files"]
    ]
    rows.append(cells("mean", "", "", result["mean"]))
    click.echo(table(("file", "size", "frames", "PSNR dB", "SSIM"), rows, numbers=4))
    for row in result["files"]:
        for sentence in row["notes"]:
            note(sentence)
    results.write(result, columns=2)


@evaluate.command("toyworld")
@click.option(
    "--split", type=click.Choice(["heldout", "validation", "paraphrase", "train"]), default="heldout"
)
@click.option("--clips", type=click.IntRange(1), default=256, help="How many.")
@click.option("--fps", type=Number(above=0), default=8.0, help="Frames a second.")
@click.option("--resolution", type=click.IntRange(1), default=64, help="The short side in pixels.")
@settings
@click.option("--durations", type=ListOf(Number(above=0)), default="2", help="Seconds, in turn: 2,4.")
@click.option(
    "--aspects", type=ListOf(click.STRING), default="1:1", help="Width to height, in turn: 1:1,16:9."
)
@click.option("--expand", is_flag=True, help="Give the model each prompt with details added to it.")
@click.option("--truth", is_flag=True, help="Read true clips instead: what the oracle itself gets wrong.")
@click.option("--vae", is_flag=True, help="Read true clips through the autoencoder: what is lost there.")
@_results
def evaluate_toyworld_command(model: str, truth: bool, vae: bool, results: Results, **fields: Any) -> None:
    """How often a clip shows what its prompt says, read back without a network.

    Prompts name one thing's size, colour, shape and direction; in the split "heldout" training never showed
    that shape in that colour, or that colour in that direction. The interval holds the true share in 95% of
    cases; chance is what a perfect clip of another prompt would get.
    """
    if truth and vae:
        raise click.UsageError("--truth and --vae exclude each other: choose one.")
    report = _report()
    source = "truth" if truth else "vae" if vae else "generated"
    pipeline = None if truth else load_model(model)
    with bar("clip") as progress:
        result = report.evaluate_toyworld(
            pipeline,
            source=source,
            progress=progress,
            show=lambda label, clips: results.show((label, clips[0])),
            **as_settings(fields),
            **fields,
        )
    click.echo(_accuracies(result["accuracy"]))
    if len(result["shapes"]) > 1:
        for part in result["shapes"]:
            click.echo(f"\n{part['width']}×{part['height']}, {part['frames']} frames")
            click.echo(_accuracies(part["accuracy"]))
    results.write(result, columns=3)


@evaluate.command("abilities")
@click.argument("names", metavar="[ABILITY...]", nargs=-1)
@click.option("--clips", type=click.IntRange(1), default=64, help="How many of each.")
@settings
@_results
def evaluate_abilities_command(
    names: tuple[str, ...], clips: int, model: str, results: Results, **fields: Any
) -> None:
    """Whether each ABILITY (default: all) does what it is for, on toyworld's clips, whose truth is known."""
    _report()
    from sora_jax.evaluation.abilities import evaluate_abilities

    own = as_settings(fields)
    seed = own.pop("seed")
    pipeline = load_model(model)
    pipeline.notify = functools.cache(pipeline.notify)  # a note holds for every clip: once is enough

    def show(label: str, videos: Sequence[Any]) -> None:
        results.show(
            *((label if number else "the input, or the truth", video) for number, video in enumerate(videos))
        )

    with bar("clip") as progress:
        result = evaluate_abilities(pipeline, names, clips, seed, progress, show, **own)
    rows = []
    for name, criteria in result["abilities"].items():
        for criterion, row in criteria.items():
            if "share" in row:
                cells = f"{row['share']:.1%}", f"{row['low']:.1%} to {row['high']:.1%}"
            else:
                cells = f"{row['mean']:.2f}", f"{row['least']:.2f} to {row['most']:.2f}"
            rows.append((name, criterion, *cells))
    click.echo(table(("ability", "criterion", "share or mean", "95% interval or range"), rows, numbers=2))
    results.write(result, columns=2)


def _report() -> Any:
    try:
        from sora_jax.evaluation import report
    except ModuleNotFoundError as error:
        raise UserError(
            f"Evaluating needs {error.name}: install it with pip install 'sora_jax[eval]'."
        ) from error
    return report


def _accuracies(accuracy: dict[str, dict[str, Any]]) -> str:
    rows = [
        (
            "all three" if name == "all" else name,
            f"{row['right']}/{row['of']}",
            f"{row['share']:.1%}",
            f"{row['low']:.1%} to {row['high']:.1%}",
            "-" if row["chance"] is None else f"{row['chance']:.1%}",
        )
        for name, row in accuracy.items()
    ]
    return table(("attribute", "right", "share", "95% interval", "chance"), rows, numbers=4)
