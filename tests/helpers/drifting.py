"""Small clips of a texture that drifts, and what may be wrong with such: data for tests of distances."""

import functools

import numpy as np
from scipy import ndimage


@functools.cache
def texture() -> np.ndarray:
    """f64[256,256,3] that goes on at its edges."""
    noise = np.random.default_rng(7).standard_normal((256, 256, 3))
    smooth = ndimage.gaussian_filter(noise, (2.5, 2.5, 0), mode="wrap")
    return np.clip(128 + smooth / smooth.std() * 50, 0, 255)


def drifting(seed: int, count: int, frames: int = 16, side: int = 64, speed: float = 3.0) -> np.ndarray:
    """uint8[count,frames,side,side,3]: each begins anywhere and drifts anywhere, `speed` pixels a frame."""
    rng, clips = np.random.default_rng(seed), []
    for _ in range(count):
        start, angle = rng.integers(0, 256, 2), rng.uniform(0, 2 * np.pi)
        step = speed * np.array([np.sin(angle), np.cos(angle)])
        places = [(start + step * t).astype(int) for t in range(frames)]
        clips.append([np.roll(texture(), tuple(-place), (0, 1))[:side, :side] for place in places])
    return np.array(clips).round().astype(np.uint8)


def degraded(clips: np.ndarray) -> dict[str, np.ndarray]:
    """Sets from the nearest to the clips to the furthest, as a sense of video sees them."""
    rng = np.random.default_rng(0)
    return {
        "identical": clips,
        "blur": ndimage.gaussian_filter(clips, (0, 0, 0.4, 0.4, 0)),
        "other": drifting(1, *clips.shape[:3]),
        "shuffled": np.stack([clip[rng.permutation(len(clip))] for clip in clips]),
        "noise": rng.integers(0, 256, clips.shape, np.uint8),
    }
