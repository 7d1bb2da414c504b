"""Three laws in generated clips: what is hidden stays, bounces reflect, falls accelerate. See README.md beside.

    python experiments/physics/run.py            # physics.json, physics.png, sheet.png; clips stay in runs/physics
    python experiments/physics/run.py --there    # only of clips that are there, and of true ones
    python experiments/physics/run.py --debug    # the same of four clips by the newest model, in runs/physics-debug

Clips that are there are not drawn again: it may be stopped, and goes on when started again.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import click
import numpy as np
from draw import MODELS, STEPS, WAYS, Row, count, draw, model_of, other_steps, rows, scenes_of
from measure import MEASURES, summarize
from scenes import FPS, FRAMES, GIVEN, true_clip

from sora_jax.evaluation.provenance import made_by
from sora_jax.media.contact_sheet import contact_sheet
from sora_jax.media.video import Video

HERE = pathlib.Path(__file__).parent
TOLD = {  # what the table shows of each law
    "permanence": ("holds", "colour", "shape", "hidden", "place"),
    "bounce": ("holds", "read", "turned", "speed ratio", "angle error", "wall gap", "residual", "end"),
    "gravity": (
        *("holds", "read", "turned", "gravity ratio", "hop over fall", "restitution", "floor gap"),
        *("drift", "residual", "end"),
    ),
}
SHOWN = 2  # scenes of each law on the sheet


@click.command()
@click.option("--clips", default=64, help="Of each law, model and way.")
@click.option(
    "--drawn", default="runs/physics", type=click.Path(path_type=pathlib.Path), help="Clips' folder."
)
@click.option(
    "--debug", is_flag=True, help="Four clips of the newest model, all of it in runs/physics-debug."
)
@click.option("--there", is_flag=True, help="Draw nothing: leave out rows that have too few clips.")
def main(clips: int, drawn: pathlib.Path, debug: bool, there: bool) -> None:
    """Draws what isn't drawn yet, measures everything, writes results, plot and sheet."""
    wanted, out = [*rows(), *other_steps()], HERE
    if debug:
        clips, drawn = 4, pathlib.Path("runs/physics-debug")
        wanted, out = rows(MODELS[-1:]), drawn
    wanted = [row for row in wanted if row.law in MEASURES and not (there and count(row, drawn) < clips)]
    results: dict[str, Any] = {"made_by": made_by(), "clips": clips, "rows": {}}
    for law in MEASURES:
        for name, outputs in _references(law, clips):
            results["rows"][f"{name} {law}"] = _measure(law, outputs)
    for row in wanted:
        told = {
            "model": row.model.name,
            "operations": row.model.operations,
            "way": row.way,
            "steps": row.steps,
        }
        results["rows"][row.name] = told | _measure(row.law, draw(row, clips, drawn))
        click.echo(row.name)
    out.mkdir(parents=True, exist_ok=True)
    (out / "physics.json").write_text(json.dumps(results, indent=1) + "\n")
    click.echo(table(results["rows"]))
    if wanted:
        plot(results["rows"], out / "physics.png")
        sheet([row for row in wanted if row.steps == STEPS[0]], drawn, out / "sheet.png")


def _references(law: str, clips: int) -> Iterator[tuple[str, list[np.ndarray]]]:
    """True clips as they are and through the autoencoder, and three ways to spoil them."""
    outputs = [true_clip(scene).frames for scene, _ in scenes_of(law, clips)]
    order = np.random.default_rng(0)
    yield "true", outputs
    pipeline = model_of(MODELS[-1])
    yield "autoencoder", [pipeline.reconstruct(Video(frames, FPS)).frames for frames in outputs]
    yield "shuffled", [frames[order.permutation(FRAMES)] for frames in outputs]
    yield "another scene", outputs[1:] + outputs[:1]
    yield "stopped", [frames[np.minimum(np.arange(FRAMES), GIVEN - 1)] for frames in outputs]


def _measure(law: str, outputs: Sequence[np.ndarray]) -> dict[str, Any]:
    pairs = zip(outputs, scenes_of(law, len(outputs)), strict=True)
    return {"law": law, "figures": summarize([MEASURES[law](frames, scene) for frames, (scene, _) in pairs])}


def table(found: dict[str, Any]) -> str:
    """Markdown, a table for each law: shares in percent, medians, each with its 95% interval."""
    lines = []
    for law, columns in TOLD.items():
        lines += ["", f"| {law} | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 1)]
        for name, row in found.items():
            if row["law"] == law:
                cells = [_cell(row["figures"][column]) for column in columns]
                lines.append(f"| {name.replace(f' {law}', ',')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(figure: dict[str, Any]) -> str:
    if "share" in figure:
        return f"{figure['share']:.0%} ({100 * figure['low']:.0f} to {100 * figure['high']:.0f})"
    if figure["median"] is None:
        return "–"
    return f"{figure['median']:.2f} ({figure['low']:.2f} to {figure['high']:.2f}; {figure['of']})"


def plot(found: dict[str, Any], path: pathlib.Path) -> None:
    """The share of clips that keep each law: against training's operations, and against the sampler's steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained", sharey=True)
    drawn = [row for row in found.values() if "model" in row]
    newest = drawn[-1]["model"]
    kinds = [
        (way, "operations", [row for row in drawn if row["way"] == way and row["steps"] == STEPS[0]])
        for way in WAYS
    ]
    kinds.append(
        ("continued", "steps", [r for r in drawn if r["model"] == newest and r["way"] == "continued"])
    )
    for panel, (way, along, mine) in zip(panels, kinds, strict=True):
        for number, law in enumerate(MEASURES):
            own = sorted((row for row in mine if row["law"] == law), key=lambda row: row[along])
            if own:
                held = [row["figures"]["holds"] for row in own]
                share, low, high = (
                    100 * np.array([one[key] for one in held]) for key in ("share", "low", "high")
                )
                reach = np.maximum([share - low, high - share], 0)
                at = [row[along] * (1 + 0.02 * (number - 1)) for row in own]  # side by side
                panel.errorbar(at, share, reach, marker="o", capsize=3, label=law, color=f"C{number}")
        title = f"{way}: by training" if along == "operations" else f"the {newest} model, {way}: by steps"
        words = {"operations": "operations of the transformer's training", "steps": "steps of the sampler"}
        panel.set(title=title, xlabel=words[along], xscale="log", ylim=(-2, 102))
        places = sorted({row[along] for row in mine})
        panel.set_xticks(places, [f"{place:.2g}" for place in places], rotation=30)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("clips that keep the law, %")
    panels[0].legend()
    figure.savefig(path, dpi=80)


def sheet(shown: Sequence[Row], drawn: pathlib.Path, path: pathlib.Path) -> None:
    """The truth and what each model made of the first scenes of each law, with the verdict as label."""
    videos, labels = [], []
    kinds = dict.fromkeys((row.law, row.way) for row in shown)
    for law, way in kinds:
        scenes = scenes_of(law, SHOWN)
        for number, (scene, caption) in enumerate(scenes):
            outputs: dict[str, np.ndarray] = {"true": true_clip(scene).frames}
            outputs |= {
                row.model.name: draw(row, number + 1, drawn)[number]
                for row in shown
                if (row.law, row.way) == (law, way)
            }
            for name, frames in outputs.items():
                videos.append(Video(frames, FPS))
                verdict = "holds" if MEASURES[law](frames, scene)["holds"] else "does not hold"
                labels.append(f"{name}, {way}: {verdict}" if name != "true" else caption)
    columns = len(videos) // (SHOWN * len(kinds))
    drawn_sheet = contact_sheet(videos, labels, columns, frames_per_video=7, frame_height=40, text_size=10)
    drawn_sheet.quantize(128).save(path, optimize=True)


if __name__ == "__main__":
    main()
