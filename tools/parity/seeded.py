"""Random weights by name: the same on both sides of a comparison, so none are stored."""

from __future__ import annotations

import math
import zlib

import numpy as np


def draw(name: str, shape: tuple[int, ...] | list[int]) -> np.ndarray:
    """float32 array for a parameter of the original's name and shape.

    Matrices and kernels (of two or more axes with more than one number each) have deviation 1/√(fan in), so that
    activations stay of order one; weights of norms are near 1; biases and tables have deviation 0.1.
    """
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    values = generator.standard_normal(tuple(shape), np.float32)
    wide = [side for side in shape if side > 1]
    if "norm" in name.lower() or name.endswith("gamma"):
        is_bias = name.endswith("bias")
        return (0.1 * values if is_bias else 1 + 0.1 * values).astype(np.float32)
    if len(wide) < 2 or name.endswith(("bias", "scale_shift_table")):
        return np.asarray(0.1 * values, np.float32)  # of one number too
    return (values / math.sqrt(math.prod(shape[1:]))).astype(np.float32)
