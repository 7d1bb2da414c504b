"""`sora-jax info`: what a video or a picture is, and what made it."""

from __future__ import annotations

import click

from sora_jax.errors import UserError
from sora_jax.options import common


@click.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@common
def info(files: tuple[str, ...]) -> None:
    """Shape, rate and duration of each FILE, and the prompt, seed, model and settings that made it."""
    from sora_jax.media import read_media

    for number, file in enumerate(files):
        media = read_media(file, seconds=1e-6)
        click.echo(("\n" if number else "") + file)
