"""The same prompts and seeds by the five models of git's history, with what each took. See README.md beside.

python experiments/compute/run.py            # compute.json, sheet.png; clips stay in runs/physics
python experiments/compute/run.py --debug    # the same of four clips by the newest model, in runs/physics-debug
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import click

sys.path.append(str(pathlib.Path(__file__).parents[1] / "physics"))
from draw import MODELS, Row, draw, scenes_of
from history import Trained
from scenes import FPS

from sora_jax.evaluation.intervals import share_interval
from sora_jax.evaluation.provenance import made_by
from sora_jax.media.contact_sheet import contact_sheet
from sora_jax.media.video import Video
from sora_jax.toyworld import oracle

HERE = pathlib.Path(__file__).parent
READ = ("colour", "shape", "direction", "size", "count", "inside")
SHOWN = (*READ[:3], "all")
COLUMNS = 4  # prompts on the sheet


@click.command()
@click.option("--clips", default=64, help="Of each model.")
@click.option(
    "--drawn", default="runs/physics", type=click.Path(path_type=pathlib.Path), help="Clips' folder."
)
@click.option(
    "--debug", is_flag=True, help="Four clips of the newest model, all of it in runs/physics-debug."
)
def main(clips: int, drawn: pathlib.Path, debug: bool) -> None:
    """Draws what isn't drawn yet, has the oracle read it, writes table and sheet."""
    models, out = MODELS, HERE
    if debug:
        clips, drawn, models = 4, pathlib.Path("runs/physics-debug"), MODELS[-1:]
        out = drawn
    scenes = scenes_of("straight", clips)
    found, videos, labels = [], [], []
    for model in models:
        outputs = draw(Row(model, "straight", "told"), clips, drawn)
        right = [
            oracle.score(oracle.read(Video(frames, FPS)), scene, READ)
            for frames, (scene, _) in zip(outputs, scenes, strict=True)
        ]
        found.append(_row(model, right))
        for number in range(min(COLUMNS, clips)):
            videos.append(Video(outputs[number], FPS))
            wrong = ", ".join(name for name in READ[:3] if not right[number][name])
            said = scenes[number][1] if model is models[0] else ""
            labels.append(
                f"{said} [{f'wrong {wrong}' if wrong else 'right'}]" if number else _label(found[-1])
            )
    (out / "compute.json").write_text(
        json.dumps({"made_by": made_by(), "clips": clips, "models": found}, indent=1) + "\n"
    )
    click.echo(table(found))
    drawn_sheet = contact_sheet(
        videos, labels, min(COLUMNS, clips), frames_per_video=6, frame_height=56, text_size=11
    )
    drawn_sheet.quantize(128).save(out / "sheet.png", optimize=True)


def _row(model: Trained, right: list[dict[str, bool]]) -> dict[str, Any]:
    shares = {}
    for name in (*READ, "all"):
        count = sum(each[name] for each in right)
        low, high = share_interval(count, len(right))
        shares[name] = {"share": count / len(right), "low": low, "high": high, "of": len(right)}
    told = {"model": model.name, "commit": model.commit, "slots": model.slots, "operations": model.operations}
    times = {
        "times": model.operations / MODELS[0].operations,
        "core_hours": round(model.core_minutes / 60, 1),
    }
    return told | times | {"accuracy": shares}


def _label(row: dict[str, Any]) -> str:
    shares = ", ".join(f"{name} {row['accuracy'][name]['share']:.0%}" for name in SHOWN)
    return f"{row['model']} model: {row['times']:.1f} times ({row['operations']:.1e} operations); {shares}"


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: a line a model, shares in percent with their 95% intervals."""
    lines = [
        f"| model | compute | operations | core-hours | {' | '.join(SHOWN)} |",
        "|" + "---|" * (4 + len(SHOWN)),
    ]
    for row in found:
        cells = [
            f"{100 * one['share']:.0f} ({100 * one['low']:.0f} to {100 * one['high']:.0f})"
            for one in (row["accuracy"][name] for name in SHOWN)
        ]
        cost = f"{row['times']:.1f}× | {row['operations']:.1e} | {row['core_hours']}"
        lines.append(f"| {row['model']} | {cost} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
