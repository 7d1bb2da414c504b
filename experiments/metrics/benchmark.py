"""Clips a second and memory of `evaluate videos`, beside a plain loop in PyTorch over the same clips. See README.md.

python experiments/metrics/benchmark.py --clips 64 --json experiments/metrics/benchmark.json
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import platform
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

import click
import numpy as np
from scipy import ndimage

from sora_jax.evaluation.catalogue import METRICS
from sora_jax.evaluation.clips import ClipSettings
from sora_jax.evaluation.networks import i3d
from sora_jax.evaluation.provenance import made_by
from sora_jax.evaluation.videos import evaluate_videos
from sora_jax.media.video import Video

WARM_UP = 16  # clips, in the same process, before time is taken: compiling isn't counted
HERE = pathlib.Path(__file__).parent
COMMON = ("psnr", "ssim", "ms_ssim", "temporal_flicker", "fvd")  # what the loop in PyTorch computes too


@click.command()
@click.option("--clips", default=64)
@click.option("--side", default=128)
@click.option("--frames", default=16)
@click.option("--metrics", default=",".join(COMMON), help="Of sora-jax evaluate videos.")
@click.option("--features", default="i3d", help="Of fvd.")
@click.option(
    "--torch", "interpreter", help="A Python with torch, torchmetrics and av; by default this one, if it has."
)
@click.option("--json", "out", type=click.Path(path_type=pathlib.Path), help="Where to write the figures.")
@click.option("--worker", hidden=True, help="The folder with clips: measure them here.")
def main(
    clips: int,
    side: int,
    frames: int,
    metrics: str,
    features: str,
    interpreter: str | None,
    out: pathlib.Path | None,
    worker: str | None,
) -> None:
    """Writes clips, measures them in a process of its own, and in PyTorch where that is installed."""
    if worker:
        print(json.dumps(measure(pathlib.Path(worker), metrics.split(","), features, frames)))
        return
    result: dict[str, Any] = {
        "clips": clips, "frames": frames, "side": side, "metrics": metrics, "features": features,
        "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0], "made_by": made_by(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        write_clips(root, clips, frames, side)
        options = ["--metrics", metrics, "--features", features, "--frames", str(frames), "--worker", folder]
        result["ours"] = run([sys.executable, __file__, *options])
        if interpreter or importlib.util.find_spec("torch"):
            shared = [name for name in metrics.split(",") if name in COMMON]
            if "fvd" in shared:
                weights, *_ = i3d.load_i3d()
                np.savez(root / "i3d.npz", **{name: np.asarray(value) for name, value in weights.items()})
            program = str(HERE / "torch_loop.py")
            result["torch"] = run(
                [interpreter or sys.executable, program, folder, ",".join(shared), str(frames)]
            )
            result["ratio"] = result["ours"]["clips_per_second"] / result["torch"]["clips_per_second"]
    for name in ("ours", "torch"):
        if told := result.get(name):
            print(f"{name}: {told['clips_per_second']:.2f} clips/s, {told['peak_mib']:.0f} MiB at most")
    print(f"load of {result['load_before']:.1f} before on {result['cores']} cores")
    if out:
        out.write_text(json.dumps(result, indent=2) + "\n")


def write_clips(root: pathlib.Path, clips: int, frames: int, side: int) -> None:
    """Two folders of a texture that drifts; what `own` shows is what `real` shows with noise on it."""
    rng = np.random.default_rng(0)
    texture = ndimage.gaussian_filter(rng.standard_normal((512, 512, 3)), (3, 3, 0), mode="wrap")
    texture = np.clip(128 + texture / texture.std() * 50, 0, 255)
    for i in range(clips):
        start, step = rng.integers(0, 512, 2), rng.normal(0, 3, 2)
        places = [(start + step * t).astype(int) for t in range(frames)]
        clip = np.stack([np.roll(texture, tuple(-place), (0, 1))[:side, :side] for place in places])
        noisy = clip + rng.normal(0, 8, clip.shape)
        for name, shown in (("real", clip), ("own", noisy)):
            (root / name).mkdir(exist_ok=True)
            Video(np.clip(shown, 0, 255).round().astype(np.uint8), 8.0).save(
                root / name / f"{i:05d}.mp4", crf=10
            )


def measure(root: pathlib.Path, metrics: list[str], features: str, frames: int) -> dict[str, Any]:
    """Clips a second of both folders together, memory at its highest, and figures."""
    compared = any(METRICS[name].reference for name in metrics)
    options: dict[str, Any] = {
        "clip": ClipSettings(frames),
        "features": {"fvd": features} if "fvd" in metrics else {},
        "few": True,
        "replicates": 20,
    }
    with tempfile.TemporaryDirectory() as folder:
        warm = pathlib.Path(folder)
        for name in ("own", "real"):
            (warm / name).mkdir()
            for path in sorted((root / name).iterdir())[:WARM_UP]:
                (warm / name / path.name).symlink_to(path)
        evaluate_videos(warm / "own", metrics, warm / "real" if compared else None, **options)
    started, used = time.perf_counter(), time.process_time()
    result = evaluate_videos(root / "own", metrics, root / "real" if compared else None, **options)
    seconds, processor = time.perf_counter() - started, time.process_time() - used
    clips = len(result["clips"])
    return {
        "seconds": seconds,
        "processor_seconds": processor,
        "clips_per_second": clips / seconds,
        "clips_per_processor_second": clips / processor,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "figures": {name: told["value"] for name, told in result["metrics"].items()},
    }


def run(command: list[str]) -> dict[str, Any]:
    """What a process prints as JSON on its last line."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(done.stderr[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
