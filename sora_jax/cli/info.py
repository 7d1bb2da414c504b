"""`sora-jax info`: what a video or a picture is, and what made it."""

from __future__ import annotations

import math

import click

from sora_jax.cli.options import common


@click.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@common
def info(files: tuple[str, ...]) -> None:
    """Shape, rate and duration of each FILE, and the prompt, seed, model and settings that made it."""
    from sora_jax.media.video import probe
    from sora_jax.media.writing import read_metadata

    for number, file in enumerate(files):
        header = probe(file)
        height, width = header.size
        rows = {"file": file, "size": f"{width}×{height}"}
        if not header.still:
            rows["fps"] = f"{header.fps:.6g}"
            rows["duration"] = f"{header.seconds:.6g} s" if math.isfinite(header.seconds) else "unknown"
        rows |= read_metadata(file)
        if number:
            click.echo()
        wide = max(map(len, rows))
        for name, value in rows.items():
            click.echo(f"{name.ljust(wide)}  {' '.join(value.split())}")
