"""32 mixed requests: one after another, in batches of equal shape, or from one queue. See README.md beside.

python experiments/batching/run.py --json experiments/batching/batching.json
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import click
import jax
import numpy as np

import sora_jax
from sora_jax.pipeline import sketches
from sora_jax.pipeline.denoise import denoise
from sora_jax.pipeline.job import Job
from sora_jax.pipeline.settings import Settings
from sora_jax.tokens.canvas import Canvas

# (seconds, height, width, steps) in turn: images and clips, four aspect ratios, four numbers of steps.
SHAPES = (
    (0.0, 64, 64, 12),
    (2.0, 64, 64, 12),
    (1.0, 64, 112, 8),
    (0.0, 112, 64, 20),
    (3.0, 64, 64, 12),
    (1.0, 64, 80, 30),
    (2.0, 112, 64, 12),
    (0.0, 64, 64, 8),
)
PROMPTS = (
    "a red circle moves left",
    "a large blue square moves up",
    "a yellow star",
    "a green ring moves right",
)


@click.command()
@click.option("--json", "out", type=click.Path(path_type=pathlib.Path), help="Where to write the figures.")
@click.option("--model", default="toyworld")
@click.option("--count", default=32)
@click.option(
    "--dtype", default="float32", help="Of the transformer; rounding in bfloat16 grows along the way."
)
@click.option("--repeats", default=4, help="The best of so many is told.")
def main(out: pathlib.Path | None, model: str, count: int, dtype: str, repeats: int) -> None:
    """Prints seconds, ratios and how far results differ; decoding is left out, for it is the same for all."""
    pipeline = sora_jax.load(model)
    pipeline.dit.config = dataclasses.replace(pipeline.dit.config, dtype=dtype)
    jobs = [make(*shape, number) for number, shape in zip(range(count), itertools.cycle(SHAPES))]
    canvases = [pipeline.prepare_latents(job.sketch) for job in jobs]
    fill = lambda *which: denoise(pipeline, [jobs[i] for i in which], [canvases[i] for i in which])
    ways: dict[str, Callable[[], list[Canvas]]] = {
        "one after another": lambda: [canvas for i in range(count) for canvas in fill(i)],
        "batches of equal shape": lambda: alike(fill, jobs),
        "one queue": lambda: fill(*range(count)),
    }
    rows: dict[str, Any] = {}
    results = {}
    for name, way in ways.items():
        results[name] = way()  # compiles
        rows[name] = {"seconds": float("inf")}
    for _ in range(repeats):  # in turn, so that all meet the same noise
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            rows[name]["seconds"] = min(rows[name]["seconds"], time.perf_counter() - started)
    solo = results["one after another"]
    click.echo(f"{'way':24} {'seconds':>8} {'ratio':>7} {'largest difference':>20}")
    for name, row in rows.items():
        row["ratio"] = rows["one after another"]["seconds"] / row["seconds"]
        row["difference"] = max(
            float(np.abs(a.latent - b.latent).max()) for a, b in zip(results[name], solo, strict=True)
        )
        click.echo(f"{name:24} {row['seconds']:8.1f} {row['ratio']:6.2f}× {row['difference']:20.1e}")
    if out:
        machine = f"{os.cpu_count()} cores, {platform.machine()}"
        whole = {"machine": machine, "jax": jax.__version__, "requests": count, "dtype": dtype, "ways": rows}
        out.write_text(json.dumps(whole, indent=1) + "\n")


def make(seconds: float, height: int, width: int, steps: int, number: int) -> Job:
    """A text-to-video job."""
    frames = 1 + 4 * round(seconds * 2)
    captions = ((0.0, PROMPTS[number % len(PROMPTS)]),)
    sketch = sketches.all_noise((frames, height, width), 8.0)
    return Job(sketch, captions, Settings(seed=number, steps=steps))


def alike(fill: Callable[..., list[Canvas]], jobs: Sequence[Job]) -> list[Canvas]:
    """Those of one shape and number of steps together, as most servers batch."""
    groups: dict[Any, list[int]] = collections.defaultdict(list)
    for number, job in enumerate(jobs):
        groups[job.sketch.frames.shape, job.settings.steps].append(number)
    out: dict[int, Canvas] = {}
    for numbers in groups.values():
        out |= dict(zip(numbers, fill(*numbers), strict=True))
    return [out[number] for number in range(len(jobs))]


if __name__ == "__main__":
    main()
