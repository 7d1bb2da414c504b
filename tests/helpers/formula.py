"""Weights and pictures by a formula, without files: the same in tests and in scripts that run other libraries."""

import zlib
from collections.abc import Mapping

import numpy as np


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers in (-1, 1) without a pattern, another set for each name: f64[shape]."""
    phase = zlib.crc32(name.encode()) % 1000
    return np.modf(np.sin(np.arange(int(np.prod(shape))) * 12.9898 + phase) * 43758.5453)[0].reshape(shape)


def weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """A state dict whose activations neither vanish nor grow much, f32, by PyTorch's names of its tensors."""
    out = {}
    for name, shape in shapes.items():
        numbers = uniform(name, tuple(shape))
        if name.endswith("running_var"):
            numbers = 1 + 0.5 * np.abs(numbers)
        elif name.startswith("lin"):  # of LPIPS, never negative
            numbers = np.abs(numbers)
        elif len(shape) > 1:
            numbers = numbers * np.sqrt(6 / np.prod(shape[1:]))
        elif name.endswith("weight"):
            numbers = 1 + 0.1 * numbers
        else:
            numbers = 0.1 * numbers
        out[name] = np.asarray(numbers, np.float32)
    return out


def pictures(count: int, height: int, width: int, noise: float = 20.0) -> np.ndarray:
    """Waves of colour with noise on them: uint8[count,height,width,3]."""
    t, y, x = np.mgrid[:count, :height, :width].astype(float)
    waves = [128 + 100 * np.sin(x / 5 + t), 128 + 100 * np.cos(y / 7 - t), 128 + 60 * np.sin((x + y) / 9)]
    clean = np.stack(waves, -1)
    return np.clip(clean + noise * uniform("noise", clean.shape), 0, 255).round().astype(np.uint8)
