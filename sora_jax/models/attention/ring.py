"""Ring attention: sequences stay split over `sequence`, keys and values are rotated (Liu, Zaharia and Abbeel 2023).

The alternative to all-to-alls over heads (`mesh.ulysses`). Of p devices each holds n = N/p positions of a sequence. In
p rounds every device sees all keys, values and their segment ids, with an online softmax of its own queries (Milakov
and Gimelshein 2018) in float32; sending overlaps with compute. In the backward pass the queries are rotated, not the
keys: with the gradient of the result and their own gradient they are three arrays, where keys and values with theirs
would be four. A device works in plain XLA on every platform, chunk by chunk, so memory grows with n;
chunks and whole rounds that share no segment are skipped, though they are still exchanged.

Which is better? A device sends, a layer and forward, by heads 4 (p - 1)/p arrays of [n, D], which compute waits for,
and tensor x sequence must divide the heads. By the ring it sends 2 (p - 1), p/2 times as much, but overlapped with
compute, 2n operations for each number sent; and only `tensor` must divide the heads. So by heads while there are enough
heads: kernels are the platform's own, and the cost of packed segments is balanced, where each round of the ring waits
for the device that has most to do. By the ring on more devices than that, for segments as long as their sequences.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from sora_jax.axes import SegmentIds
from sora_jax.models.attention.blocks import CHECKPOINT

AXIS = "sequence"
CHUNK = 512  # tokens: a device's largest array is [b, h, CHUNK, CHUNK] of logits, for its sequences and heads
_LOWEST = -1e30  # a masked logit


def ring(
    q_bnhf: jax.Array, k_bnhf: jax.Array, v_bnhf: jax.Array, segment_ids_bn: SegmentIds, chunk: int = CHUNK
) -> jax.Array:
    """See `dispatch.attend`; for a device's own positions, inside `mesh.ring_parallel`, or all.

    Padding gets zeros.

    Args:
      chunk: the most tokens of a pair of chunks, each.
    """
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else mesh.shape[AXIS]
    n, F = q_bnhf.shape[1], q_bnhf.shape[3]
    count = -(-n // chunk)
    size = -(-n // count)

    def cut(x: jax.Array) -> jax.Array:
        """[b, n, ...] to [G, b, size, ...]."""
        x = jnp.pad(x, [(0, 0), (0, count * size - n)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(len(x), count, size, *x.shape[2:]), 1, 0)

    q, k, v = (cut(x).swapaxes(2, 3) for x in (q_bnhf / math.sqrt(F), k_bnhf, v_bnhf))
    out = jnp.moveaxis(_attend(q, k, v, cut(segment_ids_bn), devices).swapaxes(2, 3), 0, 1)
    return out.reshape(len(q_bnhf), count * size, *q_bnhf.shape[2:])[:, :n]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, devices: int) -> jax.Array:
    """[G, b, h, c, F], G chunks of c tokens; ids [G, b, c]; q is divided by √F."""
    return _forward(q, k, v, ids, devices)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, devices: int
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    def one_round(carry: Any) -> Any:
        state, keys = carry
        following = _send_to_next(keys, devices)
        return _attend_all(state, (q, ids), keys), following

    given = q, k, v, ids
    # What depends on ids alone is the same in each layer: JAX would hoist it out of them, and keep all masks.
    q, k, v, ids = lax.optimization_barrier(given)
    zeros = jnp.zeros(q.shape[:-1])
    state = jnp.zeros(q.shape), zeros, zeros + _LOWEST
    state, last = _rounds(one_round, (state, (k, v, ids)), devices)
    out, total, row_max = _attend_all(state, (q, ids), last)
    total = jnp.where(total > 0, total, 1.0)
    results = (out / total[..., None]).astype(q.dtype), row_max + jnp.log(total)
    out, lse = (checkpoint_name(x, CHECKPOINT) for x in results)
    return out, (*given, out, lse)


def _attend_all(state: Any, queries: Any, keys: Any) -> Any:
    """The state of all chunks of queries after one round's keys."""

    def of_queries(_: None, given: Any) -> tuple[None, Any]:
        sums, own = given
        of_keys = lambda sums, theirs: (_where_shared(_attend_pair, sums, own, theirs), None)
        return None, lax.scan(of_keys, sums, keys)[0]

    loop = lambda state, queries, keys: lax.scan(of_queries, None, (state, queries))[1]
    return _where_shared(loop, state, queries, keys)


def _attend_pair(sums: Any, queries: Any, keys: Any) -> Any:
    """The online softmax of a chunk after one chunk of keys: weighted sum, divisor, row maximum."""
    (out, total, row_max), (q, own), (k, v, theirs) = sums, queries, keys
    mask = _same_segment(own, theirs)
    logits = jnp.where(mask, _product("bhqf,bhkf->bhqk", q, k), _LOWEST)
    new_max = jnp.maximum(row_max, logits.max(-1))
    weights = jnp.where(mask, jnp.exp(logits - new_max[..., None]), 0.0)
    rescale = jnp.exp(row_max - new_max)
    out = out * rescale[..., None] + _product("bhqk,bhkf->bhqf", weights.astype(v.dtype), v)
    return out, total * rescale + weights.sum(-1), new_max


def _backward(devices: int, residuals: Any, d_out: jax.Array) -> tuple[Any, ...]:
    d_out, (q, k, v, ids, out, lse) = lax.optimization_barrier((d_out, residuals))
    delta = jnp.sum(d_out.astype(jnp.float32) * out, axis=-1)
    zeros = jnp.zeros(q.shape)

    def one_round(carry: Any) -> Any:
        d_kv, d_q, queries = carry
        following = _send_to_next(queries, devices)
        # The gradient of these queries follows them, while they are computed with.
        received = _send_to_next(d_q, devices)
        d_kv, d_q = _attend_all_backward((d_kv, zeros), queries, (k, v, ids))
        return d_kv, received + d_q, following

    # Few arrays: the TPU's compiler overlapped five transfers with compute, and a sixth waited.
    statistics = jnp.stack([lse, delta], axis=1)
    carry: Any = (zeros, zeros), zeros, (q, d_out, statistics, ids)
    d_kv, d_q, last = _rounds(one_round, carry, devices)
    received = _send_to_next(d_q, devices)
    (d_k, d_v), d_q = _attend_all_backward((d_kv, zeros), last, (k, v, ids))
    d_q = _send_to_next((received + d_q).astype(q.dtype), devices)
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None


def _attend_all_backward(state: Any, queries: Any, keys: Any) -> Any:
    """Adds the gradients of all chunks of keys and of one round's queries to the state."""

    def of_keys(d_q: jax.Array, given: Any) -> tuple[jax.Array, Any]:
        sums, own = given

        def of_queries(sums: Any, given: Any) -> tuple[Any, jax.Array]:
            d_q, theirs = given
            return _where_shared(_attend_pair_backward, (sums, d_q), theirs, own)

        sums, d_q = lax.scan(of_queries, sums, (d_q, queries))
        return d_q, sums

    def loop(state: Any, queries: Any, keys: Any) -> Any:
        d_kv, d_q = state
        return lax.scan(of_keys, d_q, (d_kv, keys))[::-1]

    return _where_shared(loop, state, queries, keys)


def _attend_pair_backward(sums: Any, queries: Any, keys: Any) -> Any:
    """Adds the gradients of a chunk of keys and one of queries to ((d_k, d_v), d_q)."""
    ((d_k, d_v), d_q), (k, v, own) = sums, keys
    q, d_out, (lse, delta), theirs = queries
    logits = _product("bhqf,bhkf->bhqk", q, k) - lse[..., None]
    weights = jnp.where(_same_segment(theirs, own), jnp.exp(logits), 0.0)
    d_weights = _product("bhqf,bhkf->bhqk", d_out, v) - delta[..., None]
    d_logits = (weights * d_weights).astype(q.dtype)
    d_k = d_k + _product("bhqk,bhqf->bhkf", d_logits, q)
    d_v = d_v + _product("bhqk,bhqf->bhkf", weights.astype(q.dtype), d_out)
    return (d_k, d_v), d_q + _product("bhqk,bhkf->bhqf", d_logits, k)


def _rounds(one_round: Callable[[Any], Any], carry: Any, devices: int) -> Any:
    """All rounds but the last."""
    if devices == 1:
        return carry
    return lax.scan(lambda carry, _: (one_round(carry), None), carry, None, length=devices - 1)[0]


def _send_to_next(tree: Any, devices: int) -> Any:
    """To the next device of the ring, from the one before."""
    if devices == 1:
        return tree
    ways = [(i, (i + 1) % devices) for i in range(devices)]
    return jax.tree.map(lambda x: lax.ppermute(x, AXIS, ways), tree)


def _where_shared(function: Any, state: Any, queries: Any, keys: Any) -> Any:
    """function(state, queries, keys) if any sequence's ids, which come last in both, overlap; else the state."""

    def ends(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        rest = tuple(axis for axis in range(ids.ndim) if axis != ids.ndim - 2)
        return jnp.where(ids > 0, ids, jnp.iinfo(jnp.int32).max).min(rest), ids.max(rest)

    (least, most), (other_least, other_most) = ends(queries[-1]), ends(keys[-1])
    share = jnp.any((least <= other_most) & (other_least <= most))
    return lax.cond(share, function, lambda state, *_: state, state, queries, keys)


def _same_segment(of_queries: jax.Array, of_keys: jax.Array) -> jax.Array:
    """[b, 1, queries, keys]."""
    return ((of_queries[:, :, None] == of_keys[:, None]) & (of_keys > 0)[:, None])[:, None]


def _product(letters: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(letters, a, b, preferred_element_type=jnp.float32)


_attend.defvjp(_forward, _backward)
