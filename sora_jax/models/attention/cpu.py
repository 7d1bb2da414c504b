"""Attention on CPUs: pairs of blocks that share a segment, one after another, and nothing else.

Sequences are cut into blocks where segments begin, not at multiples of some number. A segment that fits a block whole
has one to itself, of the smallest size that holds it; long ones are cut into large blocks, whose matrix products are
faster, and a small one or a few for the rest; short ones share small blocks. For each block a loop goes over those it
shares a segment with, with an online softmax (Milakov and Gimelshein 2018; Dao et al. 2022, algorithm 1); the backward
pass is another such loop. So work grows with Σ n² over segments, not with N² of the sequence, no [N, N] array is ever
written, and the number of blocks, which differs from batch to batch, is no part of the compiled program's shapes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from sora_jax.axes import SegmentIds
from sora_jax.models.attention.blocks import CHECKPOINT

# Tokens of a block: large, those for segments that fit them whole, small (experiments/LOG.md).
SIZES = (512, 384, 256, 128)
_NOTHING = -1e30  # a masked logit
_LOWEST = -1e20  # below any real logit, above a masked one


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["segments", "start", "stop", "count"],
    meta_fields=["size", "whole", "single"],
)
@dataclasses.dataclass(frozen=True)
class Blocks:
    """Blocks of one size, in order, over the positions of all sequences.

    Attributes:
      segments: int32[n + size], the segment of a position; -1 where it is in none of these blocks.
      start, stop: int32[G], a block's positions.
      count: int32, how many of the G are real.
      size: the most positions a block may have.
      whole: whether each has all of its segment, and so shares none with another.
      single: whether each holds positions of one segment alone.
    """

    segments: jax.Array
    start: jax.Array
    stop: jax.Array
    count: jax.Array
    size: int
    whole: bool
    single: bool

    def positions_of(self, block: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Its first position, and int32[size] of segments; -1 where a position isn't the block's own."""
        start = self.start[block]
        segments = lax.dynamic_slice_in_dim(self.segments, start, self.size)
        segments = jnp.where(start + jnp.arange(self.size) < self.stop[block], segments, -1)
        # Not to be fused with what uses it: recomputed for each pair of tokens it takes longer than the products.
        return lax.optimization_barrier((start, segments))


def blocked(
    q_bnhf: jax.Array,
    k_bnhf: jax.Array,
    v_bnhf: jax.Array,
    segment_ids_bn: SegmentIds,
    sizes: Sequence[int] = SIZES,
) -> jax.Array:
    """See `dispatch.attend`. Padding gets zeros. Logits and sums are float32, products are of the inputs' type.

    Args:
      sizes: tokens of a block, falling: see `make_blocks`.
    """
    B, N, H, F = q_bnhf.shape
    dtype = q_bnhf.dtype if q_bnhf.dtype == jnp.bfloat16 else jnp.dtype(jnp.float32)
    block_sets = make_blocks(segment_ids_bn, sizes)
    padding = max(blocks.size for blocks in block_sets)

    def flatten(x_bnhf: jax.Array) -> jax.Array:
        # A block is read whole, past its own positions.
        flat = x_bnhf.astype(dtype).reshape(B * N, H, F).transpose(1, 0, 2)
        return jnp.pad(flat, ((0, 0), (0, padding), (0, 0)))

    shared = [blocks for blocks in block_sets if not blocks.whole]
    all_ranges = tuple(
        () if own.whole else tuple((others, *block_ranges(own, others)) for others in shared)
        for own in block_sets
    )
    out = _attend(flatten(q_bnhf / math.sqrt(F)), flatten(k_bnhf), flatten(v_bnhf), block_sets, all_ranges)
    return out[:, : B * N].transpose(1, 0, 2).reshape(B, N, H, F).astype(q_bnhf.dtype)


def make_blocks(segment_ids_bn: SegmentIds, sizes: Sequence[int]) -> tuple[Blocks, ...]:
    """Blocks of each size that sequences of this length can fill; together they have every position of a segment once.

    Args:
      segment_ids_bn: in any order, but segments that aren't contiguous cost more.
      sizes: falling. The first is that of blocks that a long segment is cut into, the last that of blocks which hold
        the rests of long segments, and short ones; a segment that fits one between, and no smaller one, has it alone.
    """
    large, *middle, small = sizes
    B, N = segment_ids_bn.shape
    ordered = jnp.sort(segment_ids_bn, axis=1)
    before, after = (
        jax.vmap(functools.partial(jnp.searchsorted, side=side))(ordered, segment_ids_bn)
        for side in ("left", "right")
    )
    length = (after - before).reshape(-1)
    segments = jnp.where(segment_ids_bn > 0, before + N * jnp.arange(B)[:, None], -1).reshape(-1)
    changes = jnp.append(True, segments[1:] != segments[:-1])
    begin, end = _contiguous_ranges(changes)
    place = jnp.arange(B * N)
    # A rest that only a large block would hold gets one.
    worth = middle[0] if middle else small
    full = (end - begin + large - worth - 1) // large * large
    changes |= place - begin == full
    whole = jnp.where(end - begin == length, length, 0)
    block_sets, free = [], segments
    for size, next_size in zip(middle, sizes[2:], strict=True):
        if next_size < N:
            mine = (whole > next_size) & (whole <= size)
            single = size < 2 * (next_size + 1)  # no room for two
            block_sets.append(
                _cut_blocks(changes, jnp.where(mine, free, -1), size, whole=True, single=single)
            )
            free = jnp.where(mine, -1, free)
    in_large = place - begin < full
    if worth < N:
        single = large < 2 * (worth + 1)
        block_sets.append(_cut_blocks(changes, jnp.where(in_large, free, -1), large, single=single))
    return *block_sets, _cut_blocks(changes, jnp.where(in_large, -1, free), small)


def _contiguous_ranges(changes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Begin and end of the range that each position is in; a range begins where `changes` is true."""
    n = changes.shape[0]
    place = jnp.arange(n)
    begin = lax.cummax(jnp.where(changes, place, 0))
    return begin, lax.cummin(jnp.where(jnp.append(changes[1:], True), place + 1, n), reverse=True)


def _cut_blocks(
    changes: jax.Array, segments: jax.Array, size: int, whole: bool = False, single: bool = False
) -> Blocks:
    """Blocks of at most `size` positions, each of which begins with one that is of a segment.

    A block takes whole ranges as long as they fit; a range longer than a block is cut.
    """
    n = segments.shape[0]
    place = jnp.arange(n)
    begin, end = _contiguous_ranges(changes)
    limit = jnp.minimum(place + size, n)
    border = jnp.where(end[limit - 1] <= limit, limit, begin[limit - 1])
    stops = jnp.where(end - place >= size, place + size, border)
    following = jnp.append(lax.cummin(jnp.where(segments >= 0, place, n), reverse=True), n)

    def cut(at: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        start = following[at]
        stop = jnp.where(start < n, stops[jnp.minimum(start, n - 1)], n)
        return stop, (start, stop)

    # What is between the beginnings of every second block is longer than `size`, or the third would be the second's.
    _, (start, stop) = lax.scan(cut, jnp.zeros((), place.dtype), None, length=2 * (n // size) + 2)
    marked = jnp.pad(segments, (0, size), constant_values=-1)
    return Blocks(marked, start, stop, jnp.count_nonzero(start < n), size, whole, single)


def block_ranges(own: Blocks, others: Blocks) -> tuple[jax.Array, jax.Array]:
    """int32[G] twice: first and last + 1 of the `others` that share a segment with each of `own`.

    Segments should be contiguous; where they aren't, some blocks in between share nothing, and are masked.
    """

    def segments(blocks: Blocks) -> tuple[jax.Array, jax.Array]:
        positions = blocks.start[:, None] + jnp.arange(blocks.size)
        inside = jnp.where(positions < blocks.stop[:, None], blocks.segments[positions], -1)
        return jnp.where(inside < 0, len(blocks.segments), inside).min(1), inside.max(1)

    (least, most), (other_least, other_most) = segments(own), segments(others)
    share = (least[:, None] <= other_most) & (other_least <= most[:, None])
    first, last = jnp.argmax(share, axis=1), share.shape[1] - jnp.argmax(share[:, ::-1], axis=1)
    return first, jnp.where(share.any(1), last, first)


@jax.custom_vjp
def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, block_sets: tuple[Blocks, ...], all_ranges: Any
) -> jax.Array:
    """[H, n + a block, F]; q is divided by √F; all_ranges[i] are the sets that set i may share segments with."""
    return _forward(q, k, v, block_sets, all_ranges)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, block_sets: tuple[Blocks, ...], all_ranges: Any
) -> tuple[jax.Array, tuple[Any, ...]]:
    state = jnp.zeros_like(q), jnp.zeros(q.shape[:2])
    for own, ranges in zip(block_sets, all_ranges, strict=True):
        state = lax.fori_loop(0, own.count, functools.partial(_queries, q, k, v, own, ranges), state)
    out, lse = (checkpoint_name(x, CHECKPOINT) for x in state)
    return out, (q, k, v, block_sets, all_ranges, out, lse)


def _queries(
    q: jax.Array, k: jax.Array, v: jax.Array, own: Blocks, ranges: Any, i: jax.Array, state: Any
) -> Any:
    """Updates the result and the log-sum-exp with those of a block's queries."""
    start, segments = own.positions_of(i)
    queries = _cut(q, start, own.size)

    def pair(others: Blocks, j: jax.Array, sums: tuple[jax.Array, ...] | None) -> tuple[jax.Array, ...]:
        there, theirs = others.positions_of(j)
        keys, values = _cut(k, there, others.size), _cut(v, there, others.size)
        if own.single:
            # In place of keys of other segments one of this segment's, so that the largest logit needs no mask.
            mine = theirs == segments[0]
            logits = _product(queries, jnp.where(mine[:, None], keys, _cut(k, start, 1)).mT, jnp.float32)
        else:
            mine = _same_segment(segments, theirs)
            logits = jnp.where(mine, _product(queries, keys.mT, jnp.float32), _NOTHING)
        row_max = logits.max(-1)
        if sums is not None:
            row_max = jnp.maximum(row_max, sums[2])
        weights = jnp.exp(logits - row_max[..., None])
        if own.single:
            weights = jnp.where(mine, weights, 0.0)
        weights = weights.astype(v.dtype)
        out, total = _product(weights, values), weights.sum(-1, dtype=jnp.float32)
        if sums is None:
            return out, total, row_max
        rescale = jnp.exp(sums[2] - row_max)
        return sums[0] * rescale[..., None] + out, sums[1] * rescale + total, row_max

    if own.whole:
        out, total, row_max = pair(own, i, None)
    else:
        H, _, F = q.shape
        sums: Any = jnp.zeros((H, own.size, F)), jnp.zeros((H, own.size)), jnp.full((H, own.size), _LOWEST)
        out, total, row_max = _loop_over_blocks(pair, own, ranges, i, sums)
    total = jnp.where(segments < 0, 1.0, total)
    new_state = out / total[..., None], row_max + jnp.log(total)
    return tuple(_update(old, new, start, segments) for old, new in zip(state, new_state, strict=True))


def _backward(residuals: tuple[Any, ...], d_out: jax.Array) -> tuple[Any, ...]:
    q, k, v, block_sets, all_ranges, out, lse = residuals
    delta = jnp.sum(d_out.astype(jnp.float32) * out, axis=-1)
    state = jnp.zeros(q.shape), jnp.zeros_like(k), jnp.zeros_like(v)
    inputs = q, k, v, d_out, lse, delta
    for own, ranges in zip(block_sets, all_ranges, strict=True):
        state = lax.fori_loop(0, own.count, functools.partial(_keys, inputs, own, ranges), state)
    d_q, d_k, d_v = state
    return d_q.astype(q.dtype), d_k, d_v, None, None


def _keys(inputs: Any, own: Blocks, ranges: Any, j: jax.Array, state: Any) -> Any:
    """Adds the gradients of a block's keys and values, and what these give their queries."""
    q, k, v, d_out, lse, delta = inputs
    start, segments = own.positions_of(j)
    keys, values = _cut(k, start, own.size), _cut(v, start, own.size)

    def pair(others: Blocks, i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        d_q, d_k, d_v = sums
        there, theirs = others.positions_of(i)
        cut = functools.partial(_cut, start=there, size=others.size)
        logits = _product(cut(q), keys.mT, jnp.float32) - cut(lse)[..., None]
        weights = jnp.where(_same_segment(theirs, segments), jnp.exp(logits), 0.0)
        d_weights = _product(cut(d_out), values.mT, jnp.float32) - cut(delta)[..., None]
        d_logits = (weights * d_weights).astype(q.dtype)
        d_q = lax.dynamic_update_slice_in_dim(d_q, cut(d_q) + _product(d_logits, keys), there, 1)
        d_k = d_k + _product(d_logits.mT, cut(q))
        return d_q, d_k, d_v + _product(weights.astype(q.dtype).mT, cut(d_out))

    d_q, d_k, d_v = state
    sums: Any = d_q, jnp.zeros(keys.shape), jnp.zeros(keys.shape)
    d_q, own_d_k, own_d_v = _loop_over_blocks(pair, own, ranges, j, sums)
    return d_q, _update(d_k, own_d_k, start, segments), _update(d_v, own_d_v, start, segments)


def _loop_over_blocks(pair: Callable[..., Any], own: Blocks, ranges: Any, block: jax.Array, sums: Any) -> Any:
    """`pair` with every block that shares a segment with this one; with itself alone where it has whole segments."""
    if own.whole:
        return pair(own, block, sums)
    for others, first, last in ranges:
        sums = lax.fori_loop(first[block], last[block], functools.partial(pair, others), sums)
    return sums


def _same_segment(segments: jax.Array, others: jax.Array) -> jax.Array:
    return (segments[:, None] == others) & (segments >= 0)[:, None]


def _cut(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, start, size, 1)


def _update(x: jax.Array, block: jax.Array, start: jax.Array, segments: jax.Array) -> jax.Array:
    """x with a block's own positions replaced."""
    own = (segments >= 0).reshape(-1, *(1,) * (x.ndim - 2))
    new = jnp.where(own, block.astype(x.dtype), _cut(x, start, len(segments)))
    return lax.dynamic_update_slice_in_dim(x, new, start, 1)


def _product(a: jax.Array, b: jax.Array, dtype: Any = None) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=dtype)


_attend.defvjp(_forward, _backward)
