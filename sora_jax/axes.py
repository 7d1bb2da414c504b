"""The alphabet: one letter per axis, the same in names, einsums, docstrings, annotations and shardings.

B packed sequences · N token positions · M text positions · K segments · S distinct conditions (each per sequence) ·
P numbers a patch · D width · H heads · F width of a head · E text width · L layers ·
T, Y, X, C video frames, height, width, channels · t, y, x, c latent frames, height, width, channels.
"""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Float, Int, Shaped

Array = jax.Array | np.ndarray
Pixels = Float[Array, "B T Y X C"]
"""Pixels in [-1, 1]; T = 1 + 4k."""
Latent = Float[Array, "B t y x c"]
Patches = Float[Array, "B N P"]
Coords = Float[Array, "B N 5"]
"""The box a token covers: centre in seconds, y, x; extent in seconds and height."""
SegmentIds = Int[Array, "B N"]
"""1…K; 0 = padding."""
ConditionIds = Int[Array, "B N"]
"""A token's index into its sequence's conditioning table, of length S."""
Sigma = Float[Array, "B S"]
PerCondition = Shaped[Array, "B S"]
"""Anything of which each condition of a sequence has one."""
PerToken = Shaped[Array, "B N"]
Heads = Float[Array, "B N H F"]
"""Queries, keys, values."""

# Of one clip, before it is packed: n tokens, or m at each of t times.
ClipLatent = Shaped[np.ndarray, "t y x c"]
ClipPatches = Shaped[np.ndarray, "n P"]
TimePatches = Float[np.ndarray, "t m P"]
TimeSigma = Float[np.ndarray, "t m"]
Seconds = Float[np.ndarray, "t"]
References = Float[np.ndarray, "t m 2*(P+1)"]
"""See `patches.reference_patches`."""
