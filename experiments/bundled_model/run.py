"""Regenerates the bundled model `toyworld`: autoencoder, transformer, files, figures. See README.md beside this.

    python experiments/bundled_model/run.py vae
    python experiments/bundled_model/run.py dit
    python experiments/bundled_model/run.py export
    python experiments/bundled_model/run.py evaluate

Each command goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys

import click

# bfloat16 on CPUs: without it XLA widens every product to float32 (experiments/LOG.md).
if "XLA_FLAGS" not in os.environ and "cpu" in os.environ.get("JAX_PLATFORMS", "cpu"):
    os.environ["XLA_FLAGS"] = "--xla_cpu_experimental_onednn_custom_call=true"

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
FOOTAGE = ROOT.parent / "shared" / "footage"


@click.group()
def main() -> None:
    """The road from nothing to the bundled model."""


@main.command(context_settings={"ignore_unknown_options": True})
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def vae(overrides: tuple[str, ...]) -> None:
    """Trains the autoencoder on toyworld and, where there is footage beside the project, on that."""
    source = f"toyworld:0.7,{FOOTAGE}:0.3" if FOOTAGE.is_dir() else "toyworld"
    _train(
        "toyworld_vae",
        "vae",
        f"--config.data.source={source}",
        "--config.data.cache=cache/footage",
        *overrides,
    )


@main.command(context_settings={"ignore_unknown_options": True})
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def dit(overrides: tuple[str, ...]) -> None:
    """Trains the transformer on the latents of runs/vae."""
    _train("toyworld_dit", "dit", "--config.autoencoder=runs/vae", *overrides)


@main.command()
@click.option("--run", default="runs/dit", help="Workdir of the transformer's run.")
@click.option("--name", default="toyworld")
def export(run: str, name: str) -> None:
    """Writes the run's averaged weights, configuration and card into the package."""
    from sora_jax.models.bundle import BUNDLED, load_bundle, save_bundle

    bundle = load_bundle(run)
    metrics = [json.loads(line) for line in (pathlib.Path(run) / "metrics.jsonl").read_text().splitlines()]
    card = {
        "summary": "Toyworld at 64 pixels, up to 3 s at 8 fps: coloured shapes that move as told.",
        "licence": "Apache-2.0",
        "data": "toyworld (this package); the autoencoder also on Big Buck Bunny, © 2008 Blender Foundation, CC BY 3.0",
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT
        ).stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, no accelerator",
        "steps": metrics[-1]["step"],
        "loss": round(sum(row["loss"] for row in metrics[-20:]) / len(metrics[-20:]), 4),
        "config": json.loads((pathlib.Path(run) / "config.json").read_text()),
    }
    save_bundle(dataclasses.replace(bundle, name=name, card=card), BUNDLED / name)
    size = sum(file.stat().st_size for file in (BUNDLED / name).iterdir()) / 1e6
    click.echo(f"{BUNDLED / name}: {size:.1f} MB")


@main.command()
@click.option("--model", default="toyworld")
@click.option("--clips", default=256)
def evaluate(model: str, clips: int) -> None:
    """Every figure of README.md, as JSON files beside it."""
    for split in ("validation", "heldout", "paraphrase"):
        _command(
            "evaluate",
            "toyworld",
            "--model",
            model,
            "--split",
            split,
            "--clips",
            str(clips),
            "--json",
            str(HERE / f"{split}.json"),
        )


def _train(config: str, run: str, *overrides: str) -> None:
    arguments = ["--config", f"configs/{config}.py", "--workdir", f"runs/{run}", *overrides]
    sys.exit(subprocess.run([sys.executable, "-m", "sora_jax.train", *arguments], cwd=ROOT).returncode)


def _command(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "sora_jax.cli", *arguments], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
