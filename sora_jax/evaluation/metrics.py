"""How near one clip is to another, pixel by pixel: PSNR, SSIM and MS-SSIM."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.errors import UserError

# Rec. 709: what the eye takes for brightness.
LUMA = np.array([0.2126, 0.7152, 0.0722])
# Of the five scales of MS-SSIM, from the finest.
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOW = 11  # pixels, high and wide
_SIGMA = 1.5
# Of a block of frames that is measured at once: it stays in a processor's cache.
PIXELS, _FRAMES = 1 << 18, 32

Border = Literal["valid", "reflect"]


def psnr(clip: np.ndarray, reference: np.ndarray, data_range: float = 255.0) -> np.ndarray | float:
    """Peak signal-to-noise ratio in decibels, one a clip: the error is averaged over the clip's frames.

    Args:
      clip: [..., T, Y, X, C].
      reference: the same shape.
      data_range: from the darkest to the brightest value: 255, 1, or 2 for [-1, 1].

    Returns:
      [...]; infinite where the two are equal.

    Raises:
      UserError: the shapes differ, are no clips, or a value is not a finite number.
    """
    clip, reference = _pair(clip, reference)
    error = np.mean((clip - reference) ** 2, axis=(-4, -3, -2, -1))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(data_range**2 / error)


def ssim(
    clip: np.ndarray, reference: np.ndarray, data_range: float = 255.0, border: Border = "valid"
) -> np.ndarray | float:
    """Structural similarity, one a clip: the mean over the clip's frames of the index on luma.

    Wang, Bovik, Sheikh, Simoncelli 2004, "Image quality assessment: from error visibility to structural
    similarity": Gaussian window of 11 x 11, sigma 1.5, K1 = 0.01, K2 = 0.03. Luma is Rec. 709's; a clip of one
    channel is its own luma. Computed in float32.

    Args:
      clip: [..., T, Y, X, C], C = 1 or 3, at least 11 pixels high and wide.
      reference: the same shape.
      data_range: as `psnr`.
      border: "valid" averages where the window lies within the frame, as the paper and scikit-image do;
        "reflect" averages over the whole frame, mirrored at its edges, as torchmetrics does.

    Returns:
      [...]; 1 where the two are equal.

    Raises:
      UserError: as `psnr`, or the frames are smaller than the window.
    """
    return _similarity(clip, reference, data_range, (1.0,), border, "SSIM")


def ms_ssim(
    clip: np.ndarray,
    reference: np.ndarray,
    data_range: float = 255.0,
    weights: Sequence[float] = MS_SSIM_WEIGHTS,
    border: Border = "valid",
) -> np.ndarray | float:
    """Multi-scale structural similarity, one a clip: the mean over the clip's frames of the index on luma.

    Wang, Simoncelli, Bovik 2003, "Multi-scale structural similarity for image quality assessment", eq. 7: contrast
    and structure at every scale, brightness at the coarsest, each to the power of its weight; a scale halves the one
    before by means of 2 x 2 pixels. Negative factors count as 0.

    Args:
      clip, reference, data_range, border: as `ssim`; "reflect" concerns the coarsest scale.
      weights: one for each scale, from the finest; frames are at least 11 * 2^(scales - 1) pixels high and wide
        (`ms_ssim_scales` says how many fit).

    Returns:
      [...]; 1 where the two are equal.

    Raises:
      UserError: as `psnr`, or the frames are too small for so many scales.
    """
    return _similarity(clip, reference, data_range, tuple(weights), border, "MS-SSIM")


def ms_ssim_scales(height: int, width: int) -> tuple[float, ...]:
    """Weights of as many scales as fit, at most five, with a sum of 1; of fewer than five a variant, to be named so."""
    count = max(1, min(len(MS_SSIM_WEIGHTS), (min(height, width) // WINDOW).bit_length()))
    if count == len(MS_SSIM_WEIGHTS):
        return MS_SSIM_WEIGHTS
    kept = MS_SSIM_WEIGHTS[:count]
    return tuple(weight / sum(kept) for weight in kept)


def frame_blocks(clips: Sequence[np.ndarray], pixels: int = PIXELS) -> Iterator[tuple[int, list[np.ndarray]]]:
    """The frames of clips [F, Y, X, C] block by block: (how many of the block are frames, the blocks as they are).

    Blocks have one shape, the last is padded: one program a frame size, and a frame's figure never depends on
    which others are measured with it. A block is of some `pixels` at most.
    """
    frames, height, width = clips[0].shape[:3]
    size = max(1, min(pixels // (height * width), _FRAMES))
    for start in range(0, frames, size):
        parts = [clip[start : start + size] for clip in clips]
        short = size - len(parts[0])
        pad = [(0, short)] + [(0, 0)] * 3
        yield len(parts[0]), [np.pad(part, pad) if short else part for part in parts]


def _similarity(
    clip: np.ndarray,
    reference: np.ndarray,
    data_range: float,
    weights: tuple[float, ...],
    border: Border,
    name: str,
) -> np.ndarray | float:
    clip, reference = _pair(clip, reference, cast=False)
    *clips, frames, height, width, channels = clip.shape
    least = WINDOW << (len(weights) - 1)
    if min(height, width) < least:
        scales = f" for {len(weights)} scales" if len(weights) > 1 else ""
        raise UserError(
            f"{name} needs frames of at least {least} x {least} pixels{scales}, not {(height, width)}."
        )
    each = [array.reshape(-1, height, width, channels) for array in (clip, reference)]
    rows = []
    for count, block in frame_blocks(each):
        scales = _block_similarity(*block, float(data_range), len(weights), border)
        # Sums of rows in float64: those of float32 lose digits over large frames.
        means = [np.asarray(scale, np.float64)[:count].mean(1) for scale in scales]
        if len(weights) > 1:
            means = [np.maximum(mean, 0) ** weight for mean, weight in zip(means, weights, strict=True)]
        rows.append(np.prod(means, axis=0))
    result = np.concatenate(rows).reshape(*clips, frames).mean(-1)
    return result if clips else float(result)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _block_similarity(
    clip: jax.Array, reference: jax.Array, data_range: float, scales: int, border: Border
) -> list[jax.Array]:
    """For each scale the index's means over rows, f[F,Y], of frames f[F,Y,X,C]; the last scale's has brightness."""
    # Around zero, where float32 is finest: variances are differences of squares.
    a, b = (to_luma(each) - data_range / 2 for each in (clip, reference))
    means = []
    for scale in range(scales):
        # Else it is computed again for each of the window's pixels.
        a, b = jax.lax.optimization_barrier((a, b))
        means.append(_scale_similarity(a, b, data_range, scale == scales - 1, border))
        a, b = _halve(a), _halve(b)
    return means


def _scale_similarity(
    a: jax.Array, b: jax.Array, data_range: float, brightness: bool, border: Border
) -> jax.Array:
    """The mean over each row of contrast and structure, and of brightness where asked; a and b are around zero."""
    if brightness and border == "reflect":
        pad = ((0, 0), *((WINDOW // 2, WINDOW // 2),) * 2)
        a, b = (jnp.pad(each, pad, "reflect") for each in (a, b))
    # 2 (cov + c) / (var_a + var_b + 2 c) is 1 - var(a - b) / (var_a + var_b + 2 c): exactly 1 of equal frames.
    mean_a, mean_b, square_a, square_b, squared = _window(jnp.stack([a, b, a * a, b * b, (a - b) ** 2]))
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    apart = (mean_a - mean_b) ** 2
    variances = square_a - mean_a**2 + square_b - mean_b**2
    index = 1 - (squared - apart) / (variances + c2)
    if brightness:
        mean_a, mean_b = mean_a + data_range / 2, mean_b + data_range / 2
        index *= 1 - apart / (mean_a**2 + mean_b**2 + c1)
    return 1 + jnp.mean(index - 1, axis=-1)


def _window(images: jax.Array) -> jax.Array:
    """The Gaussian mean at every place where the whole window lies within the image.

    Shifted images are weighted and added: one loop, which is nine times as fast as a convolution on CPUs.
    """
    gaussian = np.exp(-0.5 * ((np.arange(WINDOW) - WINDOW // 2) / _SIGMA) ** 2)
    gaussian = (gaussian / gaussian.sum()).tolist()
    for axis in (images.ndim - 1, images.ndim - 2):
        size = images.shape[axis] - WINDOW + 1
        shifted = [jax.lax.slice_in_dim(images, k, k + size, axis=axis) for k in range(WINDOW)]
        images = sum((weight * each for weight, each in zip(gaussian, shifted, strict=True)), jnp.float32(0))
    return images


def _halve(images: jax.Array) -> jax.Array:
    """Means of 2 x 2 pixels; an odd last row or column is left out."""
    count, height, width = images.shape
    even = images[:, : height // 2 * 2, : width // 2 * 2]
    return even.reshape(count, height // 2, 2, width // 2, 2).mean((2, 4))


def to_luma(clip: jax.Array) -> jax.Array:
    """Rec. 709's luma f[...,Y,X] of frames [...,Y,X,C]; of one channel the channel itself."""
    clip = clip.astype(jnp.float32)
    if clip.shape[-1] == 1:
        return clip[..., 0]
    return sum((float(weight) * clip[..., i] for i, weight in enumerate(LUMA)), jnp.float32(0))


def _pair(clip: np.ndarray, reference: np.ndarray, cast: bool = True) -> tuple[np.ndarray, np.ndarray]:
    clip, reference = np.asarray(clip), np.asarray(reference)
    if clip.shape != reference.shape or clip.ndim < 4 or clip.shape[-1] not in (1, 3):
        raise UserError(
            f"Two clips [..., T, Y, X, C] of one shape are compared, C = 1 or 3, "
            f"not {list(clip.shape)} with {list(reference.shape)}."
        )
    check_finite(clip, "A clip that is compared")
    check_finite(reference, "The clip that it is compared with")
    return (clip.astype(np.float64), reference.astype(np.float64)) if cast else (clip, reference)


def check_finite(clip: np.ndarray, name: str) -> None:
    """Raises UserError where a value of a clip [..., T, Y, X, C] is NaN or infinite, with the number of its frame."""
    if np.issubdtype(clip.dtype, np.integer):
        return
    bad = ~np.isfinite(clip).all(axis=(-3, -2, -1))
    if bad.any():
        frame = int(np.argwhere(bad)[0, -1])
        raise UserError(
            f"{name} has values that are no finite numbers (NaN or infinity) in {int(bad.sum())} of its frames, "
            f"first in frame {frame}: they can't be measured; look at what wrote them."
        )
