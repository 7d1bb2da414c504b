"""Attention inside runs: `attend(q, k, v, segment_ids)`, one reference, one implementation a backend.

A token attends to every token of its own run and to no other; empty slots (segment 0) attend to themselves
only, so they hold finite numbers that nobody reads. Every backend passes the same
"packed = alone" test.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sora_jax.axes import SegmentIds
from sora_jax.errors import UserError

Attend = Callable[[jax.Array, jax.Array, jax.Array, SegmentIds], jax.Array]


def reference(
    q_bnhf: jax.Array, k_bnhf: jax.Array, v_bnhf: jax.Array, segment_ids_bn: SegmentIds
) -> jax.Array:
    """Dense masked softmax attention with float32 logits (Vaswani et al. 2017, equation 1)."""
    mask = segment_ids_bn[:, None, :, None] == segment_ids_bn[:, None, None, :]
    logits = jnp.einsum("bnhf,bmhf->bhnm", q_bnhf, k_bnhf, preferred_element_type=jnp.float32)
    logits = jnp.where(mask, logits / math.sqrt(q_bnhf.shape[-1]), -1e30)
    weights = jax.nn.softmax(logits, axis=-1).astype(v_bnhf.dtype)
    return jnp.einsum("bhnm,bmhf->bnhf", weights, v_bnhf)


@jax.checkpoint
def heads_first(
    q_bnhf: jax.Array, k_bnhf: jax.Array, v_bnhf: jax.Array, segment_ids_bn: SegmentIds
) -> jax.Array:
    """The same sum laid out for CPUs: every head a plain matrix product, the mask added, nothing of N² kept.

    On a CPU this is bound by memory: writing the weights for the backward pass costs more than a second product
    (measured, jax 0.12, 544 tokens, three heads, float32: 98 ms with gradient against 116 for the reference and
    205 for the same sum with its weights kept; experiments/LOG.md).
    """
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q_bnhf, k_bnhf, v_bnhf))
    mask = segment_ids_bn[:, None, :, None] == segment_ids_bn[:, None, None, :]
    logits = jnp.matmul(q / math.sqrt(q.shape[-1]), k.swapaxes(-1, -2), preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits + jnp.where(mask, 0.0, -1e30), axis=-1)
    return (weights.astype(v.dtype) @ v).transpose(0, 2, 1, 3)


BACKENDS: dict[str, Attend] = {"reference": reference, "cpu": heads_first}


def attend(
    q_bnhf: jax.Array, k_bnhf: jax.Array, v_bnhf: jax.Array, segment_ids_bn: SegmentIds, backend: str = "auto"
) -> jax.Array:
    """Attention within runs, [B, N, H, F] each, by the named backend, or the best that this machine has."""
    if backend == "auto":
        backend = jax.default_backend() if jax.default_backend() in BACKENDS else "reference"
    if backend not in BACKENDS:
        raise UserError(
            f"No attention backend is called {backend!r}: choose auto or one of {', '.join(BACKENDS)}."
        )
    return BACKENDS[backend](q_bnhf, k_bnhf, v_bnhf, segment_ids_bn)
