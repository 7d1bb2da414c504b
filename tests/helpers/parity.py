"""What tests of open models share: weights by name, and errors relative to the deviation of what is expected."""

from collections.abc import Sequence

import numpy as np
from seeded import draw


def draw_all(names: Sequence[tuple[str, Sequence[int]]], prefix: str = "") -> dict[str, np.ndarray]:
    """Weights of an original's parameters, as the parity kit drew them, under names with that prefix."""
    return {name: draw(prefix + name, tuple(shape)) for name, shape in names}


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest error, in standard deviations of what is expected."""
    return float(np.abs(np.asarray(got) - expected).max() / expected.std())


def psnr(frames: np.ndarray, expected: np.ndarray) -> float:
    """Of uint8 frames against floats of 0 to 1."""
    return float(-10 * np.log10(np.square(frames / 255.0 - expected).mean()))
