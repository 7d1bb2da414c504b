"""Solvers × steps and ways of guidance against the oracle's reading and the clock. See README.md beside.

    python experiments/solvers/run.py solvers      # solvers.json, solvers.png, a sheet for each solver
    python experiments/solvers/run.py guidance     # guidance.json, guidance.png
    python experiments/solvers/run.py cache        # cache.json
    python experiments/solvers/run.py autoguidance runs/weak    # autoguidance.json; a run that learned less leads away

Each goes on where it was stopped: a row that is in its JSON file is not measured again.
"""

from __future__ import annotations

import json
import pathlib
import time
from typing import Any

import click

HERE = pathlib.Path(__file__).parent
STEPS = (5, 8, 12, 20, 30, 50)
# What is told apart from plain guidance of weight 3; each is tried at every number of steps in GUIDANCE_STEPS.
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"guidance": 1.0},
    "cfg 2": {"guidance": 2.0},
    "cfg 3": {},
    "cfg 5": {"guidance": 5.0},
    "cfg 5, rescaled 0.7": {"guidance": 5.0, "guidance_rescale": 0.7},
    "cfg 3, above 0.5": {"guidance_interval": (0.5, 1.0)},
    "cfg 5, above 0.5": {"guidance": 5.0, "guidance_interval": (0.5, 1.0)},
    "cfg 3, below 0.98": {"guidance_interval": (0.0, 0.98)},
    "zero 3": {"guidance_method": "zero"},
    "zero 5": {"guidance": 5.0, "guidance_method": "zero"},
    "apg 3": {"guidance_method": "apg"},
    "apg 5": {"guidance": 5.0, "guidance_method": "apg"},
    "apg 8": {"guidance": 8.0, "guidance_method": "apg"},
}
GUIDANCE_STEPS = (12,)
THRESHOLDS = (0.0, 0.05, 0.1, 0.2, 0.3)
SHOWN = ("colour", "shape", "direction", "count", "all")
SHEET_PROMPTS = (
    "a red circle moves left",
    "a large blue square slides to the right",
    "a yellow star moves up",
)

model_option = click.option("--model", default="toyworld", help="A bundled model, a folder or a run.")
clips_option = click.option("--clips", default=64, help="Prompts a row of the table.")
split_option = click.option("--split", default="validation")


@click.group()
def main() -> None:
    """Which solver, how many steps, which guidance."""


@main.command()
@model_option
@clips_option
@split_option
@click.option("--only", default="", help="Solvers, with commas; default all.")
def solvers(model: str, clips: int, split: str, only: str) -> None:
    """Every solver at every number of steps, with plain guidance."""
    import sora_jax
    from sora_jax.diffusion.solvers import ODE_SOLVERS

    chosen = tuple(only.split(",")) if only else ODE_SOLVERS
    pipeline = sora_jax.load(model)
    settings = {f"{name}, {steps}": {"solver": name, "steps": steps} for name in chosen for steps in STEPS}
    rows = _measure(pipeline, HERE / "solvers.json", settings, clips, split)
    _plot_solvers(rows, HERE / "solvers.png")
    for name in chosen:
        _sheet(pipeline, name)


@main.command()
@model_option
@clips_option
@split_option
@click.option("--solver", default="euler")
def guidance(model: str, clips: int, split: str, solver: str) -> None:
    """Every variant of guidance, with one solver at the default number of steps."""
    import sora_jax

    settings = {
        f"{name}, {steps}": {"solver": solver, "steps": steps} | own
        for steps in GUIDANCE_STEPS
        for name, own in VARIANTS.items()
    }
    rows = _measure(sora_jax.load(model), HERE / "guidance.json", settings, clips, split)
    _plot_guidance(rows, HERE / "guidance.png")


@main.command()
@model_option
@click.option("--steps", default=24)
def cache(model: str, steps: int) -> None:
    """First-block caching: thresholds against processor time, and what changes of the same three videos."""
    import numpy as np

    import sora_jax

    pipeline, path = sora_jax.load(model), HERE / "cache.json"
    prompts, rows = list(SHEET_PROMPTS), {}
    whole, seconds = np.zeros(()), 0.0
    for threshold in THRESHOLDS:
        own = {"steps": steps, "step_cache": threshold}
        if threshold in THRESHOLDS[:2]:  # the programs without and with a cache are compiled
            pipeline.generate(prompts, **own)
        spent = float("inf")
        for _ in range(3):  # the least of them: other programs only add to it
            started = time.process_time()
            videos = pipeline.generate(prompts, **own)
            spent = min(spent, time.process_time() - started)
        frames = np.concatenate([video.frames for video in videos]).astype(float)
        if not threshold:
            whole, seconds = frames, spent
        error = np.square(frames - whole).mean()
        rows[f"{threshold:g}"] = {
            "steps": steps,
            "processor_seconds": round(spent, 2),
            "processor_share": round(spent / seconds, 2),
            "psnr": round(float(10 * np.log10(255**2 / error)), 1) if error else None,
        }
        click.echo(f"{threshold:g}: {rows[f'{threshold:g}']}")
        path.write_text(json.dumps(rows, indent=1) + "\n")


@main.command()
@click.argument("weak", nargs=-1, required=True)
@model_option
@clips_option
@split_option
def autoguidance(weak: tuple[str, ...], model: str, clips: int, split: str) -> None:
    """Guidance away from WEAK, runs of the same latents that learned less, with captions and without."""
    from autoguided import with_weak

    import sora_jax
    from sora_jax.checkpoints.bundle import load_bundle
    from sora_jax.pipeline.pipeline import Pipeline

    strong, steps = sora_jax.load(model).bundle, GUIDANCE_STEPS[0]
    _measure(Pipeline(strong), HERE / "autoguidance.json", {"cfg 3": {"steps": steps}}, clips, split)
    for name in weak:
        for captioned in (True, False):
            pipeline = Pipeline(with_weak(strong, load_bundle(name), captioned))
            kind = "captions" if captioned else "no captions"
            settings = {
                f"away from {pathlib.Path(name).name}, {kind}, {weight:g}": {
                    "guidance": weight,
                    "steps": steps,
                }
                for weight in (1.5, 2.0, 3.0)
            }
            _measure(pipeline, HERE / "autoguidance.json", settings, clips, split)


def _measure(
    pipeline: Any, path: pathlib.Path, settings: dict[str, dict[str, Any]], clips: int, split: str
) -> dict[str, dict[str, Any]]:
    """A row for each of `settings`: shares that the oracle reads as told, and seconds a clip once compiled."""
    from sora_jax.evaluation.report import evaluate_toyworld
    from sora_jax.pipeline.pipeline import Request

    rows: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}
    for name, own in settings.items():
        if name in rows and (rows[name]["clips"], rows[name]["split"]) == (clips, split):
            continue
        warm = [Request("a red circle moves left", seed=seed, **own) for seed in range(min(clips, 32))]
        pipeline.generate_batch(warm)  # compiles; as many as the evaluation takes at once
        started = time.perf_counter()
        pipeline.generate_batch(warm)
        seconds = (time.perf_counter() - started) / len(warm)
        figures = evaluate_toyworld(pipeline, split, clips, **own)
        rows[name] = {
            "settings": own,
            "clips": clips,
            "split": split,
            "seconds": round(seconds, 4),
            "accuracy": figures["accuracy"],
            "made_by": figures["made_by"],
        }
        path.write_text(json.dumps(rows, indent=1) + "\n")
        shares = ", ".join(f"{key} {100 * figures['accuracy'][key]['share']:.1f}" for key in SHOWN)
        click.echo(f"{name}: {shares}; {seconds:.3f} s a clip")
    return {name: rows[name] for name in settings}


def _plot_solvers(rows: dict[str, dict[str, Any]], path: pathlib.Path) -> None:
    """All-right share against steps, and against seconds, a line for each solver."""
    import matplotlib.pyplot as plt

    figure, (by_steps, by_time) = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for solver in dict.fromkeys(row["settings"]["solver"] for row in rows.values()):
        own = sorted(
            (row for row in rows.values() if row["settings"]["solver"] == solver),
            key=lambda row: row["settings"]["steps"],
        )
        shares = [100 * row["accuracy"]["all"]["share"] for row in own]
        by_steps.plot([row["settings"]["steps"] for row in own], shares, marker="o", label=solver)
        by_time.plot([row["seconds"] for row in own], shares, marker="o", label=solver)
    by_steps.set(xlabel="steps", ylabel="colour, shape and direction right, %", xscale="log", ylim=(0, 102))
    by_steps.set_xticks(STEPS, [str(steps) for steps in STEPS])
    by_time.set(xlabel="seconds a clip", xscale="log")
    for axes in (by_steps, by_time):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _plot_guidance(rows: dict[str, dict[str, Any]], path: pathlib.Path) -> None:
    """A bar for each variant with its 95% interval; a panel for each number of steps."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(GUIDANCE_STEPS), figsize=(5 * len(GUIDANCE_STEPS), 4.5), squeeze=False
    )
    for axes, steps in zip(panels[0], GUIDANCE_STEPS, strict=True):
        own = [rows[f"{name}, {steps}"]["accuracy"]["all"] for name in VARIANTS]
        shares = [100 * row["share"] for row in own]
        reach = [
            [100 * (row["share"] - row["low"]) for row in own],
            [100 * (row["high"] - row["share"]) for row in own],
        ]
        axes.barh(list(VARIANTS), shares, xerr=reach, color="#6a9", ecolor="#555")
        axes.set(xlabel="colour, shape and direction right, %", title=f"{steps} steps", xlim=(0, 102))
        axes.grid(alpha=0.3, axis="x")
    panels[0, 0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _sheet(pipeline: Any, solver: str) -> None:
    """A few prompts at every number of steps, to look at: from the same noise, so what differs is the solver's."""
    from sora_jax.media.contact_sheet import contact_sheet
    from sora_jax.pipeline.pipeline import Request

    requests = [
        Request(prompt, seed=seed, solver=solver, steps=steps)
        for steps in STEPS
        for seed, prompt in enumerate(SHEET_PROMPTS)
    ]
    labels = [f"{request.steps} steps: {request.prompt}" for request in requests]
    videos = pipeline.generate_batch(requests)
    contact_sheet(videos, labels, columns=len(SHEET_PROMPTS), frames_per_video=4).save(HERE / f"{solver}.png")


if __name__ == "__main__":
    main()
