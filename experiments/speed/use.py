"""Encoding clips for training, and `upscale`: this build against another one, in turn. See README.md.

    python experiments/speed/use.py encode --other path/to/another/checkout --video big_buck_bunny_000-400s_270p.mp4
    python experiments/speed/use.py upscale --other path/to/another/checkout --video big_buck_bunny_000-400s_270p.mp4

Each run is a process of its own, so that its first compilations count. Times are wall and processor seconds; on a
machine that others use as well the ratio of the latter says more. Each checkout runs its own copy of this file; one
that has none needs that of its time (before the packages of 2026-11-29: git show 4dd6601:experiments/speed/use.py).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]


def encode(video: str, resolution: int, clips: int) -> dict[str, Any]:
    """Clips a second of `configs/toyworld_dit.py` on a film at its own rate, two seconds each."""
    import importlib.util

    from sora_jax.checkpoints.bundle import load_bundle
    from sora_jax.config import component
    from sora_jax.data.data_config import DataConfig
    from sora_jax.data.encode import LatentsConfig, encode_sources
    from sora_jax.data.sources import make_sources
    from sora_jax.models.text import TextConfig

    spec = importlib.util.spec_from_file_location("config", ROOT / "configs" / "toyworld_dit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    own = {"source": video, "resolutions": (resolution,), "rates": (24.0,), "max_frames": 0, "cache": ""}
    data = component(DataConfig, dict(config.data) | own | {"durations": (2.0,), "world": {}}, "data")
    latents = dict(config.latents) | {"clips": clips, "layouts": dict(config.latents.layouts)}
    vae, text = load_bundle("toyworld").vae, component(TextConfig, config.text, "text")
    with tempfile.TemporaryDirectory() as folder, Clock() as clock:
        records = encode_sources(
            component(LatentsConfig, latents, "latents"), data, vae, text, folder, make_sources(data)
        )
        count, frames = len(records), sum(4 * len(records[i]["latent"]) - 3 for i in range(len(records)))
    return clock.told() | {"clips": count, "latent frames as frames": frames}


def upscale(video: str, start: float, seconds: float, small: int) -> dict[str, Any]:
    """The film scaled down to `small` pixels and up again to twice that: seconds, and PSNR against the film."""
    import numpy as np

    from sora_jax.media.video import Video, read_video, resize
    from sora_jax.pipeline.pipeline import load

    film = read_video(video, start, math.ceil(seconds * 24))
    Y, X = (2 * small, 2 * round(small * film.size[1] / film.size[0] / 2) * 2)
    truth = resize(film, Y, X)
    given = Video(np.stack([*resize(truth, Y // 2, X // 2).frames]), film.fps)
    pipeline = load("toyworld")
    with Clock() as clock:
        (made,) = pipeline.make([pipeline.job("upscale", given, Y)])
    error = np.square(made.frames.astype(float) - truth.frames).mean()
    return clock.told() | {"psnr": 10 * math.log10(255**2 / error), "frames": len(made)}


class Clock:
    """Wall and processor seconds, and the process's peak."""

    def __enter__(self) -> Clock:
        self.wall, self.processor = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        self.wall, self.processor = time.perf_counter() - self.wall, time.process_time() - self.processor

    def told(self) -> dict[str, float]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return {"wall": self.wall, "processor": self.processor, "peak_mb": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=("encode", "upscale"))
    parser.add_argument("--video", required=True)
    parser.add_argument("--other", help="a checkout of the build to compare with")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--resolution", type=int, default=64, help="encode: the short side")
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--start", type=float, default=100.0, help="upscale: seconds into the video")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--small", type=int, default=270, help="upscale: the short side that is given")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        video = options.video
        if options.work == "encode":
            print(json.dumps(encode(video, options.resolution, options.clips)))
        else:
            print(json.dumps(upscale(video, options.start, options.seconds, options.small)))
        return
    builds = {"this": ROOT} | ({"other": pathlib.Path(options.other).resolve()} if options.other else {})
    rows: list[dict[str, Any]] = []
    for _ in range(options.rounds):
        for name, root in builds.items():
            script = root / pathlib.Path(__file__).resolve().relative_to(ROOT)
            command = [sys.executable, str(script), *sys.argv[1:], "--alone"]
            told = subprocess.run(
                command,
                env=os.environ | {"PYTHONPATH": str(root)},
                cwd=root,
                stdout=subprocess.PIPE,
                check=True,
            )
            rows.append({"build": name} | json.loads(told.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
