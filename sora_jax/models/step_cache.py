"""First-block caching: a step in which the first layer changes little takes what the other layers added from before.

Transformers of diffusion change their mind slowly: from step to step most of what the layers add is the same. So the
first layer is evaluated, and where what it adds has changed by less than a threshold since the other layers were last
evaluated, what they added then is added again (first-block caching of ParaAttention, Cheng 2024; after TeaCache, Liu et
al. 2024, arXiv:2411.19108). A packed batch skips only where every one of its segments may.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sora_jax.axes import SegmentIds

Layer = Callable[[jax.Array, Any], tuple[jax.Array, None]]


class StepCache(NamedTuple):
    """What one evaluation of a packed batch leaves for the next.

    Attributes:
      first, rest: [B,N,D], what the first layer and all others added when those were last evaluated.
      filled: bool[], whether there was such an evaluation.
      threshold: float[], the largest relative change of a segment's `first` that skips the others.
      skipped: int[], evaluations in which they were.
    """

    first: jax.Array
    rest: jax.Array
    filled: jax.Array
    threshold: jax.Array
    skipped: jax.Array

    @classmethod
    def begin(cls, config: Any, batch_size: int, seq_len: int, text_len: int, threshold: float) -> StepCache:
        """Before the first evaluation of a batch of that shape, all passes of guidance together."""
        shape = batch_size, seq_len + config.text_positions(text_len), config.width
        nothing = jnp.zeros(shape, config.stream_dtype)
        return cls(nothing, nothing, jnp.array(False), jnp.float32(threshold), jnp.int32(0))


def run_layers(
    layer: Layer,
    x_bnd: jax.Array,
    blocks: Any,
    segment_ids_bn: SegmentIds,
    policy: Callable[..., Any] | None,
    cache: StepCache | None = None,
) -> tuple[jax.Array, StepCache | None]:
    """x through a stack of layers, and the cache for the next evaluation where one is given.

    Args:
      layer: takes x and a block's parameters, as `jax.lax.scan` has it.
      blocks: parameters with a leading axis of layers.
      segment_ids_bn: of the positions, in x's order; 0 is padding.
      policy: of what the backward pass keeps, of `dit_config.POLICIES`; None: everything. With a cache there is none.
    """
    if cache is not None:
        return _run_cached(layer, x_bnd, blocks, segment_ids_bn, cache)
    if policy is not None:
        layer = jax.checkpoint(layer, policy=policy)
    return jax.lax.scan(layer, x_bnd, blocks)[0], None


def _run_cached(
    layer: Layer, x_bnd: jax.Array, blocks: Any, segment_ids_bn: SegmentIds, cache: StepCache
) -> tuple[jax.Array, StepCache]:
    count = len(jax.tree.leaves(blocks)[0])
    # Indexed inside of the loop, as a scan does: a slice of all but the first would be a copy of the model.
    take = lambda i: jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), blocks)
    x = layer(x_bnd, take(0))[0]
    first = x - x_bnd
    change = _relative_change(first, cache.first, segment_ids_bn)
    is_skipped = cache.filled & (change < cache.threshold)

    def evaluate() -> StepCache:
        out = jax.lax.fori_loop(1, count, lambda i, x: layer(x, take(i))[0], x)
        return cache._replace(first=first, rest=out - x, filled=jnp.array(True))

    kept = jax.lax.cond(is_skipped, lambda: cache._replace(skipped=cache.skipped + 1), evaluate)
    return x + kept.rest, kept


def _relative_change(now_bnd: jax.Array, before_bnd: jax.Array, segment_ids_bn: SegmentIds) -> jax.Array:
    """The largest over the segments of Σ|now − before| / Σ|before|, float[]."""
    size = lambda values: jnp.abs(values.astype(jnp.float32)).mean(-1)
    count = segment_ids_bn.shape[1] + 1  # more than there are segments
    total = jax.vmap(lambda values, ids: jax.ops.segment_sum(values, ids, count)[1:])
    changed, whole = (total(size(values), segment_ids_bn) for values in (now_bnd - before_bnd, before_bnd))
    return jnp.max(changed / jnp.maximum(whole, 1e-30))
