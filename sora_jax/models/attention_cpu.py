"""Attention on CPUs: pairs of blocks that share a run, one after another, and nothing else.

A row is cut into blocks of tokens; which pairs of them share a run is known when the rows are. One loop walks those
pairs with a running softmax (Milakov and Gimelshein 2018; Dao et al. 2022, algorithm 1), another walks them back. So
work grows with Σ n² over runs, not with N² of the row, no [N, N] array is ever written, and the number of pairs,
which differs from batch to batch, compiles nothing anew.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sora_jax.axes import SegmentIds
from sora_jax.models.attention_blocks import CHECKPOINT, sharing

BLOCK = 256  # tokens; smaller skips more, larger has better matrix products (experiments/LOG.md)
_NOTHING = -1e30


def blocked(
    q_bnhf: jax.Array,
    k_bnhf: jax.Array,
    v_bnhf: jax.Array,
    segment_ids_bn: SegmentIds,
    block: int = BLOCK,
) -> jax.Array:
    """See `attention.attend`. Arithmetic is float32, which costs a CPU nothing here.

    Args:
      block: tokens of a block; rows are padded to a multiple.
    """
    B, N, H, F = q_bnhf.shape
    block = min(block, -(-N // 8) * 8)
    padding = -N % block

    def cut(x_bnhf: jax.Array) -> jax.Array:
        padded = jnp.pad(x_bnhf.astype(jnp.float32), ((0, 0), (0, padding), (0, 0), (0, 0)))
        return padded.reshape(-1, block, H, F).transpose(0, 2, 1, 3)

    heads = (cut(x) for x in (q_bnhf, k_bnhf, v_bnhf))
    padded_ids = jnp.pad(segment_ids_bn, ((0, 0), (0, padding)))
    out = _attend(*heads, padded_ids.reshape(-1, block), *_pairs(sharing(padded_ids, block)))
    return out.transpose(0, 2, 1, 3).reshape(B, N + padding, H, F)[:, :N].astype(q_bnhf.dtype)


def _pairs(share_bgg: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The pairs of blocks to walk, as places in the blocks of all rows, and how many they are; the rest is padding."""
    B, G, _ = share_bgg.shape
    row, first, second = jnp.nonzero(share_bgg, size=B * G * G, fill_value=0)
    return row * G + first, row * G + second, jnp.count_nonzero(share_bgg)


@jax.custom_vjp
def _attend(q, k, v, ids, first, second, count) -> jax.Array:
    """float32 [G,H,K,F] of blocks, ids [G,K]; pairs as `_pairs` gives them."""
    return _forward(q, k, v, ids, first, second, count)[0]


def _forward(q, k, v, ids, first, second, count) -> tuple[jax.Array, tuple[Any, ...]]:
    G, H, K, _ = q.shape

    def pair(n: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out, total, peak = state
        i, j = first[n], second[n]
        logits, mask = _logits(q, k, ids, i, j)
        higher = jnp.maximum(peak[i], logits.max(-1))
        weights = jnp.where(mask, jnp.exp(logits - higher[..., None]), 0.0)
        kept = jnp.exp(peak[i] - higher)
        return (
            out.at[i].set(out[i] * kept[..., None] + weights @ v[j]),
            total.at[i].set(total[i] * kept + weights.sum(-1)),
            peak.at[i].set(higher),
        )

    start = jnp.zeros_like(q), jnp.zeros((G, H, K)), jnp.full((G, H, K), _NOTHING)
    out, total, peak = jax.lax.fori_loop(0, count, pair, start)
    out, normaliser = (
        checkpoint_name(x, CHECKPOINT) for x in (out / total[..., None], peak + jnp.log(total))
    )
    return out, (q, k, v, ids, first, second, count, out, normaliser)


def _backward(kept: tuple[Any, ...], pulled: jax.Array) -> tuple[jax.Array | None, ...]:
    q, k, v, ids, first, second, count, out, normaliser = kept
    scale = 1 / math.sqrt(q.shape[-1])
    through_sum = jnp.sum(pulled * out, axis=-1)

    def pair(n: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        to_q, to_k, to_v = state
        i, j = first[n], second[n]
        logits, mask = _logits(q, k, ids, i, j)
        weights = jnp.where(mask, jnp.exp(logits - normaliser[i][..., None]), 0.0)
        to_logits = weights * (pulled[i] @ v[j].mT - through_sum[i][..., None]) * scale
        return (
            to_q.at[i].add(to_logits @ k[j]),
            to_k.at[j].add(to_logits.mT @ q[i]),
            to_v.at[j].add(weights.mT @ pulled[i]),
        )

    to_q, to_k, to_v = jax.lax.fori_loop(0, count, pair, (jnp.zeros_like(q),) * 3)
    return to_q, to_k, to_v, None, None, None, None


def _logits(q, k, ids, i, j) -> tuple[jax.Array, jax.Array]:
    mask = ids[i][:, None] == ids[j]
    return jnp.where(mask, q[i] @ k[j].mT / math.sqrt(q.shape[-1]), _NOTHING), mask


_attend.defvjp(_forward, _backward)
