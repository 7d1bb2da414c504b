"""Attention inside runs: `attend(q, k, v, segment_ids)`, one reference, one implementation a backend.

A token attends to every token of its own run and to no other; empty slots (segment 0) hold finite numbers that nobody
reads. Every backend passes the same "packed = alone" test, forward and gradient, and leaves out blocks that share no
run but for the reference, which is what machines without a kernel of their own take.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sora_jax.axes import SegmentIds
from sora_jax.errors import UserError
from sora_jax.mesh import by_heads, by_slots, platform, sequence_is_split
from sora_jax.models.attention_cpu import blocked
from sora_jax.models.attention_gpu import flash, missing
from sora_jax.models.attention_ring import ring
from sora_jax.models.attention_tpu import splash

_log = logging.getLogger(__name__)

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


BACKENDS: dict[str, Attend] = {"reference": reference, "cpu": blocked, "gpu": flash, "tpu": splash}


def attend(
    q_bnhf: jax.Array,
    k_bnhf: jax.Array,
    v_bnhf: jax.Array,
    segment_ids_bn: SegmentIds,
    backend: str = "auto",
    sequence: str = "heads",
) -> jax.Array:
    """Attention within runs, [B, N, H, F] each.

    Args:
      backend: "auto" is the best that this machine has; it also stands in for a kernel of another machine, and the
        log says so.
      sequence: how, where a mesh splits rows over `sequence`: "heads", each device has whole rows of some heads, or
        "ring", keys and values go round, in plain XLA whatever the backend; see `attention_ring`.

    Raises:
      UserError: there is no such backend, or the mesh doesn't divide the heads.
    """
    if backend not in ("auto", *BACKENDS):
        raise UserError(
            f"No attention backend is called {backend!r}: choose auto or one of {', '.join(BACKENDS)}."
        )
    if sequence == "ring" and sequence_is_split():
        return by_slots(ring, q_bnhf, k_bnhf, v_bnhf, segment_ids_bn)
    here, best = platform(), best_backend()
    if backend in ("auto", here):
        backend = best
    elif backend not in ("reference", "cpu"):
        _log.warning(
            "Attention %r needs another machine than this one (%s): %r is taken.", backend, here, best
        )
        backend = best
    return by_heads(BACKENDS[backend], q_bnhf, k_bnhf, v_bnhf, segment_ids_bn)


def best_backend() -> str:
    """What suits this machine; where that isn't its own kernel, the log says why."""
    here = platform()
    if here == "gpu" and (why := missing()):
        _log.warning("Attention 'gpu' can't run here, as %s: 'reference' is taken.", why)
        return "reference"
    return here if here in BACKENDS else "reference"
