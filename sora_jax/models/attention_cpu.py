"""Attention on CPUs: pairs of blocks that share a run, one after another, and nothing else.

Rows are cut into blocks where runs begin, not at multiples of some number: a long run into large blocks, which have
the better matrix products, and short runs lie in small blocks together, which waste less. A loop over blocks walks,
for each, those it shares a run with, with a running softmax (Milakov and Gimelshein 2018; Dao et al. 2022, algorithm
1); another walks back. So work grows with Σ n² over runs, not with N² of the row, no [N, N] array is ever written, and
the number of blocks, which differs from batch to batch, compiles nothing anew.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from sora_jax.axes import SegmentIds
from sora_jax.models.attention_blocks import CHECKPOINT

BLOCKS = (512, 128)  # tokens, for runs longer than LONG and for the others (experiments/LOG.md)
LONG = 384
_NOTHING = -1e30  # a masked logit
_LOWEST = -1e20  # below any real logit, above a masked one


class Plan(NamedTuple):
    """Blocks in order, over the slots of all rows, and with which others each shares a run.

    Attributes:
      runs: int32[n + size], what runs are whose, -1 for slots that are none of this plan's business.
      start, stop: int32[G], a block's slots; the first `count` blocks are real.
      first, last: int32[G], from which block on, and before which, those lie that share a run with it.
      count: int32.
    """

    runs: jax.Array
    start: jax.Array
    stop: jax.Array
    first: jax.Array
    last: jax.Array
    count: jax.Array

    def slots_of(self, block: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        """Its first slot, and int32[size] of runs; -1 where a slot isn't the block's own."""
        start = self.start[block]
        runs = lax.dynamic_slice_in_dim(self.runs, start, size)
        return start, jnp.where(start + jnp.arange(size) < self.stop[block], runs, -1)


def blocked(
    q_bnhf: jax.Array,
    k_bnhf: jax.Array,
    v_bnhf: jax.Array,
    segment_ids_bn: SegmentIds,
    blocks: tuple[int, int] = BLOCKS,
    long: int = LONG,
) -> jax.Array:
    """See `attention.attend`. Empty slots get zeros. Logits and sums are float32, products are of the inputs' type.

    Args:
      blocks: tokens of a block, for runs longer than `long` and for the others.
    """
    B, N, H, F = q_bnhf.shape
    dtype = q_bnhf.dtype if q_bnhf.dtype == jnp.bfloat16 else jnp.dtype(jnp.float32)
    runs, lengths = _runs(segment_ids_bn)
    kinds = [(blocks[1], (lengths > 0) & (lengths <= long))]
    if long < N:
        kinds.append((blocks[0], lengths > long))
    plans = tuple(make_plan(runs, mine, size) for size, mine in kinds)
    sizes = tuple(size for size, _ in kinds)

    def lay(x_bnhf: jax.Array) -> jax.Array:
        # A block is read whole, past the slots that are its own.
        flat = x_bnhf.astype(dtype).reshape(B * N, H, F).transpose(1, 0, 2)
        return jnp.pad(flat, ((0, 0), (0, max(sizes)), (0, 0)))

    out = _attend(lay(q_bnhf / math.sqrt(F)), lay(k_bnhf), lay(v_bnhf), plans, sizes)
    return out[:, : B * N].transpose(1, 0, 2).reshape(B, N, H, F).astype(q_bnhf.dtype)


def _runs(segment_ids_bn: SegmentIds) -> tuple[jax.Array, jax.Array]:
    """int32[B·N] twice: a number for each slot's run that no other row has, and the run's length; 0 where empty."""
    B, N = segment_ids_bn.shape
    ordered = jnp.sort(segment_ids_bn, axis=1)
    before, after = (
        jax.vmap(functools.partial(jnp.searchsorted, side=side))(ordered, segment_ids_bn)
        for side in ("left", "right")
    )
    number = before + N * jnp.arange(B)[:, None]
    return number.reshape(-1), jnp.where(segment_ids_bn > 0, after - before, 0).reshape(-1)


def make_plan(runs: jax.Array, mine: jax.Array, size: int) -> Plan:
    """Cuts slots into blocks of at most `size`, of which each begins with one that is `mine`.

    A block takes whole runs as long as they fit; a run longer than a block is cut.

    Args:
      runs: int32[n], a run's number at each slot. A run's slots should follow one another; where they don't, pairs of
        blocks are walked that share nothing, and masked.
      mine: bool[n], alike within a run.
    """
    n = runs.shape[0]
    place = jnp.arange(n)
    begins = jnp.concatenate([jnp.ones(1, bool), runs[1:] != runs[:-1]])
    begin = lax.cummax(jnp.where(begins, place, 0))
    end = lax.cummin(jnp.where(jnp.append(begins[1:], True), place + 1, n), reverse=True)
    limit = jnp.minimum(place + size, n)
    border = jnp.where(end[limit - 1] <= limit, limit, begin[limit - 1])
    stops = jnp.where(end - place >= size, place + size, jnp.maximum(border, end))
    following = jnp.append(lax.cummin(jnp.where(mine, place, n), reverse=True), n)

    def cut(at: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        start = following[at]
        stop = jnp.where(start < n, stops[jnp.minimum(start, n - 1)], n)
        return stop, (start, stop)

    # What lies between the beginnings of every second block is longer than `size`, or the third would be the second's.
    _, (start, stop) = lax.scan(cut, jnp.zeros((), place.dtype), None, length=2 * (n // size) + 2)
    marked = jnp.pad(jnp.where(mine, runs, -1), (0, size), constant_values=-1)
    slots = start[:, None] + jnp.arange(size)
    own = jnp.where(slots < stop[:, None], marked[slots], -1)
    least, most = jnp.where(own < 0, n, own).min(1), own.max(1)
    share = (least[:, None] <= most) & (least <= most[:, None])
    first, last = jnp.argmax(share, axis=1), len(share) - jnp.argmax(share[:, ::-1], axis=1)
    return Plan(marked, start, stop, first, last, jnp.count_nonzero(start < n))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, plans: tuple[Plan, ...], sizes: tuple[int, ...]) -> jax.Array:
    """[H, n + a block, F]; q is divided by √F."""
    return _forward(q, k, v, plans, sizes)[0]


def _forward(q, k, v, plans, sizes) -> tuple[jax.Array, tuple[Any, ...]]:
    state = jnp.zeros_like(q), jnp.zeros(q.shape[:2])
    for plan, size in zip(plans, sizes, strict=True):
        state = lax.fori_loop(0, plan.count, functools.partial(_block, q, k, v, plan, size), state)
    out, normaliser = (checkpoint_name(x, CHECKPOINT) for x in state)
    return out, (q, k, v, plans, out, normaliser)


def _block(q, k, v, plan: Plan, size: int, i: jax.Array, state: tuple[jax.Array, ...]):
    """The result of a block's queries, and the logarithm of their softmax's divisor, put where they belong."""
    start, runs = plan.slots_of(i, size)
    queries = _cut(q, start, size)

    def pair(j: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out, total, peak = sums
        there, others = plan.slots_of(j, size)
        logits = _product(queries, _cut(k, there, size).mT, jnp.float32)
        logits = jnp.where(_shared(runs, others), logits, _NOTHING)
        higher = jnp.maximum(peak, logits.max(-1))
        weights, kept = jnp.exp(logits - higher[..., None]), jnp.exp(peak - higher)
        values = _product(weights.astype(v.dtype), _cut(v, there, size))
        return out * kept[..., None] + values, total * kept + weights.sum(-1), higher

    H, _, F = q.shape
    nothing = jnp.zeros((H, size, F)), jnp.zeros((H, size)), jnp.full((H, size), _LOWEST)
    out, total, peak = lax.fori_loop(plan.first[i], plan.last[i], pair, nothing)
    total = jnp.where(runs < 0, 1.0, total)
    made = out / total[..., None], peak + jnp.log(total)
    return tuple(_put(old, new, start, runs) for old, new in zip(state, made, strict=True))


def _backward(sizes, kept: tuple[Any, ...], pulled: jax.Array) -> tuple[Any, ...]:
    q, k, v, plans, out, normaliser = kept
    through_sum = jnp.sum((pulled * out).astype(jnp.float32), axis=-1)
    state = jnp.zeros(q.shape), jnp.zeros_like(k), jnp.zeros_like(v)
    given = q, k, v, pulled, normaliser, through_sum
    for plan, size in zip(plans, sizes, strict=True):
        state = lax.fori_loop(0, plan.count, functools.partial(_block_back, given, plan, size), state)
    to_q, to_k, to_v = state
    return to_q.astype(q.dtype), to_k, to_v, None


def _block_back(given: tuple[jax.Array, ...], plan: Plan, size: int, j: jax.Array, state):
    """What a block's keys and values get back, and what they give their queries."""
    q, k, v, pulled, normaliser, through_sum = given
    start, runs = plan.slots_of(j, size)
    keys, values = _cut(k, start, size), _cut(v, start, size)

    def pair(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        to_q, to_k, to_v = sums
        there, others = plan.slots_of(i, size)
        cut = functools.partial(_cut, start=there, size=size)
        logits = _product(cut(q), keys.mT, jnp.float32) - cut(normaliser)[..., None]
        weights = jnp.where(_shared(others, runs), jnp.exp(logits), 0.0)
        through = _product(cut(pulled), values.mT, jnp.float32) - cut(through_sum)[..., None]
        to_logits = (weights * through).astype(q.dtype)
        own = cut(to_q) + _product(to_logits, keys)
        return (
            lax.dynamic_update_slice_in_dim(to_q, own, there, 1),
            to_k + _product(to_logits.mT, cut(q)),
            to_v + _product(weights.astype(q.dtype).mT, cut(pulled)),
        )

    to_q, to_k, to_v = state
    nothing = jnp.zeros(keys.shape)
    to_q, own_k, own_v = lax.fori_loop(plan.first[j], plan.last[j], pair, (to_q, nothing, nothing))
    return to_q, _put(to_k, own_k, start, runs), _put(to_v, own_v, start, runs)


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
