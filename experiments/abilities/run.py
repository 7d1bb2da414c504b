"""How well each ability works, on clips whose truth is known: abilities.json and sheets to look at. See README.md.

python experiments/abilities/run.py [--model toyworld] [--clips 64] [--only animate,extend]
"""

from __future__ import annotations

import json
import pathlib

import click

import sora_jax
from sora_jax.cli.terminal import progress_bar
from sora_jax.evaluation.abilities import TRIALS, evaluate_abilities
from sora_jax.media.contact_sheet import contact_sheet
from sora_jax.media.video import Video

HERE = pathlib.Path(__file__).parent


@click.command()
@click.option("--model", default="toyworld")
@click.option("--clips", default=64)
@click.option("--steps", default=12)
@click.option("--only", default="", help="Some abilities: animate,extend.")
def main(model: str, clips: int, steps: int, only: str) -> None:
    """Measures, and draws the first six clips of each ability."""
    pipeline = sora_jax.load(model)
    out = HERE / "abilities.json"
    whole = json.loads(out.read_text()) if out.exists() else {"abilities": {}}
    for name in only.split(",") if only else TRIALS:
        shown: list[tuple[str, Video]] = []

        def show(label: str, videos, shown: list[tuple[str, Video]] = shown) -> None:
            for number, video in enumerate(videos):
                shown.append((label if number == len(videos) - 1 else "given, or the truth", video))

        with progress_bar(True, "clip") as progress:
            result = evaluate_abilities(pipeline, [name], clips, progress=progress, show=show, steps=steps)
        figures = result.pop("abilities")
        whole |= result
        whole["abilities"] |= figures
        out.write_text(json.dumps(whole, indent=1) + "\n")
        for criterion, row in figures[name].items():
            click.echo(f"{name:16} {criterion:22} {row.get('share', row.get('mean')):8.3f}")
        labels, videos = zip(*shown[:12], strict=True)
        contact_sheet(videos, labels, 2, frames_per_video=8, frame_height=72).save(
            HERE / f"{name.replace(' ', '_')}.png"
        )


if __name__ == "__main__":
    main()
