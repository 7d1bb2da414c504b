"""The demo: a short training run on packed toyworld clips, then six prompts at six shapes by the bundled model.

    make demo        or        python experiments/demo/run.py --out demo

Writes mp4 files, a contact sheet and a page that shows them (index.html).
"""

from __future__ import annotations

import dataclasses
import html
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import click
import matplotlib.pyplot as plt
import numpy as np

from sora_jax.diffusion import flow
from sora_jax.media.contact_sheet import contact_sheet
from sora_jax.media.video import Video
from sora_jax.pipeline.pipeline import Pipeline, Request, load
from sora_jax.tokens.canvas import Sketch
from sora_jax.toyworld.render import Toyworld
from sora_jax.toyworld.scene import WorldConfig

ROOT = pathlib.Path(__file__).parents[2]
PROMPTS = (
    # prompt, duration in seconds, resolution, aspect
    ("a red circle moves left", 2.0, 64, "1:1"),
    ("a large blue square slides to the right", 2.0, 64, "16:9"),
    ("a yellow star moves up", 2.0, 64, "9:16"),
    ("a green triangle goes down and to the right", 3.0, 64, "4:3"),
    ("a purple ring falls and bounces on the floor", 1.5, 64, "3:4"),
    ("a pink square", 0.0, 64, "1:1"),
)
TRAINING = (
    "--config=configs/toyworld_dit.py:Pico",
    "--config.latents.clips=240",
    "--config.steps=60",
    "--config.optim.warmup=10",
    "--config.log.every=5",
    "--config.log.sheet_every=0",
)
PAGE = """<!doctype html>
<meta charset="utf-8"><title>sora_jax: the demo</title>
<style>
  body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
  main {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: 1.5rem; }}
  figure {{ margin: 0; }}
  video, img.clip {{ width: 100%; height: 14rem; object-fit: contain; object-position: left; }}
  video, img.clip {{ image-rendering: pixelated; border-radius: 4px; }}
  figcaption small {{ color: #666; }}
  img.sheet {{ max-width: 100%; }}
</style>
<h1>sora_jax: the demo</h1>
<p>Six prompts at six shapes, packed into one batch and drawn by the bundled model <code>toyworld</code> in
{seconds:.0f} s on this machine ({cores} cores).</p>
<main>{figures}</main>
<h2>The short training run before it</h2>
<p>{training}</p>
"""


@click.command()
@click.option(
    "--out", default="demo", type=click.Path(path_type=pathlib.Path), help="Folder for the results."
)
@click.option("--train/--no-train", default=True, help="Whether to make the short training run first.")
@click.option("--model", default="toyworld", help="The model that draws.")
def main(out: pathlib.Path, train: bool, model: str) -> None:
    """Trains for a minute, draws six prompts, and lays the results out in a page."""
    out.mkdir(parents=True, exist_ok=True)
    told = "Left out (--no-train)."
    if train:
        told = _train(out)

    click.echo(f"Drawing {len(PROMPTS)} prompts at {len(PROMPTS)} shapes, in one batch:")
    started = time.perf_counter()
    pipeline = load(model)
    requests = [
        Request(prompt, duration=duration or 0.125, resolution=resolution, aspect=aspect, seed=seed)
        for seed, (prompt, duration, resolution, aspect) in enumerate(PROMPTS)
    ]
    with click.progressbar(length=100, label="denoising") as bar:
        videos = pipeline.generate_batch(
            requests, lambda done, steps: bar.update(100 * done // steps - bar.pos)
        )
    seconds = time.perf_counter() - started

    figures, labels = [], []
    for number, (request, video) in enumerate(zip(requests, videos, strict=True), 1):
        picture = len(video.frames) == 1
        name = f"{number}.{'png' if picture else 'mp4'}"
        video.save(out / name)
        height, width = video.size
        shape = f"{width}×{height}" + ("" if picture else f", {video.duration:.3g} s at {video.fps:.3g} fps")
        media = (
            f'<img class="clip" src="{name}">'
            if picture
            else f'<video src="{name}" autoplay loop muted playsinline></video>'
        )
        figures.append(
            f"<figure>{media}<figcaption>{html.escape(request.prompt)}<br><small>{shape}</small></figcaption></figure>"
        )
        labels.append(f"{request.prompt}  ({shape.replace('×', 'x')})")  # the sheet's font has no ×
    contact_sheet(videos, labels, columns=2).save(out / "sheet.png")
    page = PAGE.format(seconds=seconds, cores=os.cpu_count(), figures="\n".join(figures), training=told)
    (out / "index.html").write_text(page)
    click.echo(
        f"{len(videos)} videos, {out / 'sheet.png'} and {out / 'index.html'} are ready ({seconds:.0f} s)."
    )


def _train(out: pathlib.Path) -> str:
    """A minute of training, seen at the terminal; returns what the page says of it."""
    workdir = out / "training"
    shutil.rmtree(workdir, ignore_errors=True)
    click.echo("A short training run on packed toyworld clips (the bundled model learned for longer):")
    command = [sys.executable, "-m", "sora_jax.train", *TRAINING, f"--workdir={workdir.absolute()}"]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise SystemExit("The training run failed; its error stands above.")
    losses = _plot_loss(workdir / "metrics.jsonl", out / "loss.png")
    first, last = (sum(loss for _, loss in part) / len(part) for part in (losses[:3], losses[-3:]))
    _denoised(workdir, out / "denoised.png")
    return (
        f"{losses[-1][0]} steps of a small transformer on packed rows of images and clips of many shapes; the loss "
        f"fell from {first:.2f} to {last:.2f}. A minute isn't enough to generate anything, but the "
        "model has begun to denoise: below, clips that it has not seen, the same clips with noise (sigma near one "
        "half), and what it makes of them.</p>"
        '<p><img class="sheet" src="loss.png"></p><p><img class="sheet" src="denoised.png">'
    )


def _plot_loss(metrics: pathlib.Path, picture: pathlib.Path) -> list[tuple[int, float]]:
    """Plots the training loss over steps; returns (step, loss) as logged."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    figure, axes = plt.subplots(figsize=(6.2, 2.6), layout="constrained")
    axes.plot(*zip(*losses, strict=True), marker="o", markersize=3)
    axes.set(xlabel="step", ylabel="training loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=150)
    plt.close(figure)
    return losses


def _denoised(workdir: pathlib.Path, picture: pathlib.Path, strength: float = 0.25) -> None:
    """A sheet of held-out clips, with noise, and denoised by the run's model."""
    pipeline = load(str(workdir))
    world = Toyworld(WorldConfig(objects=(1.0, 0.0, 0.0)), split="validation")
    clips = [world[index] for index in range(3)]
    videos, labels = [], []
    for clip in clips:
        prompt = clip.captions["short"]
        made = pipeline.edit(clip.video, prompt, strength, guidance=1.0, seed=0)
        videos += [clip.video, _noised(pipeline, clip.video, strength), made]
        labels += [f"held out: {prompt}", "with noise", "denoised"]
    contact_sheet(videos, labels, columns=3).save(picture)


def _noised(pipeline: Pipeline, video: Video, strength: float) -> Video:
    """The clip as the sampler finds it: its latents at the sigma of `strength`, decoded."""
    shape = video.frames.shape[:3]
    canvas = pipeline.prepare_latents(Sketch(video.frames, np.full(shape, strength, np.float32), video.fps))
    sigma = canvas.init_sigma[..., None]
    noise = np.random.default_rng(0).standard_normal(canvas.latent.shape, np.float32)
    noised = dataclasses.replace(canvas, latent=flow.interpolate(canvas.latent, noise, sigma))
    return Video(pipeline.decode_latents(noised, *shape), video.fps)


if __name__ == "__main__":
    main()
