"""Few steps: what the oracle reads of the student and of its teacher, and how long denoising takes. See README.md.

sora-jax train --config distill --workdir runs/turbo
python experiments/turbo/run.py accuracy --student runs/turbo     # accuracy.json, sheet.png
python experiments/turbo/run.py speed --student runs/turbo        # speed.json
"""

from __future__ import annotations

import json
import pathlib
import statistics
import time

import click

import sora_jax
from sora_jax.evaluation.report import evaluate_toyworld
from sora_jax.media.contact_sheet import contact_sheet
from sora_jax.media.video import Video
from sora_jax.pipeline.pipeline import Pipeline, Request, text_to_video

HERE = pathlib.Path(__file__).parent
ATTRIBUTES = ("colour", "shape", "direction", "size", "all")
SHOWN = 4  # prompts on the sheet


@click.group()
def main() -> None:
    """The student against its teacher."""


@main.command()
@click.option("--student", default="toyworld-turbo")
@click.option("--teacher", default="toyworld")
@click.option("--split", default="validation")
@click.option("--clips", default=256)
def accuracy(student: str, teacher: str, split: str, clips: int) -> None:
    """Reads clips of both at 1, 2, 4 and 12 steps."""
    rows, videos, labels = [], [], []
    for name, all_steps in ((teacher, (12, 4, 2, 1)), (student, (4, 2, 1))):
        pipeline = sora_jax.load(name)
        for steps in all_steps:
            found: list[tuple[str, Video]] = []
            keep = lambda label, clip, found=found: found.append((label, clip[0]))
            figures = evaluate_toyworld(pipeline, split, clips, steps=steps, show=keep)["accuracy"]
            shares = {key: round(figures[key]["share"], 4) for key in ATTRIBUTES}
            rows.append(
                {"model": pathlib.Path(name).name, "steps": steps, "clips": clips, "split": split} | shares
            )
            click.echo(json.dumps(rows[-1]))
            for label, video in found[:SHOWN]:
                videos.append(video)
                labels.append(f"{rows[-1]['model']}, {steps} step{'s' * (steps > 1)}: {label.split(':')[0]}")
    (HERE / "accuracy.json").write_text(json.dumps(rows, indent=1) + "\n")
    contact_sheet(videos, labels, columns=SHOWN).save(HERE / "sheet.png")


@main.command()
@click.option("--student", default="toyworld-turbo")
@click.option("--teacher", default="toyworld")
@click.option("--repeats", default=5)
@click.option("--prompts", default=4, help="Videos of a call.")
def speed(student: str, teacher: str, repeats: int, prompts: int) -> None:
    """Seconds of a warm call, of all of `generate` and of denoising alone, in turn; the best of --repeats."""
    ways = {"teacher, 12 steps": (sora_jax.load(teacher), 12)}
    turbo = sora_jax.load(student)
    ways |= {f"student, {steps} step{'s' * (steps > 1)}": (turbo, steps) for steps in (4, 2, 1)}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, (pipeline, steps) in ways.items():
            spent = _time_call(pipeline, steps, prompts)
            if repeat:  # the first one compiles
                seconds[name].append(spent)
    rows = [
        {"way": name, "generate": min(total for total, _ in spent), "denoise": min(part for _, part in spent)}
        | {"median_generate": statistics.median(total for total, _ in spent)}
        for name, spent in seconds.items()
    ]
    for row in rows:
        for part in ("generate", "denoise"):
            row[f"{part}_ratio"] = round(rows[0][part] / row[part], 2)
        click.echo(json.dumps(row))
    (HERE / "speed.json").write_text(json.dumps(rows, indent=1) + "\n")


def _time_call(pipeline: Pipeline, steps: int, prompts: int) -> tuple[float, float]:
    """Seconds of a call, decoding included, and of its steps."""
    marks: list[float] = []
    progress = lambda done, total: marks.append(time.perf_counter())
    requests = [Request("a red circle moves left", steps=steps, seed=seed) for seed in range(prompts)]
    begin = time.perf_counter()
    pipeline.make([text_to_video(pipeline, request) for request in requests], progress)
    return time.perf_counter() - begin, marks[-1] - marks[0]


if __name__ == "__main__":
    main()
