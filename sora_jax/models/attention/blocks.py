"""Which pairs of blocks of a packed sequence share a segment: the others are skipped by the kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sora_jax.axes import SegmentIds

CHECKPOINT = "attention"
"""Name of what kernels keep for the backward pass: the result and a log-sum-exp a token, not worth recomputing."""


def overlapping_blocks(segment_ids_bn: SegmentIds, block: int, other: int | None = None) -> jax.Array:
    """bool[B,G,J]: pairs of blocks that may hold tokens of one segment; a block always overlaps itself.

    Compares each block's smallest and largest id: exact where segments are contiguous, as packing places them, and
    otherwise some pairs too many, which the kernels mask.

    Args:
      segment_ids_bn: 0 is padding.
      block: tokens of the first of a pair; it divides N.
      other: those of the second; None is as many.
    """
    other = other or block
    least, most = _range(segment_ids_bn, block)
    other_least, other_most = _range(segment_ids_bn, other)
    share = (least[:, :, None] <= other_most[:, None]) & (other_least[:, None] <= most[:, :, None])
    start, other_start = jnp.arange(least.shape[1])[:, None] * block, jnp.arange(other_least.shape[1]) * other
    return share | (start < other_start + other) & (other_start < start + block)


def masked_block_ranges(segment_ids_bn: SegmentIds, block: int, other: int) -> jax.Array:
    """int32[B,G,4]: for each block of `block` tokens the range of blocks of `other` tokens that it attends to.

    It is [first, plain), [plain, mixed) and [mixed, last): blocks that share a segment with it, and some that don't
    where segments aren't contiguous; in the middle every token of both is of one segment, so no mask is needed.

    Args:
      segment_ids_bn: as in `overlapping_blocks`.
    """
    share = overlapping_blocks(segment_ids_bn, block, other)
    J = share.shape[2]
    first, last = share.argmax(2), J - share[:, :, ::-1].argmax(2)
    one, other_one = (segment_ids_bn.reshape(len(share), -1, size) for size in (block, other))
    same = (one.min(2) == one.max(2))[:, :, None] & (other_one.min(2) == other_one.max(2))[:, None]
    same &= (one[:, :, None, 0] == other_one[:, None, :, 0]) & share
    plain = jnp.where(same.any(2), same.argmax(2), last)
    ended = ~same & (jnp.arange(J) > plain[:, :, None])
    mixed = jnp.where(ended.any(2), jnp.minimum(ended.argmax(2), last), last)
    return jnp.stack([first, plain, mixed, last], axis=-1).astype(jnp.int32)


def _range(segment_ids_bn: SegmentIds, block: int) -> tuple[jax.Array, jax.Array]:
    """Smallest and largest id of each block, [B,G], without padding."""
    ids = segment_ids_bn.reshape(len(segment_ids_bn), -1, block)
    return jnp.where(ids > 0, ids, jnp.iinfo(jnp.int32).max).min(2), ids.max(2)
