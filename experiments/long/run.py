"""Memory of long videos: clips of the bundled model by duration, and random latents decoded at 1080p. See README.md.

python experiments/long/run.py clips
python experiments/long/run.py decode
python experiments/long/run.py tiles
python experiments/long/run.py plot

Each measurement is a process of its own; this one stays small, since a child's peak begins at its parent's.
"""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import click

HERE = pathlib.Path(__file__).parent
MEBI = 1 << 20
PROMPT = "a red circle moves left"
CHANNELS, SIDES = 16, (1080, 1920)


@click.group()
def main() -> None:
    """Peaks of memory by duration."""


@main.command()
@click.option("--seconds", default="5,15,30,60", help="Durations to measure.")
def clips(seconds: str) -> None:
    """`sora-jax generate --seconds …` at 64 × 64, and a contact sheet of the clip of 60 s."""
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for duration in map(float, seconds.split(",")):
            path = f"{folder}/{duration:g}.mp4"
            row = _apart("one-clip", "--seconds", duration, "--output", path)
            click.echo(json.dumps({key: value for key, value in row.items() if key != "curve"}))
            rows.append(row)
            if duration == 60:
                _sheet(path)
    _store("clips", rows)


@main.command()
@click.option("--seconds", default="1,2,4,8", help="Durations to measure.")
def decode(seconds: str) -> None:
    """Random latents of 1080p at 24 fps, tile by tile, straight into the encoder."""
    rows = []
    for duration in map(float, seconds.split(",")):
        row = _apart("one-decode", "--seconds", duration)
        click.echo(json.dumps({key: value for key, value in row.items() if key != "curve"}))
        rows.append(row)
        _store("decode", rows)


@main.command()
def tiles() -> None:
    """The same for a minute of small frames in small tiles."""
    row = _apart("one-decode", "--seconds", 66.7, "--height", 128, "--width", 256, "--tile", 16)
    for when, resident in row["curve"][:: len(row["curve"]) // 12]:
        click.echo(f"after {when} s: {resident} MiB")
    _store("tiles", [row])


@main.command("one-clip", hidden=True)
@click.option("--seconds", required=True)
@click.option("--output", required=True)
def one_clip(seconds: str, output: str) -> None:
    """What a process of its own measures."""
    with _Watch() as watch:
        from sora_jax.cli.main import main as sora_jax

        status = sora_jax(["generate", PROMPT, "--seconds", seconds, "-o", output, "--quiet"])
    assert status == 0
    from sora_jax.media.video import read_video

    click.echo(
        json.dumps(watch.found | {"seconds": float(seconds), "video": _moves(read_video(output).frames)})
    )


@main.command("one-decode", hidden=True)
@click.option("--seconds", type=float, required=True)
@click.option("--height", default=SIDES[0])
@click.option("--width", default=SIDES[1])
@click.option("--tile", default=64, help="Latent cells.")
def one_decode(seconds: float, height: int, width: int, tile: int) -> None:
    """What a process of its own measures."""
    with _Watch() as watch, tempfile.TemporaryDirectory() as folder:
        import numpy as np

        from sora_jax.checkpoints.bundle import load_bundle
        from sora_jax.media.video import write_frames
        from sora_jax.models.tiles import Tiles
        from sora_jax.pipeline.vae_processor import VaeProcessor, to_bytes
        from sora_jax.tokens.canvas import all_noise_canvas
        from sora_jax.tokens.spans import CausalSpan

        engine, fps = VaeProcessor(load_bundle()), 24.0
        engine.tiles = Tiles(tile)
        frames = round(seconds * fps)
        stream = CausalSpan(0, 1 + -(-(frames - 1) // 4) * 4)
        canvas = all_noise_canvas(stream, engine.cells(height, width), CHANNELS, fps)
        latents = (
            np.random.default_rng((0, i)).standard_normal((*canvas.grid[1:], CHANNELS), np.float32)
            for i in range(len(canvas))
        )

        decoded = engine.decode_frames(canvas, frames, height, width, latents=latents)
        path = write_frames(f"{folder}/out.mp4", map(to_bytes, decoded), fps)
        size = path.stat().st_size
    click.echo(json.dumps(watch.found | {"seconds": seconds, "frames": frames, "file_bytes": size}))


@main.command()
def predict() -> None:
    """The bytes that decoding 1080p must hold, by arithmetic and (a tile's temporaries) by the compiler."""
    import jax
    import jax.numpy as jnp

    from sora_jax.checkpoints.bundle import load_bundle
    from sora_jax.models.tiles import TILES, _decode_chunk

    vae = load_bundle().vae
    config, side = vae.config, TILES.size
    cells = [length // by for length, by in zip(SIDES, config.compression[1:], strict=True)]
    tiles = len(TILES.starts(cells[0])) * len(TILES.starts(cells[1]))
    past, high = 0, side
    for stride, width, blocks in reversed(
        list(zip(config.strides, config.decoder_widths, config.decoder_blocks, strict=True))
    ):
        past += 2 * blocks * 2 * high * high * width * jnp.dtype(config.dtype).itemsize
        high *= stride[1]
    frame = 4 * 3 * SIDES[0] * SIDES[1]
    tile = jax.ShapeDtypeStruct((1, TILES.chunk, side, side, config.channels), jnp.float32)
    _, shapes = jax.eval_shape(lambda vae, x: _decode_chunk(vae, x, None), vae, tile)
    memory = _decode_chunk.lower(vae, tile, shapes).compile().memory_analysis()
    figures = {
        "tiles": tiles,
        "past of a tile": past,
        "pasts": tiles * past,
        "chunk of frames, float32": 4 * TILES.chunk * frame,
        "frames open to the next seam": 8 * frame,
        "a tile's temporaries and results (compiler)": memory.temp_size_in_bytes
        + memory.output_size_in_bytes,
    }
    for name, value in figures.items():
        click.echo(f"{name}: {value if value < 1000 else f'{value / MEBI:.0f} MiB'}")


@main.command()
def plot() -> None:
    """Tables and a picture of what was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    titles = {"clips": "sora-jax generate, 64×64, 8 fps", "decode": "random latents decoded, 1080p, 24 fps"}
    for panel, (name, title) in zip(panels, titles.items(), strict=True):
        rows = json.loads((HERE / f"{name}.json").read_text())["rows"]
        click.echo(f"\n| {name}, s | peak, MiB | wall, s |\n|---|---|---|")
        for row in rows:
            click.echo(f"| {row['seconds']:g} | {row['peak']:.0f} | {row['wall']:.0f} |")
            panel.plot(*zip(*row["curve"], strict=True), label=f"{row['seconds']:g} s of video", linewidth=1)
        panel.set(
            title=title, xlabel="seconds since the process began", ylabel="resident memory, MiB", ylim=0
        )
        panel.legend()
    figure.savefig(HERE / "memory.png", dpi=80)


class _Watch:
    """The process's resident memory over time, and its peak."""

    def __enter__(self) -> _Watch:
        self.begin = time.perf_counter()
        self.curve: list[tuple[float, float]] = []
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()
        return self

    def _look(self) -> None:
        pages = resource.getpagesize() / MEBI
        while not self.over.wait(0.1):
            resident = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
            self.curve.append((round(time.perf_counter() - self.begin, 1), round(resident * pages, 1)))

    def __exit__(self, *_: Any) -> None:
        wall = time.perf_counter() - self.begin
        self.over.set()
        self.thread.join()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        every = -(-len(self.curve) // 200)
        # Of each stretch its highest: no peak is left out.
        curve = [
            max(self.curve[i : i + every], key=lambda at: at[1]) for i in range(0, len(self.curve), every)
        ]
        self.found = {"peak": round(peak, 1), "wall": round(wall, 1), "curve": curve}


def _moves(frames: Any) -> list[dict[str, float]]:
    """Of each ten seconds: the mean step from frame to frame, and the mean colour, in levels of 256."""
    parts = [frames[i : i + 80].astype(float) for i in range(0, len(frames), 80)]
    return [
        {
            "step": round(float(abs(part[1:] - part[:-1]).mean()), 2),
            **{name: round(float(part[..., i].mean()), 1) for i, name in enumerate(("red", "green", "blue"))},
        }
        for part in parts
    ]


def _sheet(path: str) -> None:
    """A frame every 2.5 seconds."""
    from sora_jax.media.contact_sheet import contact_sheet
    from sora_jax.media.video import Video, read_video

    shown = read_video(path).frames[::20]
    rows = [Video(shown[i : i + 6], 0.4) for i in range(0, len(shown), 6)]
    labels = [f"{i * 15} s and every 2.5 s on" for i in range(len(rows))]
    contact_sheet(rows, labels, frame_height=96).quantize(64).save(HERE / "sheet.png", optimize=True)


def _apart(*words: object) -> dict[str, Any]:
    command = [sys.executable, __file__, *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _store(name: str, rows: list[dict[str, Any]]) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
    about = {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, other work beside",
    }
    (HERE / f"{name}.json").write_text(json.dumps(about | {"rows": rows}) + "\n")


if __name__ == "__main__":
    main()
