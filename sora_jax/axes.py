"""The alphabet: one letter per axis, the same in names, einsums, docstrings, annotations and shardings.

B packed sequences · N token positions · M text positions · K segments · S distinct conditions (each per sequence) ·
P numbers a patch · D width · H heads · F width of a head · E text width · L layers ·
T, Y, X, C video frames, height, width, channels · t, y, x, c latent frames, height, width, channels.
"""

from __future__ import annotations

import jax
from jaxtyping import Float, Int

Pixels = Float[jax.Array, "B T Y X C"]
"""Pixels in [-1, 1]; T = 1 + 4k."""
Latent = Float[jax.Array, "B t y x c"]
Patches = Float[jax.Array, "B N P"]
Coords = Float[jax.Array, "B N 5"]
"""The box a token covers: centre in seconds, y, x; extent in seconds and height."""
SegmentIds = Int[jax.Array, "B N"]
"""1…K; 0 = padding."""
Sigma = Float[jax.Array, "B S"]
