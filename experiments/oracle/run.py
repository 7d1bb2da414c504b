"""What the oracle reads of degraded shapes and of the bundled model's clips, by both readings. See README.md beside.

python experiments/oracle/run.py calibrate    # calibration.json, shapes.png
python experiments/oracle/run.py model        # model.json; --frames FILE.npz keeps the clips
"""

from __future__ import annotations

import collections
import json
import pathlib
from typing import Any

import click
import degrade
import numpy as np
from PIL import Image, ImageDraw

import sora_jax
from sora_jax.evaluation.provenance import made_by
from sora_jax.evaluation.report import evaluate_toyworld, interval
from sora_jax.media.video import Video
from sora_jax.toyworld import oracle
from sora_jax.toyworld import scene as world

HERE = pathlib.Path(__file__).parent
# The last degree of each way at which a person still names the shape; see README.md.
LIMITS = {
    "true": 0.0,
    "blur": 0.3,
    "wobble": 0.06,
    "bulge": 0.1,
    "round": 0.4,
    "to": 0.2,
    "closed": 0.6,
    "merged": 0.6,
}
# What goes through the autoencoder too.
CODED = {"true": 0.0, "wobble": 0.06, "bulge": 0.07, "round": 0.4, "to": 0.2, "closed": 0.4, "merged": 0.4}

Key = tuple[str, float]


@click.group()
def main() -> None:
    """How far the oracle's reading of shapes can be trusted."""


@main.command()
@click.option("--each", default=6, help="Scenes of every shape in every size.")
def calibrate(each: int) -> None:
    """Reads degraded true clips; half A (even scenes) chose the reading's parameter, half B is reported."""
    model = sora_jax.load("toyworld")
    reads: list[tuple[int, str, Key, dict[str, str | None]]] = []
    shown: dict[str, dict[Key, Video]] = {}
    for number, scene in enumerate(degrade.scenes(each)):
        thing = scene.shots[0].things[0]
        clips = degrade.degraded(scene, number)
        for (way, degree), clip in list(clips.items()):
            if CODED.get(way.split()[0]) == degree:
                clips[f"{way}, autoencoder", degree] = model.reconstruct(clip)
        reads += [(number, thing.shape, key, _read(clip)) for key, clip in clips.items()]
        if thing.size == "medium":
            shown.setdefault(thing.shape, clips)
        click.echo(f"{number + 1} scenes")
    _sheet(shown, HERE / "shapes.png")
    held = [row for row in reads if row[0] % 2]
    parts = {
        "drawn": [r for r in held if _within(r[2]) and "autoencoder" not in r[2][0]],
        "autoencoder": [r for r in held if r[2][0] == "true, autoencoder"],
        "degraded, autoencoder": [
            r for r in held if "autoencoder" in r[2][0] and not r[2][0].startswith("true")
        ],
        "beyond": [r for r in held if not _within(r[2])],
    }
    by_way: dict[Key, list[Any]] = collections.defaultdict(list)
    for row in held:
        by_way[row[2]].append(row)
    out = {
        "tables": {name: _tables([(r[1], r[3]) for r in rows]) for name, rows in parts.items()},
        "ways": [
            {"way": way, "degree": degree, "within": _within((way, degree)), "clips": len(rows)}
            | {reading: sum(r[1] == r[3][reading] for r in rows) for reading in oracle.SHAPE_READINGS}
            for (way, degree), rows in sorted(by_way.items())
        ],
        "made_by": made_by(),
    }
    (HERE / "calibration.json").write_text(json.dumps(out, indent=1) + "\n")


@main.command()
@click.option("--clips", default=256)
@click.option("--frames", default="", help="An .npz file that keeps the clips, made where it isn't there.")
def model(clips: int, frames: str) -> None:
    """The bundled model's validation clips, made once and read by both."""
    kept = pathlib.Path(frames) if frames else None
    if kept is not None and kept.exists():
        with np.load(kept) as file:
            out, videos = json.loads(str(file["json"])), [Video(made, degrade.FPS) for made in file["frames"]]
    else:
        videos = []
        out = evaluate_toyworld(
            sora_jax.load("toyworld"), "validation", clips, show=lambda _, made: videos.append(made[0])
        )
        if kept is not None:
            np.savez(kept, frames=np.stack([video.frames for video in videos]), json=json.dumps(out))
    reads = [(row["truth"]["shape"], _read(video)) for row, video in zip(out["clips"], videos, strict=True)]
    rows = [row | {"shape": shape} for row, (_, shape) in zip(out["clips"], reads, strict=True)]
    figures = {
        "tables": _tables(reads),
        "settings": out["settings"],
        "made_by": made_by(),
        "clips": [{key: row[key] for key in ("prompt", "seed", "truth", "shape")} for row in rows],
    }
    eye = json.loads((HERE / "eye.json").read_text())
    named = [(row["shape"], eye[str(row["seed"])]) for row in rows if eye.get(str(row["seed"]))]
    figures["eye"] = {
        reading: _share(sum(shape[reading] == name for shape, name in named), len(named))
        for reading in oracle.SHAPE_READINGS
    }
    (HERE / "model.json").write_text(json.dumps(figures, indent=1) + "\n")
    click.echo(json.dumps({key: figures[key] for key in ("tables", "eye")}))


def _read(clip: Video) -> dict[str, str | None]:
    """The most prominent thing's shape, by each reading."""
    out: dict[str, str | None] = {}
    for reading in oracle.SHAPE_READINGS:
        things = oracle.read(clip, reading).things
        out[reading] = max(things, key=oracle.prominence).shape if things else None
    return out


def _within(key: Key) -> bool:
    return key[1] <= LIMITS[key[0].replace(",", "").split()[0]]


def _share(right: int, of: int) -> dict[str, Any]:
    low, high = interval(right, of)
    return {"right": right, "of": of, "share": right / of, "low": low, "high": high}


def _tables(reads: list[tuple[str, dict[str, str | None]]]) -> dict[str, Any]:
    """By reading: the share right, how often each shape was read more than shown, and the confusion table."""
    out = {}
    for reading in oracle.SHAPE_READINGS:
        pairs = collections.Counter((truth, read[reading]) for truth, read in reads)
        table = {a: {str(b): pairs[a, b] for b in (*world.SHAPES, None)} for a in world.SHAPES}
        excess = {
            name: sum(table[a][name] for a in table) - sum(table[name].values()) for name in world.SHAPES
        }
        right = sum(table[name][name] for name in table)
        out[reading] = _share(right, len(reads)) | {"excess": excess, "confusion": table}
    return out


def _sheet(shown: dict[str, dict[Key, Video]], path: pathlib.Path) -> None:
    """A row for each shape and way, its degrees from left to right: the middle frame, red words beyond the limit."""
    rows: dict[tuple[str, str], list[tuple[float, Video]]] = collections.defaultdict(list)
    for shape, clips in shown.items():
        for (way, degree), clip in clips.items():
            rows[shape, way].append((degree, clip))
    columns, wide, high = 3, 130 + 4 * 66, 78
    tall = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * wide, tall * high), "white")
    pen = ImageDraw.Draw(sheet)
    for number, ((shape, way), clips) in enumerate(rows.items()):
        left, top = number // tall * wide, number % tall * high
        pen.text((left + 2, top + 24), f"{shape}\n{way.replace(', ', chr(10))}", fill="black")
        for column, (degree, clip) in enumerate(clips):
            at = left + 130 + column * 66
            pen.text((at, top), f"{degree:g}", fill="black" if _within((way, degree)) else "red")
            sheet.paste(Image.fromarray(clip.frames[8]), (at, top + 12))
    sheet.save(path)


if __name__ == "__main__":
    main()
