"""Ring attention: rows stay split over `sequence`, and keys and values go round (Liu, Zaharia and Abbeel 2023).

The other way than all-to-alls over heads (`mesh.ulysses`). Of p devices each holds n = N/p slots of a row. In p rounds
every device sees all keys, values and their segment ids, and keeps a running softmax of its own queries (Milakov and
Gimelshein 2018) in float32; what is there is sent on while it is computed with. Backward the queries travel, not the
keys: with what came back into them and the gradient that they gather they are three arrays, where keys and values with
theirs would be four. A device works in plain XLA, whatever its platform's kernel is, chunk by chunk, so that memory
grows with n; chunks and whole rounds that share no run are left out, though what is exchanged isn't.

Which way is better? A device sends, a layer and forward, by heads 4 (p - 1)/p arrays of [n, D], which the arithmetic
waits for, and tensor x sequence must divide the heads. By the ring it sends 2 (p - 1), p/2 times as much, but beside
the arithmetic, 2n operations for each number sent; and only `tensor` must divide the heads. So by heads while there are
heads enough: kernels are the platform's own, and what packed runs cost is dealt out evenly, where each round of the
ring waits for the device that has most to do. By the ring on more devices than that, for runs as long as their rows.
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
CHUNK = 512  # tokens: a device's largest array is [b, h, CHUNK, CHUNK] of logits, for its rows and heads
_LOWEST = -1e30  # a masked logit


def ring(
    q_bnhf: jax.Array, k_bnhf: jax.Array, v_bnhf: jax.Array, segment_ids_bn: SegmentIds, chunk: int = CHUNK
) -> jax.Array:
    """See `dispatch.attend`; for a device's own slots, inside `mesh.ring_parallel`, or all.

    Empty slots get zeros.

    Args:
      chunk: tokens that meet as many others at once, at most.
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
    def go_round(carry: Any) -> Any:
        state, keys = carry
        following = _pass_on(keys, devices)
        return _meet(state, (q, ids), keys), following

    given = q, k, v, ids
    # What hangs on ids alone is the same in each layer: JAX would compute it before them, and keep all masks at once.
    q, k, v, ids = lax.optimization_barrier(given)
    zeros = jnp.zeros(q.shape[:-1])
    state = jnp.zeros(q.shape), zeros, zeros + _LOWEST
    state, last = _rounds(go_round, (state, (k, v, ids)), devices)
    out, total, row_max = _meet(state, (q, ids), last)
    total = jnp.where(total > 0, total, 1.0)
    made = (out / total[..., None]).astype(q.dtype), row_max + jnp.log(total)
    out, lse = (checkpoint_name(x, CHECKPOINT) for x in made)
    return out, (*given, out, lse)


def _meet(state: Any, queries: Any, keys: Any) -> Any:
    """The state of all chunks of queries after one round's keys."""

    def of_queries(_: None, given: Any) -> tuple[None, Any]:
        sums, own = given
        of_keys = lambda sums, theirs: (_where_shared(_merge, sums, own, theirs), None)
        return None, lax.scan(of_keys, sums, keys)[0]

    walk = lambda state, queries, keys: lax.scan(of_queries, None, (state, queries))[1]
    return _where_shared(walk, state, queries, keys)


def _merge(sums: Any, queries: Any, keys: Any) -> Any:
    """The running softmax of a chunk after one chunk of keys: weighed sum, divisor, largest logit."""
    (out, total, row_max), (q, own), (k, v, theirs) = sums, queries, keys
    mask = _same_run(own, theirs)
    logits = jnp.where(mask, _product("bhqf,bhkf->bhqk", q, k), _LOWEST)
    higher = jnp.maximum(row_max, logits.max(-1))
    weights = jnp.where(mask, jnp.exp(logits - higher[..., None]), 0.0)
    kept = jnp.exp(row_max - higher)
    out = out * kept[..., None] + _product("bhqk,bhkf->bhqf", weights.astype(v.dtype), v)
    return out, total * kept + weights.sum(-1), higher


def _backward(devices: int, kept: Any, d_out: jax.Array) -> tuple[Any, ...]:
    d_out, (q, k, v, ids, out, lse) = lax.optimization_barrier((d_out, kept))
    through_sum = jnp.sum(d_out.astype(jnp.float32) * out, axis=-1)
    nothing = jnp.zeros(q.shape)

    def go_round(carry: Any) -> Any:
        to_keys, to_q, queries = carry
        following = _pass_on(queries, devices)
        # What these queries gathered before comes after them, while they are computed with.
        gathered = _pass_on(to_q, devices)
        to_keys, to_q = _meet_back((to_keys, nothing), queries, (k, v, ids))
        return to_keys, gathered + to_q, following

    # Few arrays: of those that travel at once, TPUs' compiler had five beside the arithmetic, and a sixth waited.
    statistics = jnp.stack([lse, through_sum], axis=1)
    carry: Any = (nothing, nothing), nothing, (q, d_out, statistics, ids)
    to_keys, to_q, last = _rounds(go_round, carry, devices)
    gathered = _pass_on(to_q, devices)
    (to_k, to_v), to_q = _meet_back((to_keys, nothing), last, (k, v, ids))
    to_q = _pass_on((gathered + to_q).astype(q.dtype), devices)
    return to_q, to_k.astype(k.dtype), to_v.astype(v.dtype), None


def _meet_back(state: Any, queries: Any, keys: Any) -> Any:
    """What all chunks of keys, and one round's queries, get back from each other, added to the state."""

    def of_keys(to_q: jax.Array, given: Any) -> tuple[jax.Array, Any]:
        sums, own = given

        def of_queries(sums: Any, given: Any) -> tuple[Any, jax.Array]:
            to_q, theirs = given
            return _where_shared(_pull, (sums, to_q), theirs, own)

        sums, to_q = lax.scan(of_queries, sums, (to_q, queries))
        return to_q, sums

    def walk(state: Any, queries: Any, keys: Any) -> Any:
        to_keys, to_q = state
        return lax.scan(of_keys, to_q, (to_keys, keys))[::-1]

    return _where_shared(walk, state, queries, keys)


def _pull(sums: Any, queries: Any, keys: Any) -> Any:
    """Adds what a chunk of keys and one of queries give each other to ((to_k, to_v), to_q)."""
    ((to_k, to_v), to_q), (k, v, own) = sums, keys
    q, d_out, (lse, through_sum), theirs = queries
    logits = _product("bhqf,bhkf->bhqk", q, k) - lse[..., None]
    weights = jnp.where(_same_run(theirs, own), jnp.exp(logits), 0.0)
    through = _product("bhqf,bhkf->bhqk", d_out, v) - through_sum[..., None]
    to_logits = (weights * through).astype(q.dtype)
    to_k = to_k + _product("bhqk,bhqf->bhkf", to_logits, q)
    to_v = to_v + _product("bhqk,bhqf->bhkf", weights.astype(q.dtype), d_out)
    return (to_k, to_v), to_q + _product("bhqk,bhkf->bhqf", to_logits, k)


def _rounds(go_round: Callable[[Any], Any], carry: Any, devices: int) -> Any:
    """All rounds but the last."""
    if devices == 1:
        return carry
    return lax.scan(lambda carry, _: (go_round(carry), None), carry, None, length=devices - 1)[0]


def _pass_on(tree: Any, devices: int) -> Any:
    """To the next device of the ring, from the one before."""
    if devices == 1:
        return tree
    ways = [(i, (i + 1) % devices) for i in range(devices)]
    return jax.tree.map(lambda x: lax.ppermute(x, AXIS, ways), tree)


def _where_shared(function: Any, state: Any, queries: Any, keys: Any) -> Any:
    """function(state, queries, keys) if any row's ids, which come last in both, overlap; else the state."""

    def ends(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        rest = tuple(axis for axis in range(ids.ndim) if axis != ids.ndim - 2)
        return jnp.where(ids > 0, ids, jnp.iinfo(jnp.int32).max).min(rest), ids.max(rest)

    (least, most), (other_least, other_most) = ends(queries[-1]), ends(keys[-1])
    share = jnp.any((least <= other_most) & (other_least <= most))
    return lax.cond(share, function, lambda state, *_: state, state, queries, keys)


def _same_run(of_queries: jax.Array, of_keys: jax.Array) -> jax.Array:
    """[b, 1, queries, keys]."""
    return ((of_queries[:, :, None] == of_keys[:, None]) & (of_keys > 0)[:, None])[:, None]


def _product(letters: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(letters, a, b, preferred_element_type=jnp.float32)


_attend.defvjp(_forward, _backward)
