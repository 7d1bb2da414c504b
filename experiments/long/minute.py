"""A minute by windows: does the thing keep its shape and colour, and how far does the ground drift? See README.md.

python experiments/long/minute.py measure --clips 8                              # as the model's own defaults are
python experiments/long/minute.py measure --clips 8 --set context_noise=0.2 --set anchor=True
python experiments/long/minute.py table
python experiments/long/minute.py plot

`measure` adds a row to minute.json under its --name; clips stay in --keep, a folder outside of the repository, for
`sheet` to show.
"""

from __future__ import annotations

import ast
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import subprocess
import time
import warnings
from typing import Any

import click
import numpy as np

HERE = pathlib.Path(__file__).parent
FPS = 8
STRETCH = 2.5  # seconds that the oracle reads, at the end of every ten, and of the beginning
MOTIONS = ("still", "bounce", "spin")  # whose thing never leaves the frame


@click.group()
def main() -> None:
    """A minute by windows."""


@main.command()
@click.option("--model", default="toyworld")
@click.option("--clips", default=8)
@click.option("--seconds", default=60, help="Of a clip, tens of them.")
@click.option("--set", "settings", multiple=True, help="A setting of the sampler: name=value.")
@click.option("--gap", type=int, help="In place of `windows.MAX_ANCHOR_GAP`.")
@click.option("--name", default="", help="Of the row; else model and settings.")
@click.option("--keep", type=click.Path(path_type=pathlib.Path), help="Folder for the clips.")
def measure(
    model: str,
    clips: int,
    seconds: int,
    settings: tuple[str, ...],
    gap: int | None,
    name: str,
    keep: pathlib.Path | None,
) -> None:
    """Generates clips and has the oracle read the first 2.5 s and the last 2.5 of every ten."""
    import sora_jax
    from sora_jax.pipeline import windows
    from sora_jax.pipeline.pipeline import Request

    given = {key: _value(text) for key, _, text in (each.partition("=") for each in settings)}
    windows.MAX_ANCHOR_GAP = windows.MAX_ANCHOR_GAP if gap is None else gap
    name = name or " ".join([pathlib.Path(model).name, *settings])
    pipeline, scenes = sora_jax.load(model), prompts(clips)
    requests = [
        Request(prompt, duration=seconds, seed=number, **(pipeline.defaults | given))
        for number, (prompt, _) in enumerate(scenes)
    ]
    begin, used = time.perf_counter(), time.process_time()
    videos = pipeline.generate_batch(requests)
    row = {
        "model": model,
        "settings": given,
        "gap": windows.MAX_ANCHOR_GAP,
        "clips": clips,
        "seconds": seconds,
    }
    row |= {"wall": round(time.perf_counter() - begin), "processor": round(time.process_time() - used)}
    row |= {"date": datetime.date.today().isoformat(), "commit": _commit()}
    row |= {"machine": f"{os.cpu_count()} cores, {platform.machine()}, other work beside"}
    row["read"] = [read(video, thing) for video, (_, thing) in zip(videos, scenes, strict=True)]
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(keep / f"{name}.npz", *(video.frames for video in videos))
    rows = _rows() | {name: row}
    (HERE / "minute.json").write_text(
        "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in rows.items()) + "\n}\n"
    )
    click.echo(_line(name, row))


def prompts(count: int) -> list[tuple[str, Any]]:
    """Captions, of validation scenes, of one thing that stays in the frame, and the thing; the same every time."""
    from sora_jax.toyworld import scene as world
    from sora_jax.toyworld.captions import short_caption
    from sora_jax.toyworld.sampling import sample_scene

    config = world.WorldConfig(objects=(1.0, 0.0, 0.0), cameras=(1.0, 0.0, 0.0), occluder=0.0, two_shots=0.0)
    out = []
    for index in range(count):
        own = MOTIONS[index % len(MOTIONS)]
        config = dataclasses.replace(config, motions=tuple(float(each == own) for each in world.MOTIONS))
        scene = sample_scene(0, index, "validation", 2.0, 1.0, config)
        thing = scene.shots[0].things[0]
        out.append((short_caption(scene, np.random.default_rng(index)), thing))
    return out


def read(video: Any, thing: Any) -> list[dict[str, Any]]:
    """Of each stretch: whether its most prominent thing is what was asked for, and how far the ground has drifted.

    The drift is the mean difference, in levels of 256, from the mean picture of the first stretch, where neither shows
    a thing.
    """
    from sora_jax.media.video import Video
    from sora_jax.toyworld import oracle, regions

    length = round(STRETCH * FPS)
    ends = [length, *range(10 * FPS, len(video) + 1, 10 * FPS)]
    first, rows = None, []
    for end in ends:
        frames = video.frames[end - length : end]
        things = oracle.read(Video(frames, FPS)).things
        most = max(things, key=oracle.prominence, default=None)
        ground = np.where((regions.segment(frames).colour == 0)[..., None], frames, np.nan)
        with warnings.catch_warnings(action="ignore"):  # where all frames show the thing there is no ground
            ground = np.nanmean(ground, axis=0)
        first = ground if first is None else first
        rows.append(
            {
                "until": end / FPS,
                "shape": most is not None and most.shape == thing.shape,
                "colour": most is not None and most.colour == thing.colour,
                "any": any((each.shape, each.colour) == (thing.shape, thing.colour) for each in things),
                "things": len(things),
                "seen": "" if most is None else f"{most.colour} {most.shape}",
                "drift": round(float(np.nanmean(np.abs(ground - first))), 1),
                "step": round(float(np.abs(np.diff(frames.astype(float), axis=0)).mean()), 2),
            }
        )
    return rows


@main.command()
def table() -> None:
    """What was measured, a line a row."""
    click.echo("| run | clips | at, s | right | right, and nothing else | as at 2.5 s | drift |")
    click.echo("|---|---|---|---|---|---|---|")
    for name, row in _rows().items():
        click.echo(_line(name, row))


@main.command()
@click.argument("clips", type=click.Path(exists=True, path_type=pathlib.Path), nargs=-1)
@click.option("--output", default="sheet.png")
@click.option("--most", default=8, help="Clips of each.")
def sheet(clips: tuple[pathlib.Path, ...], output: str, most: int) -> None:
    """A frame at 0 s, 2.5 s and every five seconds, of files that `measure --keep` wrote."""
    from sora_jax.media.contact_sheet import contact_sheet
    from sora_jax.media.video import Video

    videos, labels, shown = [], [], prompts(most)
    for number in range(most):
        for path in clips:
            frames = np.load(path)[f"arr_{number}"]
            times = [0, round(2.5 * FPS), *range(5 * FPS - 1, len(frames), 5 * FPS)]
            videos.append(Video(frames[times], 1))
            labels.append(f"{path.stem}: {shown[number][0]}")
    drawn = contact_sheet(
        videos, labels, max(len(clips), 1), frames_per_video=99, frame_height=56, text_size=11
    )
    drawn.quantize(128).save(output, optimize=True)


@main.command()
@click.option("--rows", default="", help="Names, with commas between; all by default.")
def plot(rows: str) -> None:
    """minute.png: what is kept, and the drift, by seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    titles = {
        "right": "right shape and colour, % of clips",
        "alone": "… and nothing else, % of clips",
        "drift": "drift of the ground, median, levels of 256",
    }
    measured = _rows()
    for name in rows.split(",") if rows else measured:
        found = figures(measured[name])
        for panel, (key, title) in zip(panels, titles.items(), strict=True):
            scale = 1 if key == "drift" else 100
            panel.plot(found["until"], [scale * value for value in found[key]], marker=".", label=name)
            panel.set(title=title, xlabel="seconds", ylim=(0, None if key == "drift" else 102))
    panels[0].legend(fontsize=8)
    figure.savefig(HERE / "minute.png", dpi=80)


def _line(name: str, row: dict[str, Any]) -> str:
    found = figures(row)
    at = [found["until"].index(until) for until in (2.5, 10, 30, 60) if until in found["until"]]
    shares = [", ".join(f"{100 * found[key][i]:.0f}%" for i in at) for key in ("right", "alone", "kept")]
    seconds, drift = (", ".join(f"{found[key][i]:.3g}" for i in at) for key in ("until", "drift"))
    return f"| {name} | {row['clips']} | {seconds} | {' | '.join(shares)} | {drift} |"


def figures(row: dict[str, Any]) -> dict[str, list[float]]:
    """Of each stretch: shares with the right thing, with it alone, with the first stretch's; the median drift."""
    by_stretch = list(zip(*row["read"], strict=True))
    share = lambda holds: [sum(map(holds, reads)) / len(reads) for reads in by_stretch]
    return {
        "until": [reads[0]["until"] for reads in by_stretch],
        "right": share(lambda read: read["shape"] and read["colour"]),
        "shape": share(lambda read: read["shape"]),
        "colour": share(lambda read: read["colour"]),
        "alone": share(lambda read: read["shape"] and read["colour"] and read["things"] == 1),
        "one": share(lambda read: read["things"] == 1),
        "kept": [
            sum(own[number]["seen"] == own[0]["seen"] for own in row["read"]) / len(row["read"])
            for number in range(len(by_stretch))
        ],
        "drift": [float(np.median([read["drift"] for read in reads])) for reads in by_stretch],
    }


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _rows() -> dict[str, Any]:
    path = HERE / "minute.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
