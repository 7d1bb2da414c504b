"""Five segments of every kind in a packed batch of two sequences, and a transformer in which no parameter is zero."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from helpers.packed import pack_segments
from helpers.tiny_batch import wave
from sora_jax.models.dit import DiT
from sora_jax.models.dit_config import DiTConfig
from sora_jax.tokens.packing import PackedBatch, Placement, Segment
from sora_jax.tokens.patches import coordinates

CONFIG = DiTConfig(
    size="",
    width=32,
    layers=2,
    heads=2,
    mlp_ratio=2,
    channels=2,
    text_width=6,
    dtype="float32",
    attention="reference",
)
N, M, K = 16, 6, 3
#        latent grid, words, conditioning tokens
SHAPES = [((3, 4, 4), 3, 4), ((1, 4, 4), 4, 0), ((1, 4, 6), 0, 0), ((2, 2, 2), 2, 1), ((1, 2, 2), 1, 0)]
SIGMAS = (0.9, 0.2, 0.55, 0.4, 0.7)


def make_segments() -> list[Segment]:
    segments = []
    for i, (grid, words, given) in enumerate(SHAPES):
        coords = coordinates(grid, CONFIG.patch, fps=8.0)
        n = len(coords)
        segments.append(
            Segment(
                patches=wave(n, CONFIG.patch_width, pitch=1 + 0.1 * i),
                coords=coords,
                init_sigma=(np.arange(n) >= given).astype(np.float32),
                caption_time=np.zeros(n, np.float32),
                text=wave(words, CONFIG.text_width, pitch=2 + 0.1 * i),
                text_time=np.arange(words, dtype=np.float32) / 2,
                reference=wave(n, 2 * (CONFIG.patch_width + 1), pitch=3 + 0.1 * i),
            )
        )
    return segments


def make_dit(config: DiTConfig = CONFIG) -> DiT:
    """A model in which no parameter is zero, so that every layer matters."""
    shapes = jax.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda x: wave(*x.shape) / np.sqrt(x.shape[-2] if x.ndim > 1 else 4), shapes)


def velocity(model: DiT, batch: PackedBatch, sigma: Any) -> jax.Array:
    return model(batch.patches, batch, sigma)


def sigma_table(sigmas: Sequence[float], placements: Sequence[Placement], batch: PackedBatch) -> np.ndarray:
    """Every entry of a segment has the segment's level; those that belong to none have one that must not matter."""
    table = np.full(batch.condition_segment_ids.shape, 0.33, np.float32)
    table[:, 0] = 0
    for sigma, place in zip(sigmas, placements, strict=True):
        table[place.row, batch.condition_segment_ids[place.row] == place.segment_id] = sigma
    return table


def pulled_sum(
    model: DiT, batch: PackedBatch, sigma: Any, weights: Any
) -> tuple[jax.Array, tuple[DiT, jax.Array]]:
    """The velocity, and the gradient of Σ weights · velocity in the parameters and in the patches."""

    def weighed(model: DiT, patches: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = velocity(model, dataclasses.replace(batch, patches=patches), sigma)
        return jnp.sum(out * weights), out

    (_, out), gradients = jax.value_and_grad(weighed, argnums=(0, 1), has_aux=True)(model, batch.patches)
    return out, gradients


forward, forward_backward = jax.jit(velocity), jax.jit(pulled_sum)
SEGMENTS = make_segments()
BATCH, PLACES = pack_segments(SEGMENTS, N, M, K)
TABLE = sigma_table(SIGMAS, PLACES, BATCH)


def unrolled(body: Callable, carry: Any, layers: Any) -> tuple[Any, None]:
    for i in range(len(jax.tree.leaves(layers)[0])):
        carry, _ = body(carry, jax.tree.map(lambda x, i=i: x[i], layers))
    return carry, None
