"""The autoencoder in tiles against the whole frame, and as a stream of growing length. See README.md beside.

python experiments/speed/vae.py --json experiments/speed/vae.json [--video FILE --height 270 --width 480]
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import math
import os
import pathlib
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import click
import jax
import numpy as np

from sora_jax.checkpoints.bundle import load_bundle, with_config
from sora_jax.media.video import Video, read_video, resize
from sora_jax.models import tiles as module
from sora_jax.models.tiles import TILES, Tiles, decode_stream, encode_stream
from sora_jax.models.vae import VAE
from sora_jax.toyworld.render import render
from sora_jax.toyworld.sampling import sample_scene

HERE = pathlib.Path(__file__).parent
HALOS = (0, 1, 2, 3, 5, 9)
LENGTHS = (33, 65, 129)
SIZES = {"480×270": (270, 480), "854×480": (480, 854), "1280×720": (720, 1280), "1920×1080": (1080, 1920)}


@click.command()
@click.option("--json", "out", type=click.Path(path_type=pathlib.Path), help="Where to write the figures.")
@click.option("--model", default="toyworld", help="Whose autoencoder.")
@click.option("--video", type=click.Path(exists=True), help="Footage; default: a toyworld clip.")
@click.option("--start", default=100.0, help="Seconds into the footage.")
@click.option("--height", default=270)
@click.option("--width", default=480)
@click.option("--frames", default=33, help="Of the clip, 1 + 4k.")
@click.option(
    "--dtype", default="float32", help="Of the arithmetic: bfloat16's own rounding hides the tiles'."
)
@click.option("--tile", default=0, help="Latent cells; default: two tiles side by side, as small as can be.")
@click.option("--halos", default=",".join(map(str, HALOS)))
@click.option(
    "--lengths", default=",".join(map(str, LENGTHS)), help="Frames streamed for the peak of memory."
)
@click.option(
    "--whole/--no-whole", default=True, help="Whether the whole frame is coded too, to compare with."
)
@click.option("--one", hidden=True, help="What a process of its own measures.")
def main(one: str | None, out: pathlib.Path | None, halos: str, lengths: str, **options: Any) -> None:
    """Prints seconds, memory, programs and PSNR of each way to cut, and memory by duration."""
    if one:
        click.echo(json.dumps(measure(options, json.loads(one))))
        return
    long = math.ceil(options["width"] / 8)
    ways: list[dict[str, Any]] = [{"size": 1 << 16, "halo": 0, "blend": 0}] if options["whole"] else []
    for halo in map(int, halos.split(",") if halos else ()):
        overlap = 2 * halo + TILES.blend
        ways.append(
            {"size": options["tile"] or (long + overlap + 1) // 2, "halo": halo, "blend": TILES.blend}
        )
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE
        ).stdout.strip(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {jax.default_backend()}",
        "jax": jax.__version__,
        "options": options | {"video": options["video"] and pathlib.Path(options["video"]).name},
        "cost": {
            f"{size}, halo {halo}": Tiles(halo=halo).cost(*(math.ceil(side / 8) for side in pixels))
            for halo in HALOS
            for size, pixels in SIZES.items()
        },
        "ways": [],
        "streams": [],
    }
    click.echo(
        f"{'':22}{'computed':>9}{'encode':>8}{'decode':>8}{'peak':>8}{'programs':>9}{'decoded':>9}{'worst':>7}{'latent':>9}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for way in ways:
            row = alone(options, {"tiles": way, "folder": folder, "frames": options["frames"]})
            result["ways"].append(way | row)
            whole = way["size"] == 1 << 16
            name = "whole frame" if whole else f"tile {way['size']}, halo {way['halo']}"
            told = f"{row['psnr']:6.1f} dB{row['worst']:7.2f}{row['latent']:9.1e}" if "psnr" in row else ""
            click.echo(
                f"{name:22}{row['cost']:8.2f}×{row['encode']:7.1f}s{row['decode']:7.1f}s{row['peak']:5.0f} MB"
                f"{row['programs']:9}{told}"
            )
    for length in map(int, lengths.split(",")) if lengths else ():
        way = dataclasses.asdict(TILES) | {"size": options["tile"] or 40}
        row = alone(options, {"tiles": way, "frames": length, "stream": True})
        result["streams"].append({"frames": length} | row)
        click.echo(f"{length} frames streamed through both: {row['peak']:.0f} MB, {row['seconds']:.1f} s")
    if out:
        out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def alone(options: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    """What `measure` returns, from a process of its own: peaks of memory are a process's."""
    given = [f"--{name}={value}" for name, value in options.items() if value is not None and name != "whole"]
    done = subprocess.run(
        [sys.executable, __file__, *given, "--one", json.dumps(task)], stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout)


def measure(options: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    vae = load_bundle(options["model"]).vae
    vae = with_config(vae, dataclasses.replace(vae.config, dtype=options["dtype"]))
    own = Tiles(**task["tiles"])
    if "stream" in task:
        return {"seconds": seconds(lambda: stream(vae, options, task["frames"], own)), "peak": peak()}
    frames = np.stack(list(clip(options, task["frames"])))
    corner = frames[:5, : 8 * own.size, : 8 * own.size]
    list(decode_stream(vae, np.concatenate(list(encode_stream(vae, corner, own))), own))  # compiled
    made: dict[str, np.ndarray] = {}
    row: dict[str, Any] = {
        "cost": own.cost(*(side // 8 for side in frames.shape[1:3])),
        "encode": seconds(lambda: made.update(latent=np.concatenate(list(encode_stream(vae, frames, own))))),
        "programs": module._encode_chunk._cache_size() + module._decode_chunk._cache_size(),
    }
    # Decoders are compared on the whole frame's latents.
    kept = pathlib.Path(task["folder"]) / "whole.npz"
    whole = dict(np.load(kept)) if kept.exists() else None
    given = whole["latent"] if whole else made["latent"]
    row["decode"] = seconds(lambda: made.update(clip=np.concatenate(list(decode_stream(vae, given, own)))))
    row["peak"] = peak()
    if whole:
        error = np.abs(made["clip"] - whole["clip"]).astype(np.float64)
        row["psnr"] = float(10 * np.log10(4 / max(np.mean(error**2), 1e-20)))
        row["worst"] = float(error.max() * 127.5)  # in levels of 255
        row["latent"] = float(
            np.linalg.norm(made["latent"] - whole["latent"]) / np.linalg.norm(whole["latent"])
        )
    else:
        np.savez(kept, **made)
    return row


def stream(vae: VAE, options: dict[str, Any], frames: int, own: Tiles) -> None:
    """Encodes and decodes, and keeps nothing."""
    pieces = encode_stream(vae, clip(options, frames), own)
    made = sum(len(each) for each in decode_stream(vae, itertools.chain.from_iterable(pieces), own))
    assert made == frames, made


def clip(options: dict[str, Any], frames: int) -> Iterator[np.ndarray]:
    """Frames padded to whole cells: the footage, over and over, or a toyworld clip."""
    height, width = options["height"], options["width"]
    if options["video"]:
        video = read_video(options["video"], options["start"], 17)
    else:
        video = Video(
            render(sample_scene(0, 0, "validation", 2.0, width / height), 17, height, width, 8.0), 8.0
        )
    if video.size != (height, width):
        video = resize(video, height, width)
    padding = [(0, -height % 8), (0, -width % 8), (0, 0)]
    for index in range(frames):
        yield np.pad(video.frames[index % len(video)], padding, mode="edge")


def seconds(run: Any) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def peak() -> float:
    """MB that this process held at most."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (1 << 20 if sys.platform == "darwin" else 1 << 10)


if __name__ == "__main__":
    main()
