"""Canvases without a model, and clips of which some frames are given."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from sora_jax.tokens.canvas import Canvas
from sora_jax.tokens.spans import FRAMES_PER_LATENT

masks = st.lists(st.booleans(), min_size=1, max_size=40).map(np.array)


def make_plain(start: np.ndarray, ends: np.ndarray | None = None, fps: float = 8.0) -> Canvas:
    """A canvas of one stream, whose every number is another one."""
    t, y, x = start.shape
    latent = np.arange(t * y * x * 3, dtype=np.float32).reshape(t, y, x, 3)
    ends = FRAMES_PER_LATENT * np.arange(t) if ends is None else ends
    return Canvas(latent, start.astype(np.float32), ends, np.arange(t) == 0, fps)
