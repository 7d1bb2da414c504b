"""MSE, MAE and SSIM of Moving MNIST as OpenSTL counts them (openstl/core/metrics.py), one number a clip.

Frames are grey, in [0, 1]. Errors are summed over a frame's pixels and averaged over frames. SSIM is that of
scikit-image 0.19 as it is called there: a uniform window of 7×7, sample covariances, the mean of where the window lies
within the frame, and, as no range is given, that of floating-point images then: 2, from -1 to 1.
"""

from __future__ import annotations

import numpy as np

WINDOW, DATA_RANGE = 7, 2.0


def mse(clips: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """float[..., T, Y, X] twice → float64[...]; the sum of a frame's squared errors."""
    return by_frame(clips, truth).mean(-1)


def by_frame(clips: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """As `mse`, of each frame: float64[..., T]."""
    return np.square(clips - truth, dtype=np.float64).sum((-2, -1))


def mae(clips: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """float[..., T, Y, X] twice → float64[...]; the sum of a frame's absolute errors."""
    return np.abs(clips - truth, dtype=np.float64).sum((-2, -1)).mean(-1)


def ssim(clips: np.ndarray, truth: np.ndarray, data_range: float = DATA_RANGE) -> np.ndarray:
    """float[..., T, Y, X] twice → float64[...]; of clips limited to [0, 1], as OpenSTL does before it."""
    a, b = np.clip(clips, 0, 1).astype(np.float64), truth.astype(np.float64)
    mean_a, mean_b = _window_means(a), _window_means(b)
    unbiased = WINDOW**2 / (WINDOW**2 - 1)
    variance_a = unbiased * (_window_means(a * a) - mean_a**2)
    variance_b = unbiased * (_window_means(b * b) - mean_b**2)
    covariance = unbiased * (_window_means(a * b) - mean_a * mean_b)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    brightness = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (brightness * structure).mean((-3, -2, -1))


def _window_means(images: np.ndarray) -> np.ndarray:
    """[..., Y, X] → [..., Y-6, X-6]: by sums along one side and then the other."""
    for axis in (-1, -2):
        sums = np.cumsum(np.insert(images, 0, 0.0, axis=axis), axis=axis)
        size = sums.shape[axis]
        after, before = (np.take(sums, np.arange(size - WINDOW) + shift, axis=axis) for shift in (WINDOW, 0))
        images = (after - before) / WINDOW
    return images
