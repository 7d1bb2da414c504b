"""`sora-jax export`: what a run on top of an open model learned, as diffusers reads it."""

from __future__ import annotations

import click

from sora_jax.cli.options import common
from sora_jax.errors import user_path


@click.command()
@click.argument("run", metavar="RUN")
@click.option("--to", required=True, type=click.Path(), metavar="FOLDER", help="New, or empty.")
@click.option("--weights", default="float32", help="Type of the weights: float32, bfloat16, float16.")
@click.option("--step", type=click.IntRange(1), help="Of the checkpoint.  [default: the newest]")
@click.option("--last", is_flag=True, help="The last weights, not their average.")
@common
def export(run: str, to: str, weights: str, step: int | None, last: bool) -> None:
    """Write what the training run RUN learned as diffusers reads it.

    A LoRA becomes FOLDER/pytorch_lora_weights.safetensors, for `pipeline.load_lora_weights` and --lora; a model that
    was trained as a whole, or its autoencoder, becomes a diffusers folder, which --model takes too.
    """
    from sora_jax.checkpoints.finetuned import export_run

    written = export_run(user_path(run), user_path(to), weights, not last, step)
    click.echo(str(written))
