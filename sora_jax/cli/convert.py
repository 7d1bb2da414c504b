"""`sora-jax convert`: original files of a model, as a folder that diffusers and this package read."""

from __future__ import annotations

import click

from sora_jax.cli import options
from sora_jax.errors import user_path


@click.command()
@click.argument("sources", metavar="FILE...", nargs=-1, required=True)
@click.option("--to", required=True, type=click.Path(), metavar="FOLDER", help="New, or empty.")
@click.option("--base", default="", metavar="MODEL", help="A diffusers folder to copy other parts from.")
@click.option("--tokenizer", type=click.Path(), metavar="FOLDER", help="With tokenizer.json or spiece.model.")
@click.option(
    "--weights",
    help="Type of the weights: float32, bfloat16, float16.  [default: the files' own]",
)
@options.common
def convert(sources: tuple[str, ...], to: str, base: str, tokenizer: str | None, weights: str | None) -> None:
    """Make a diffusers folder of original files of Wan or LTX-Video.

    FILE is a transformer, an autoencoder or a text encoder: of the original code (.safetensors, .pth), ComfyUI's, or
    diffusers'; or a folder with all of them. A whole model takes all three; with --base the rest comes from a diffusers
    folder of the same model.
    """
    from sora_jax.checkpoints.convert import convert as write

    with options.bar("MB") as progress:
        folder = write(
            [user_path(source) for source in sources],
            user_path(to),
            base,
            user_path(tokenizer) if tokenizer else None,
            weights,
            lambda done, total: progress(done // 10**6, total // 10**6),
        )
    click.echo(str(folder))
