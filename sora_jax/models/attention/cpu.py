"""Attention on CPUs: pairs of blocks that share a run, one after another, and nothing else.

Rows are cut into blocks where runs begin, not at multiples of some number. A run that fits a block whole has one to
itself, of the smallest size that holds it; long ones are cut into large blocks, which have the better matrix products,
and a small one or a few for the rest; what is short lies in small blocks together. A loop over blocks walks, for each,
those it shares a run with, with a running softmax (Milakov and Gimelshein 2018; Dao et al. 2022, algorithm 1); another
walks back. So work grows with Σ n² over runs, not with N² of the row, no [N, N] array is ever written, and the number
of blocks, which differs from batch to batch, compiles nothing anew.
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

# Tokens of a block: large, those for runs that fit them whole, small (experiments/LOG.md).
SIZES = (512, 384, 256, 128)
_NOTHING = -1e30  # a masked logit
_LOWEST = -1e20  # below any real logit, above a masked one


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["runs", "start", "stop", "count"],
    meta_fields=["size", "whole", "single"],
)
@dataclasses.dataclass(frozen=True)
class Blocks:
    """Blocks of one size, in order, over the slots of all rows.

    Attributes:
      runs: int32[n + size], what run a slot is of; -1 where it is none of these blocks'.
      start, stop: int32[G], a block's slots.
      count: int32, how many of the G are real.
      size: the most slots a block may have.
      whole: whether each has all of its run, and so shares none with another.
      single: whether each holds slots of one run alone.
    """

    runs: jax.Array
    start: jax.Array
    stop: jax.Array
    count: jax.Array
    size: int
    whole: bool
    single: bool

    def slots_of(self, block: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Its first slot, and int32[size] of runs; -1 where a slot isn't the block's own."""
        start = self.start[block]
        runs = lax.dynamic_slice_in_dim(self.runs, start, self.size)
        runs = jnp.where(start + jnp.arange(self.size) < self.stop[block], runs, -1)
        # Not to be fused with what uses it: computed anew for each pair of tokens it takes longer than the products.
        return lax.optimization_barrier((start, runs))


def blocked(
    q_bnhf: jax.Array,
    k_bnhf: jax.Array,
    v_bnhf: jax.Array,
    segment_ids_bn: SegmentIds,
    sizes: Sequence[int] = SIZES,
) -> jax.Array:
    """See `dispatch.attend`. Empty slots get zeros. Logits and sums are float32, products are of the inputs' type.

    Args:
      sizes: tokens of a block, falling: see `make_blocks`.
    """
    B, N, H, F = q_bnhf.shape
    dtype = q_bnhf.dtype if q_bnhf.dtype == jnp.bfloat16 else jnp.dtype(jnp.float32)
    kinds = make_blocks(segment_ids_bn, sizes)
    padding = max(blocks.size for blocks in kinds)

    def lay(x_bnhf: jax.Array) -> jax.Array:
        # A block is read whole, past the slots that are its own.
        flat = x_bnhf.astype(dtype).reshape(B * N, H, F).transpose(1, 0, 2)
        return jnp.pad(flat, ((0, 0), (0, padding), (0, 0)))

    torn = [blocks for blocks in kinds if not blocks.whole]
    walks = tuple(
        () if own.whole else tuple((others, *block_ranges(own, others)) for others in torn) for own in kinds
    )
    out = _attend(lay(q_bnhf / math.sqrt(F)), lay(k_bnhf), lay(v_bnhf), kinds, walks)
    return out[:, : B * N].transpose(1, 0, 2).reshape(B, N, H, F).astype(q_bnhf.dtype)


def make_blocks(segment_ids_bn: SegmentIds, sizes: Sequence[int]) -> tuple[Blocks, ...]:
    """Blocks of each size that rows of this length can fill; together they have every slot of a run once.

    Args:
      segment_ids_bn: in any order, but runs that are torn cost more.
      sizes: falling. The first is that of blocks that a long run is cut into, the last that of blocks which hold the
        rests of long runs, and short runs; a run that fits one between, and no smaller one, has it to itself.
    """
    large, *middle, small = sizes
    B, N = segment_ids_bn.shape
    ordered = jnp.sort(segment_ids_bn, axis=1)
    before, after = (
        jax.vmap(functools.partial(jnp.searchsorted, side=side))(ordered, segment_ids_bn)
        for side in ("left", "right")
    )
    length = (after - before).reshape(-1)
    runs = jnp.where(segment_ids_bn > 0, before + N * jnp.arange(B)[:, None], -1).reshape(-1)
    changes = jnp.append(True, runs[1:] != runs[:-1])
    begin, end = _stretches(changes)
    place = jnp.arange(B * N)
    # A rest that only a large block would hold is worth one.
    worth = middle[0] if middle else small
    full = (end - begin + large - worth - 1) // large * large
    changes |= place - begin == full
    whole = jnp.where(end - begin == length, length, 0)
    kinds, free = [], runs
    for size, next_size in zip(middle, sizes[2:], strict=True):
        if next_size < N:
            mine = (whole > next_size) & (whole <= size)
            single = size < 2 * (next_size + 1)  # no room for two
            kinds.append(_cut_blocks(changes, jnp.where(mine, free, -1), size, whole=True, single=single))
            free = jnp.where(mine, -1, free)
    in_large = place - begin < full
    if worth < N:
        single = large < 2 * (worth + 1)
        kinds.append(_cut_blocks(changes, jnp.where(in_large, free, -1), large, single=single))
    return *kinds, _cut_blocks(changes, jnp.where(in_large, -1, free), small)


def _stretches(changes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of each slot the begin and the end of the stretch that it lies in; a stretch begins where `changes` is true."""
    n = changes.shape[0]
    place = jnp.arange(n)
    begin = lax.cummax(jnp.where(changes, place, 0))
    return begin, lax.cummin(jnp.where(jnp.append(changes[1:], True), place + 1, n), reverse=True)


def _cut_blocks(
    changes: jax.Array, runs: jax.Array, size: int, whole: bool = False, single: bool = False
) -> Blocks:
    """Blocks of at most `size` slots, of which each begins with one that is of a run.

    A block takes whole stretches as long as they fit; a stretch longer than a block is cut.
    """
    n = runs.shape[0]
    place = jnp.arange(n)
    begin, end = _stretches(changes)
    limit = jnp.minimum(place + size, n)
    border = jnp.where(end[limit - 1] <= limit, limit, begin[limit - 1])
    stops = jnp.where(end - place >= size, place + size, border)
    following = jnp.append(lax.cummin(jnp.where(runs >= 0, place, n), reverse=True), n)

    def cut(at: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        start = following[at]
        stop = jnp.where(start < n, stops[jnp.minimum(start, n - 1)], n)
        return stop, (start, stop)

    # What lies between the beginnings of every second block is longer than `size`, or the third would be the second's.
    _, (start, stop) = lax.scan(cut, jnp.zeros((), place.dtype), None, length=2 * (n // size) + 2)
    marked = jnp.pad(runs, (0, size), constant_values=-1)
    return Blocks(marked, start, stop, jnp.count_nonzero(start < n), size, whole, single)


def block_ranges(own: Blocks, others: Blocks) -> tuple[jax.Array, jax.Array]:
    """int32[G] twice: from which of `others` on, and before which, those lie that share a run with each of `own`.

    A run's slots should follow one another; where they don't, blocks lie between that share nothing, and are masked.
    """

    def runs(blocks: Blocks) -> tuple[jax.Array, jax.Array]:
        slots = blocks.start[:, None] + jnp.arange(blocks.size)
        inside = jnp.where(slots < blocks.stop[:, None], blocks.runs[slots], -1)
        return jnp.where(inside < 0, len(blocks.runs), inside).min(1), inside.max(1)

    (least, most), (other_least, other_most) = runs(own), runs(others)
    share = (least[:, None] <= other_most) & (other_least <= most[:, None])
    first, last = jnp.argmax(share, axis=1), share.shape[1] - jnp.argmax(share[:, ::-1], axis=1)
    return first, jnp.where(share.any(1), last, first)


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, kinds: tuple[Blocks, ...], walks: Any) -> jax.Array:
    """[H, n + a block, F]; q is divided by √F; walks[i] are the kinds that kind i may share runs with, and where."""
    return _forward(q, k, v, kinds, walks)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, kinds: tuple[Blocks, ...], walks: Any
) -> tuple[jax.Array, tuple[Any, ...]]:
    state = jnp.zeros_like(q), jnp.zeros(q.shape[:2])
    for own, ways in zip(kinds, walks, strict=True):
        state = lax.fori_loop(0, own.count, functools.partial(_queries, q, k, v, own, ways), state)
    out, lse = (checkpoint_name(x, CHECKPOINT) for x in state)
    return out, (q, k, v, kinds, walks, out, lse)


def _queries(
    q: jax.Array, k: jax.Array, v: jax.Array, own: Blocks, ways: Any, i: jax.Array, state: Any
) -> Any:
    """The result of a block's queries, and the logarithm of their softmax's divisor, put where they belong."""
    start, runs = own.slots_of(i)
    queries = _cut(q, start, own.size)

    def pair(others: Blocks, j: jax.Array, sums: tuple[jax.Array, ...] | None) -> tuple[jax.Array, ...]:
        there, theirs = others.slots_of(j)
        keys, values = _cut(k, there, others.size), _cut(v, there, others.size)
        if own.single:
            # Keys of other runs: one of this run's instead, so that the largest logit needs no mask.
            mine = theirs == runs[0]
            logits = _product(queries, jnp.where(mine[:, None], keys, _cut(k, start, 1)).mT, jnp.float32)
        else:
            mine = _shared(runs, theirs)
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
        kept = jnp.exp(sums[2] - row_max)
        return sums[0] * kept[..., None] + out, sums[1] * kept + total, row_max

    if own.whole:
        out, total, row_max = pair(own, i, None)
    else:
        H, _, F = q.shape
        sums: Any = jnp.zeros((H, own.size, F)), jnp.zeros((H, own.size)), jnp.full((H, own.size), _LOWEST)
        out, total, row_max = _walk(pair, own, ways, i, sums)
    total = jnp.where(runs < 0, 1.0, total)
    made = out / total[..., None], row_max + jnp.log(total)
    return tuple(_put(old, new, start, runs) for old, new in zip(state, made, strict=True))


def _backward(kept: tuple[Any, ...], d_out: jax.Array) -> tuple[Any, ...]:
    q, k, v, kinds, walks, out, lse = kept
    through_sum = jnp.sum(d_out.astype(jnp.float32) * out, axis=-1)
    state = jnp.zeros(q.shape), jnp.zeros_like(k), jnp.zeros_like(v)
    given = q, k, v, d_out, lse, through_sum
    for own, ways in zip(kinds, walks, strict=True):
        state = lax.fori_loop(0, own.count, functools.partial(_keys, given, own, ways), state)
    to_q, to_k, to_v = state
    return to_q.astype(q.dtype), to_k, to_v, None, None


def _keys(given: Any, own: Blocks, ways: Any, j: jax.Array, state: Any) -> Any:
    """What a block's keys and values get back, and what they give their queries."""
    q, k, v, d_out, lse, through_sum = given
    start, runs = own.slots_of(j)
    keys, values = _cut(k, start, own.size), _cut(v, start, own.size)

    def pair(others: Blocks, i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        to_q, to_k, to_v = sums
        there, theirs = others.slots_of(i)
        cut = functools.partial(_cut, start=there, size=others.size)
        logits = _product(cut(q), keys.mT, jnp.float32) - cut(lse)[..., None]
        weights = jnp.where(_shared(theirs, runs), jnp.exp(logits), 0.0)
        through = _product(cut(d_out), values.mT, jnp.float32) - cut(through_sum)[..., None]
        to_logits = (weights * through).astype(q.dtype)
        to_q = lax.dynamic_update_slice_in_dim(to_q, cut(to_q) + _product(to_logits, keys), there, 1)
        to_k = to_k + _product(to_logits.mT, cut(q))
        return to_q, to_k, to_v + _product(weights.astype(q.dtype).mT, cut(d_out))

    to_q, to_k, to_v = state
    sums: Any = to_q, jnp.zeros(keys.shape), jnp.zeros(keys.shape)
    to_q, own_k, own_v = _walk(pair, own, ways, j, sums)
    return to_q, _put(to_k, own_k, start, runs), _put(to_v, own_v, start, runs)


def _walk(pair: Callable[..., Any], own: Blocks, ways: Any, block: jax.Array, sums: Any) -> Any:
    """`pair` with every block that shares a run with this one; with itself alone where it has all of its runs."""
    if own.whole:
        return pair(own, block, sums)
    for others, first, last in ways:
        sums = lax.fori_loop(first[block], last[block], functools.partial(pair, others), sums)
    return sums


def _shared(runs: jax.Array, others: jax.Array) -> jax.Array:
    return (runs[:, None] == others) & (runs >= 0)[:, None]


def _cut(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, start, size, 1)


def _put(x: jax.Array, block: jax.Array, start: jax.Array, runs: jax.Array) -> jax.Array:
    """x with a block's own slots in place of what was there."""
    own = (runs >= 0).reshape(-1, *(1,) * (x.ndim - 2))
    new = jnp.where(own, block.astype(x.dtype), _cut(x, start, len(runs)))
    return lax.dynamic_update_slice_in_dim(x, new, start, 1)


def _product(a: jax.Array, b: jax.Array, dtype: Any = None) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=dtype)


_attend.defvjp(_forward, _backward)
