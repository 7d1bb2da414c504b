"""`sora-jax evaluate videos`: metrics of any folder of videos."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import click

from sora_jax.cli.options import bar, common, note, report_overwritten
from sora_jax.cli.terminal import ListOf, Number, Output, Size, table
from sora_jax.errors import UserError, atomic_path, user_path

_PARTS = ".parts"  # beside the figures, while they are measured


class Pairs(click.ParamType):
    """NAME=VALUE."""

    name = "NAME=VALUE"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        name, sign, rest = value.partition("=")
        if not (name and sign and rest):
            self.fail(f"{value!r} is no name, = and a value.", param, ctx)
        return name.strip(), rest.strip()


class Shard(click.ParamType):
    """i/n, from 1/n to n/n."""

    name = "i/n"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", value.strip())
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            self.fail(f"{value!r} is no shard: write one of 1/4, 2/4, 3/4 and 4/4.", param, ctx)
        return int(match[1]), int(match[2])


@click.command("videos")
@click.argument("folder", metavar="FOLDER")
@click.option(
    "--metrics",
    type=ListOf(click.STRING),
    help="Of fvd, fid, psnr, ssim, ms_ssim, lpips, clip_score, temporal_flicker, warping_error, motion_magnitude, "
    "dynamic_degree, subject_consistency, background_consistency.  [default: fvd where there is a reference, and those "
    "that need nothing]",
)
@click.option("--reference", help="A folder to compare with, or statistics of one (.npz).")
@click.option("--frames", type=click.IntRange(1), default=16, help="Of a clip.")
@click.option(
    "--per-video", type=click.IntRange(1), default=1, help="Clips of a file, from its first frame on."
)
@click.option("--fps", type=Number(above=0), help="Resample to it.  [default: each file's own]")
@click.option("--size", type=Size(), metavar="WxH", help="Scale and crop to it.  [default: each file's own]")
@click.option(
    "--features",
    type=Pairs(),
    multiple=True,
    metavar="METRIC=NAME",
    help="Features of fvd (i3d, random-video), or of fid, subject_consistency and background_consistency "
    "(efficientnet, inception, clip, dino, random-image).",
)
@click.option(
    "--weights",
    type=Pairs(),
    multiple=True,
    metavar="NAME=PATH",
    help="Local weights of inception, clip, dino or lpips.",
)
@click.option("--image-frames", type=click.IntRange(1), default=4, help="Of a clip, for fid.")
@click.option("--few", is_flag=True, help="Allow fvd and fid of fewer clips than their covariance needs.")
@click.option(
    "--shard", type=Shard(), help="Measure this part alone; the same command without it puts all together."
)
@click.option("--parts", help="A folder for what is measured of each clip.  [default: beside --json]")
@click.option(
    "--save-statistics", type=Output(".npz"), help="Write FOLDER's own statistics, for --reference."
)
@click.option(
    "--replicates", type=click.IntRange(0), help="Of the bootstrap.  [default: 1000; of fvd and fid fewer]"
)
@click.option("-S", "--seed", type=click.IntRange(0, 2**31 - 1), default=0, help="Of the bootstrap.")
@click.option("--json", "json_path", type=Output(), help="Write the figures here.")
@common
def evaluate_videos_command(
    folder: str,
    metrics: tuple[str, ...] | None,
    frames: int,
    per_video: int,
    fps: float | None,
    size: tuple[int, int] | None,
    features: tuple[tuple[str, str], ...],
    weights: tuple[tuple[str, str], ...],
    shard: tuple[int, int] | None,
    parts: str | None,
    save_statistics: pathlib.Path | None,
    json_path: pathlib.Path | None,
    **fields: Any,
) -> None:
    """Metrics of the videos in FOLDER, ours or another model's, with 95% intervals.

    What was measured is kept while the command runs: stopped and started again, it goes on. docs/metrics.md says what
    each metric is and needs.
    """
    if shard and not (parts or json_path):
        raise click.UsageError(
            "--shard needs a folder that all shards share: name it with --parts, or name --json."
        )
    try:
        from sora_jax.evaluation.clips import ClipSettings
        from sora_jax.evaluation.parts import remove_parts
        from sora_jax.evaluation.videos import evaluate_videos
    except ModuleNotFoundError as error:
        raise UserError(
            f"Metrics need {error.name}: install it with pip install 'sora_jax[metrics]'."
        ) from error
    place = user_path(parts) if parts else json_path and json_path.with_name(json_path.name + _PARTS)
    with bar("clip") as progress:
        result = evaluate_videos(
            folder,
            metrics or (),
            clip=ClipSettings(frames, fps, size, per_video),
            features=dict(features),
            weights=dict(weights),
            shard=shard or (1, 1),
            parts=place,
            statistics=save_statistics,
            progress=progress,
            **fields,
        )
    for sentence in result["notes"]:
        note(sentence)
    if "shard" in result:
        click.echo(
            f"measured {result['measured']} of {result['of']} clips into {place}: when all shards are done, run the "
            "same command without --shard."
        )
        return
    click.echo(_rows(result["metrics"]))
    if save_statistics:
        click.echo(f"wrote {save_statistics}")
        report_overwritten(save_statistics)
    if json_path:
        import json

        with atomic_path(json_path) as temporary:
            temporary.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
        click.echo(f"wrote {json_path}")
        report_overwritten(json_path)
        if not parts and place:
            remove_parts(place)


def _rows(results: dict[str, dict[str, Any]]) -> str:
    from sora_jax.evaluation.catalogue import METRICS

    def number(name: str, value: float | None) -> str:
        if value is None:
            return "-"
        # Distances have no scale of their own: it is that of the features.
        return f"{value:.4g}" if METRICS[name].reference == "set" else f"{value:.{METRICS[name].digits}f}"

    rows = []
    for name, told in results.items():
        metric = METRICS[name]
        title = metric.title + (f" ({told['features']})" if "features" in told else "")
        title += f", {metric.unit}" if metric.unit else ""
        interval = (
            "-" if told["low"] is None else f"{number(name, told['low'])} to {number(name, told['high'])}"
        )
        value = "lossless" if told["value"] is None else number(name, told["value"])
        rows.append((title, metric.better, value, interval, str(told["clips"])))
    return table(("metric", "better", "value", "95% interval", "clips"), rows, numbers=3)
