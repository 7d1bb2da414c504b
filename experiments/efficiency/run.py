"""Time to accuracy: what a transformer has learned after equal processor time, by way of training. See README.md.

    python experiments/efficiency/run.py train baseline --budget 900    # seconds of processor time, user and system
    python experiments/efficiency/run.py measure baseline --budget 900
    python experiments/efficiency/run.py average runs/dit 0.15 runs/dit-0.15    # a run with optim.ema_lengths
    python experiments/efficiency/run.py pictures toyworld runs/dit

Runs live in runs/efficiency and go on where they were stopped. Steps are counted so that a run takes its budget: each
stage's seconds a step are measured first and kept in costs.json. All read the same latents.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

import click
from levers import BASELINE, LEVERS, Stage

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
RUNS = pathlib.Path("runs/efficiency")
COSTS, RESULTS = HERE / "costs.json", HERE / "results.jsonl"
PROBE_STEPS = 60


@click.group()
def main() -> None:
    """Learning for equal processor time."""


@main.command()
@click.argument("lever", type=click.Choice([*LEVERS]))
@click.option("--budget", default=900.0, help="Seconds of processor time.")
@click.option("--seed", default=0)
def train(lever: str, budget: float, seed: int) -> None:
    """Trains LEVER from random weights."""
    before: pathlib.Path | None = None
    for number, stage in enumerate(LEVERS[lever].stages):
        workdir = run_folder(lever, budget, seed) / str(number)
        steps = max(round(budget * stage.share / seconds_a_step(stage)), 1)
        changes = stage.changes | {"seed": seed, "pipeline.seed": seed}
        if before is not None:
            changes["init_from"] = str(repatched(before) if stage.repatch else before)
        fit(workdir, changes, steps)
        before = workdir


def run_folder(lever: str, budget: float, seed: int) -> pathlib.Path:
    return RUNS / f"{lever}-{budget:g}s-seed{seed}"


def fit(workdir: pathlib.Path, changes: dict[str, Any], steps: int) -> None:
    every = max(steps // 4, 1)
    fixed = {"steps": steps, "optim.warmup": min(100, steps // 4), "latents.folder": str(RUNS / "latents")}
    fixed |= {"latents.clips": 12_000, "log.sheet_every": 0, "log.heldout_every": 0}
    fixed |= {"checkpoint.every": every, "checkpoint.keep": 1}
    fields = [f"--config.{name}={value}" for name, value in (BASELINE | fixed | changes).items()]
    config = str(ROOT / "configs" / "toyworld_dit.py")
    command = [sys.executable, "-m", "sora_jax.train", "--config", config, "--workdir", str(workdir), *fields]
    subprocess.run(command, check=True)


def repatched(workdir: pathlib.Path) -> pathlib.Path:
    folder = workdir.parent / f"{workdir.name}-repatched"
    if not folder.exists():
        script = str(ROOT / "experiments" / "bundled_model" / "repatch.py")
        subprocess.run([sys.executable, script, str(workdir), str(folder)], check=True)
    return folder


def seconds_a_step(stage: Stage) -> float:
    """Processor seconds, measured once for each set of changes, compilation left out."""
    costs = json.loads(COSTS.read_text()) if COSTS.exists() else {}
    name = json.dumps(stage.changes, sort_keys=True)
    if name not in costs:
        workdir = RUNS / f"probe{len(costs)}"
        fit(workdir, stage.changes | {"log.every": PROBE_STEPS // 3}, PROBE_STEPS)
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        costs[name] = rows[-1]["processor_seconds"] / (rows[-1]["step"] - rows[-2]["step"])
        COSTS.write_text(json.dumps(costs, indent=1) + "\n")
    return costs[name]


@main.command()
@click.argument("lever", type=click.Choice([*LEVERS]))
@click.option("--budget", default=900.0)
@click.option("--seed", default=0)
@click.option("--clips", default=128)
def measure(lever: str, budget: float, seed: int, clips: int) -> None:
    """Adds a line to results.jsonl: the held-out loss of the baseline's clips, and what the oracle reads."""
    from measure import clips_read, heldout_loss, images_read

    folder = run_folder(lever, budget, seed)
    stages = sorted(path for path in folder.iterdir() if path.name.isdigit())
    rows = [json.loads(line) for path in stages for line in (path / "metrics.jsonl").read_text().splitlines()]
    spent = sum(row["processor_seconds"] for row in rows)
    result = {"lever": lever, "budget": budget, "seed": seed, "processor_seconds": round(spent, 1)}
    result |= {"steps": [json.loads((path / "config.json").read_text())["steps"] for path in stages]}
    result |= {"clips": clips} | heldout_loss(stages[-1], RUNS / "latents") | images_read(stages[-1], clips)
    result |= clips_read(stages[-1], clips)
    with RESULTS.open("a") as file:
        file.write(json.dumps(result) + "\n")
    click.echo(json.dumps(result))


@main.command()
@click.argument("workdir")
@click.argument("length", type=float)
@click.argument("folder")
def average(workdir: str, length: float, folder: str) -> None:
    """Writes to FOLDER the model of a run with optim.ema_lengths, its average of relative LENGTH (0.04 to 0.2)."""
    from sora_jax.checkpoints.bundle import save_bundle
    from sora_jax.train.averages import load_average_bundle

    save_bundle(load_average_bundle(workdir, length), folder, dtype="float32")


@main.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--count", default=128)
def pictures(models: tuple[str, ...], count: int) -> None:
    """What MODELS (bundled ones, or workdirs) know of pictures: what the shape's word is worth, and drawn shapes."""
    from measure import images_read, shape_words

    for name in models:
        click.echo(json.dumps({"model": name} | shape_words(name, count) | images_read(name, count)))


if __name__ == "__main__":
    main()
