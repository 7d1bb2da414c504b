"""Metrics of Moving MNIST against plain NumPy and scikit-image's figures; a whole evaluation of a tiny model."""

import json
import pathlib
import runpy

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.scripts import scripts_of

FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "moving_mnist"


@pytest.fixture(scope="module")
def script():
    with scripts_of("moving_mnist"):
        yield runpy.run_path(str(FOLDER / "run.py"))


@pytest.fixture(scope="module")
def metrics(script):
    return script["metrics"]


def noisy_clips() -> tuple[np.ndarray, np.ndarray]:
    """Two clips of three frames, of which the upper half is mostly dark, and the same with noise."""
    rng = np.random.default_rng(0)
    truth = rng.random((2, 3, 24, 20), dtype=np.float32)
    truth[:, :, :12] *= truth[:, :, :12] > 0.8
    return truth, np.clip(truth + 0.2 * rng.standard_normal(truth.shape, dtype=np.float32), 0, 1)


def test_errors_are_sums_over_a_frame(metrics):
    truth, clips = noisy_clips()
    apart = [clip - true for clip, true in zip(clips, truth, strict=True)]
    squares = [sum(float((frame**2).sum()) for frame in clip) / 3 for clip in apart]
    np.testing.assert_allclose(metrics.mse(clips, truth), squares, rtol=1e-5)
    np.testing.assert_allclose(metrics.by_frame(clips, truth).mean(1), squares, rtol=1e-5)
    sizes = [sum(float(abs(frame).sum()) for frame in clip) / 3 for clip in apart]
    np.testing.assert_allclose(metrics.mae(clips, truth), sizes, rtol=1e-5)


def test_ssim_is_that_of_scikit_image(metrics):
    """structural_similarity of 0.26.0 with data_range=2, and of 0.19.3 without, which warns of nothing."""
    truth, clips = noisy_clips()
    np.testing.assert_allclose(
        metrics.ssim(clips, truth), [0.8780687455304715, 0.8660150248379934], atol=2e-6
    )
    np.testing.assert_allclose(metrics.ssim(clips, truth, 1).mean(), 0.8704599738121033, atol=2e-6)


def test_ssim_is_its_formula_window_by_window(metrics):
    truth, clips = noisy_clips()
    a, b = clips[1, 2].astype(float), truth[1, 2].astype(float)
    values = []
    for top in range(24 - 6):
        for left in range(20 - 6):
            x, y = (image[top : top + 7, left : left + 7].ravel() for image in (a, b))
            (xx, xy), (_, yy) = np.cov(x, y)
            c1, c2 = 0.02**2, 0.06**2
            own = (2 * x.mean() * y.mean() + c1) / (x.mean() ** 2 + y.mean() ** 2 + c1)
            values.append(own * (2 * xy + c2) / (xx + yy + c2))
    np.testing.assert_allclose(metrics.ssim(clips[1:, 2:], truth[1:, 2:]), np.mean(values), rtol=1e-9)


def test_equal_clips_are_perfect_and_excess_counts_for_errors_alone(metrics):
    truth, _ = noisy_clips()
    assert metrics.mse(truth, truth).max() == metrics.mae(truth, truth).max() == 0
    np.testing.assert_allclose(metrics.ssim(truth, truth), 1)
    bright = np.ones_like(truth)
    np.testing.assert_allclose(metrics.ssim(bright + 0.5, bright), 1)
    np.testing.assert_allclose(metrics.mse(bright + 0.5, bright), 0.25 * 24 * 20)


@pytest.mark.slow  # compiles a training step and a sampler
def test_a_run_is_trained_and_evaluated(script, tmp_path):
    from sora_jax.train import __main__ as command

    digits = tmp_path / "digits.npz"
    rng = np.random.default_rng(0)
    np.savez(digits, digits=rng.integers(0, 256, (30, 28, 28), np.uint8))
    flags = [
        f"--config.data.source={digits}",
        "--config.data.resolutions=64",
        "--config.pipeline.seq_len=448",
    ]
    flags += ["--config.log.sheet_every=0", "--config.steps=2", "--config.dit.attention=reference"]
    assert command.main(["--config=moving_mnist:debug", f"--workdir={tmp_path / 'run'}", *flags]) == 0
    options = ["--model", tmp_path / "run", "--digits", digits, "--out", tmp_path / "out"]
    options += ["--clips", 3, "--samples", 2, "--steps", 2, "--batch", 2]
    result = CliRunner().invoke(script["main"], ["evaluate", *map(str, options)], catch_exceptions=False)
    assert result.exit_code == 0
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    errors = {row["way"]: row["mse"]["mean"] for row in report["rows"]}
    assert errors["best of 2"] <= errors["one sample"] and min(errors.values()) > 0
    source = script["MovingDigits"](digits, "heldout", clips=3, shapes=((20, 64, 64, 8.0),))
    squares = [(source[i].video.frames[10:, ..., 0] / 255.0) ** 2 for i in range(3)]
    assert errors["black"] == pytest.approx(np.sum(squares) / 30, rel=1e-4)
    assert report["made"]["step"] == 2 and len(report["mse_by_frame"]["one sample"]) == 10
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.json",
        "by_frame.png",
        "sheet.png",
    }
