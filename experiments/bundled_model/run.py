"""Regenerates the bundled model `toyworld`: autoencoder, transformer, files, figures. See README.md beside.

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

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
FOOTAGE = ROOT.parent / "shared" / "footage"
SUMMARY = "Toyworld at 64 pixels, 8 to 24 fps: coloured shapes that move as told; fills in what is missing."


@click.group()
def main() -> None:
    """The road from nothing to the bundled model."""


@main.command(context_settings={"ignore_unknown_options": True})
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def vae(overrides: tuple[str, ...]) -> None:
    """Trains the autoencoder on toyworld and, where there is footage beside the project, on that."""
    source = f"toyworld:0.85,{FOOTAGE}:0.15" if FOOTAGE.is_dir() else "toyworld"
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
@click.option("--history", default="", help="What the weights learned from before this run, in a sentence.")
@click.option("--vae-of", default="", help="A bundled model whose autoencoder this one has.")
@click.option(
    "--defaults-of", default="", help="A bundled model whose limits and sampling defaults it takes."
)
def export(run: str, name: str, history: str, vae_of: str, defaults_of: str) -> None:
    """Writes the run's averaged weights, configuration and card into the package."""
    from sora_jax.checkpoints.bundle import BUNDLED, bundled, load_bundle, save_bundle
    from sora_jax.train.metrics import read_metrics

    bundle = load_bundle(run)
    metrics = read_metrics(run)
    config = json.loads((pathlib.Path(run) / "config.json").read_text())
    config["latents"]["folder"] = ""  # of this machine
    if config["init_from"] not in bundled():
        config["init_from"] = ""  # likewise; `history` says it
    card = {
        "summary": SUMMARY + (f" In {bundle.sampling.steps} steps." if bundle.sampling.distilled else ""),
        "licence": "Apache-2.0",
        "data": "toyworld (this package); the autoencoder also on Big Buck Bunny, "
        "© 2008 Blender Foundation, www.bigbuckbunny.org, CC BY 3.0",
        "knows": bundle.card["knows"],
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT
        ).stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, no accelerator",
        "steps": metrics[-1]["step"],
        "history": history or "trained from nothing",
        "loss": round(sum(row["loss"] for row in metrics[-20:]) / len(metrics[-20:]), 4),
        "config": config,
    }
    bundle = dataclasses.replace(bundle, name=name, card=card)
    if defaults_of:
        other = load_bundle(defaults_of)
        bundle = dataclasses.replace(bundle, limits=other.limits, sampling=other.sampling)
    save_bundle(bundle, BUNDLED / name, vae_of=vae_of)
    size = sum(file.stat().st_size for file in (BUNDLED / name).iterdir()) / 1e6
    click.echo(f"{BUNDLED / name}: {size:.1f} MB")


@main.command()
@click.option("--model", default="toyworld")
@click.option("--clips", default=256)
def evaluate(model: str, clips: int) -> None:
    """Every figure of README.md, as JSON files beside it (and sheets to look at, for two of them)."""
    text = ("evaluate", "toyworld", "--model", model, "--clips", str(clips))
    for split in ("validation", "heldout", "paraphrase"):
        sheet = () if split == "validation" else ("--sheet", str(HERE / f"{split}.png"))
        _command(*text, "--split", split, "--json", str(HERE / f"{split}.json"), *sheet)
    unseen = (
        "--durations",
        "1.5,2.5",
        "--aspects",
        "3:4,3:2",
    )  # training's: 0, 1, 2, 3 s; 1:1, 16:9, 9:16, 4:3
    _command(*text, "--split", "validation", *unseen, "--json", str(HERE / "unseen_shapes.json"))
    for kind in ("truth", "vae"):
        _command(*text, "--split", "validation", f"--{kind}", "--json", str(HERE / f"{kind}.json"))
    _reconstruction(model)
    for file in sorted(FOOTAGE.glob("*.mp4")):  # its seconds 40 to 50 are held out, see data/footage.py
        where = ("--start", "40", "--seconds", "10", "--json", str(HERE / "footage.json"))
        _command(
            "evaluate", "vae", os.path.relpath(file, ROOT), "--model", model, "--resolution", "128", *where
        )


@main.command()
@click.argument("runs", nargs=-1, type=click.Path(exists=True))
@click.option("--clips", default=96)
def curve(runs: tuple[str, ...], clips: int) -> None:
    """Accuracy of copies of one run, each with another checkpoint, against steps: curve.json, curve.png."""
    import matplotlib.pyplot as plt

    points = []
    for run in runs:
        out = HERE / "point.json"
        _command(
            "evaluate",
            "toyworld",
            "--model",
            run,
            "--split",
            "validation",
            "--clips",
            str(clips),
            "--json",
            str(out),
        )
        figures = json.loads(out.read_text())
        out.unlink()
        [step] = (
            int(folder.name)
            for folder in (pathlib.Path(run) / "checkpoints").iterdir()
            if folder.name.isdigit()
        )
        shares = {name: row["share"] for name, row in figures["accuracy"].items()}
        points.append({"step": step, "clips": clips, **shares})
    points.sort(key=lambda point: point["step"])
    (HERE / "curve.json").write_text(json.dumps(points, indent=1) + "\n")
    figure, axes = plt.subplots(figsize=(6, 4))
    for name in ("colour", "direction", "shape", "all"):
        axes.plot([p["step"] for p in points], [100 * p[name] for p in points], marker="o", label=name)
    axes.set(xlabel="training steps", ylabel="clips read right, %", ylim=(0, 102), xscale="log")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(HERE / "curve.png", dpi=110)


def _reconstruction(model: str) -> None:
    """PSNR of toyworld's clips through the autoencoder, by shape: autoencoder.json."""
    import sora_jax
    from sora_jax.evaluation.metrics import psnr
    from sora_jax.toyworld.render import Toyworld

    pipeline, figures = sora_jax.load(model), {}
    for shape in ((17, 64, 64, 8.0), (1, 64, 64, 8.0), (17, 128, 128, 8.0)):
        source = Toyworld(split="validation", clips=64, shapes=(shape,))
        clips = [source[i].video for i in range(64)]
        values = [float(psnr(pipeline.reconstruct(clip).frames, clip.frames)) for clip in clips]
        figures["×".join(map(str, shape[:3]))] = {
            "psnr": round(sum(values) / len(values), 2),
            "clips": len(values),
        }
    (HERE / "autoencoder.json").write_text(json.dumps(figures, indent=1) + "\n")
    click.echo(json.dumps(figures))


def _train(config: str, run: str, *overrides: str) -> None:
    arguments = ["--config", f"configs/{config}.py", "--workdir", f"runs/{run}", *overrides]
    sys.exit(subprocess.run([sys.executable, "-m", "sora_jax.train", *arguments], cwd=ROOT).returncode)


def _command(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "sora_jax.cli.main", *arguments], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
