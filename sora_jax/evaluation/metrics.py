"""How near one clip is to another, pixel by pixel: PSNR and SSIM."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from sora_jax.errors import UserError

# Rec. 709: what the eye takes for brightness.
LUMA = np.array([0.2126, 0.7152, 0.0722])


def psnr(clip: np.ndarray, reference: np.ndarray, data_range: float = 255.0) -> np.ndarray | float:
    """Peak signal-to-noise ratio in decibels, one a clip: the error is averaged over the clip's frames.

    Args:
      clip: [..., T, Y, X, C].
      reference: the same shape.
      data_range: from the darkest to the brightest value: 255, 1, or 2 for [-1, 1].

    Returns:
      [...]; infinite where the two are equal.

    Raises:
      UserError: the shapes differ, or are no clips.
    """
    clip, reference = _pair(clip, reference)
    error = np.mean((clip - reference) ** 2, axis=(-4, -3, -2, -1))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(data_range**2 / error)


def ssim(clip: np.ndarray, reference: np.ndarray, data_range: float = 255.0) -> np.ndarray | float:
    """Structural similarity, one a clip: the mean over the clip's frames of the index on luma.

    Wang, Bovik, Sheikh, Simoncelli 2004, "Image quality assessment: from error visibility to structural
    similarity": Gaussian window of 11 x 11, sigma 1.5, K1 = 0.01, K2 = 0.03, averaged where the window lies
    within the frame. Luma is Rec. 709's; a clip of one channel is its own luma.

    Args:
      clip: [..., T, Y, X, C], C = 1 or 3, at least 11 pixels high and wide.
      reference: the same shape.
      data_range: as `psnr`.

    Returns:
      [...]; 1 where the two are equal.

    Raises:
      UserError: the shapes differ, are no clips, or the frames are smaller than the window.
    """
    clip, reference = (_luma(each) for each in _pair(clip, reference))
    if min(clip.shape[-2:]) < 11:
        raise UserError(f"SSIM needs frames of at least 11 x 11 pixels, not {clip.shape[-2:]}.")
    mean_a, mean_b = _window(clip), _window(reference)
    variance_a = _window(clip**2) - mean_a**2
    variance_b = _window(reference**2) - mean_b**2
    covariance = _window(clip * reference) - mean_a * mean_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    brightness = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return np.mean(brightness * structure, axis=(-3, -2, -1))


def _pair(clip: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    clip, reference = np.asarray(clip), np.asarray(reference)
    if clip.shape != reference.shape or clip.ndim < 4 or clip.shape[-1] not in (1, 3):
        raise UserError(
            f"Two clips [..., T, Y, X, C] of one shape are compared, C = 1 or 3, "
            f"not {list(clip.shape)} with {list(reference.shape)}."
        )
    return clip.astype(np.float64), reference.astype(np.float64)


def _luma(clip: np.ndarray) -> np.ndarray:
    return clip @ LUMA if clip.shape[-1] == 3 else clip[..., 0]


def _window(image: np.ndarray) -> np.ndarray:
    """The Gaussian mean at every place where the whole window lies within the frame."""
    for axis in (-2, -1):
        image = ndimage.gaussian_filter1d(image, 1.5, axis, radius=5)
    return image[..., 5:-5, 5:-5]
