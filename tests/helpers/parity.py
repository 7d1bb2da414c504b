"""What tests of open models share: weights by name, and errors relative to the deviation of what is expected."""

import importlib.util
import pathlib
from collections.abc import Sequence

import numpy as np

_PATH = pathlib.Path(__file__).parents[2] / "tools" / "parity" / "draw.py"
_SPEC = importlib.util.spec_from_file_location("parity_draw", _PATH)
_MODULE = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_MODULE)
draw = _MODULE.draw


def draw_all(names: Sequence[tuple[str, Sequence[int]]]) -> dict[str, np.ndarray]:
    """Weights of an original's parameters, as the parity kit drew them."""
    return {name: draw(name, tuple(shape)) for name, shape in names}


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest error, in standard deviations of what is expected."""
    return float(np.abs(np.asarray(got) - expected).max() / expected.std())
