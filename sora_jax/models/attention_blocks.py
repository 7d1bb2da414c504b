"""Which blocks of a packed row have anything to say to each other: what lets kernels leave work out."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sora_jax.axes import SegmentIds

CHECKPOINT = "attention"
"""What kernels keep for the backward pass bears this name: a result and a number a token, not worth computing again."""


def sharing(segment_ids_bn: SegmentIds, block: int) -> jax.Array:
    """bool[B,G,G]: pairs of blocks of `block` tokens that may hold tokens of one run; a block always has itself.

    Told by each block's smallest and largest id: exact where ids follow one another, as packing lays them, and else
    some pairs too many, which the kernels mask.

    Args:
      segment_ids_bn: 0 is an empty slot; `block` divides their number a row.
    """
    ids = segment_ids_bn.reshape(len(segment_ids_bn), -1, block)
    least = jnp.where(ids > 0, ids, jnp.iinfo(jnp.int32).max).min(2)
    most = ids.max(2)
    share = (least[:, :, None] <= most[:, None]) & (least[:, None] <= most[:, :, None])
    return share | jnp.eye(ids.shape[1], dtype=bool)
