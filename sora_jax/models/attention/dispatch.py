"""Attention within segments: `attend(q, k, v, segment_ids)`, one reference, one implementation a backend.

A token attends to every token of its own segment and to no other; padding (segment 0) gets finite numbers that aren't
used. Every backend passes the same "packed = alone" test, forward and gradient, and skips pairs of blocks that share no
segment, except the reference, which machines without a kernel of their own use.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sora_jax.axes import Heads, SegmentIds
from sora_jax.distributed.mesh import platform, ring_parallel, sequence_is_split, ulysses
from sora_jax.errors import UserError
from sora_jax.models.attention.check import check_kernel
from sora_jax.models.attention.cpu import blocked
from sora_jax.models.attention.gpu import flash, missing
from sora_jax.models.attention.ring import ring
from sora_jax.models.attention.tpu import splash

_log = logging.getLogger(__name__)

QUERY_CHUNK = 2048  # of attention to a second sequence

Attend = Callable[[jax.Array, jax.Array, jax.Array, SegmentIds], jax.Array]


def reference(
    q_bnhf: jax.Array, k_bnhf: jax.Array, v_bnhf: jax.Array, segment_ids_bn: SegmentIds
) -> jax.Array:
    """Dense masked softmax attention with float32 logits (Vaswani et al. 2017, equation 1)."""
    return _dense(q_bnhf, k_bnhf, v_bnhf, _same_segment(segment_ids_bn, segment_ids_bn))


def _same_segment(segment_ids_bn: SegmentIds, others_bm: SegmentIds) -> jax.Array:
    """bool[B,1,N,M]."""
    return segment_ids_bn[:, None, :, None] == others_bm[:, None, None, :]


def _dense(q_bnhf: jax.Array, k_bmhf: jax.Array, v_bmhf: jax.Array, mask: jax.Array) -> jax.Array:
    logits = jnp.einsum("bnhf,bmhf->bhnm", q_bnhf, k_bmhf, preferred_element_type=jnp.float32)
    logits = jnp.where(mask, logits / math.sqrt(q_bnhf.shape[-1]), -1e30)
    weights = jax.nn.softmax(logits, axis=-1).astype(v_bmhf.dtype)
    return jnp.einsum("bhnm,bmhf->bnhf", weights, v_bmhf)


BACKENDS: dict[str, Attend] = {"reference": reference, "cpu": blocked, "gpu": flash, "tpu": splash}


def attend(
    q_bnhf: Heads,
    k_bnhf: Heads,
    v_bnhf: Heads,
    segment_ids_bn: SegmentIds,
    backend: str = "auto",
    sequence: str = "heads",
) -> Heads:
    """Attention within segments, [B, N, H, F] each.

    Args:
      backend: see `choose`.
      sequence: how, where a mesh splits sequences over `sequence`: "heads", each device has whole sequences of some
        heads, or "ring", keys and values are exchanged, in plain XLA whatever the backend; see `ring`.

    Raises:
      UserError: as `choose`; or the mesh doesn't divide the heads.
    """
    if sequence == "ring" and sequence_is_split():
        return ring_parallel(ring, q_bnhf, k_bnhf, v_bnhf, segment_ids_bn)
    chosen = BACKENDS[choose(backend, q_bnhf.dtype, q_bnhf.shape[-1])]
    return ulysses(chosen, q_bnhf, k_bnhf, v_bnhf, segment_ids_bn)


def cross_attend(
    q_bnhf: Heads, k_bmhf: jax.Array, v_bmhf: jax.Array, segment_ids_bn: SegmentIds, others_bm: jax.Array
) -> Heads:
    """Attention to the keys of a token's own segment in a second sequence, captions; zero where there are none.

    Dense on every platform: captions are short. Their positions aren't split over devices, so a mesh sends nothing
    forward, and backward the keys' gradients. Logits are float32[B,H,N,M].

    Args:
      others_bm: the segment of each key; 0 = none.
    """
    mask = _same_segment(segment_ids_bn, others_bm) & (others_bm > 0)[:, None, None]
    return attend_masked(q_bnhf, k_bmhf, v_bmhf, mask[:, 0])


def attend_masked(q_bnhf: Heads, k_bmhf: jax.Array, v_bmhf: jax.Array, mask_bnm: jax.Array) -> Heads:
    """Attention to the keys of a second sequence that a mask allows, zero where it allows none; see `_by_chunks`."""
    if not k_bmhf.shape[1]:
        return jnp.zeros_like(q_bnhf)
    out = _by_chunks(lambda q, mask: _dense(q, k_bmhf, v_bmhf, mask[:, None]), q_bnhf, mask_bnm)
    return jnp.where(mask_bnm.any(-1)[:, :, None, None], out, 0)


def attend_padded(
    q_bnhf: Heads, k_bmhf: jax.Array, v_bmhf: jax.Array, mask_bnm: jax.Array, repeats_bn: jax.Array
) -> Heads:
    """Attention to masked keys and to the last one, which stands for so many equal keys as `repeats` says.

    Equal keys with equal values weigh in a softmax as one whose logit is greater by the logarithm of their number, so
    captions that a model was trained to see padded to a fixed length need no positions for padding.

    See `_by_chunks`.

    Args:
      mask_bnm: bool, which keys a token attends to; of the last key it isn't used.
      repeats_bn: float, 0 or more.
    """
    keys = jnp.arange(k_bmhf.shape[1])
    last = keys == len(keys) - 1
    bias_bnm = jnp.where(last, jnp.log(repeats_bn)[..., None], jnp.where(mask_bnm, 0.0, -jnp.inf))

    def of_chunk(q: jax.Array, bias: jax.Array) -> jax.Array:
        logits = jnp.einsum("bnhf,bmhf->bhnm", q, k_bmhf, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits / math.sqrt(q.shape[-1]) + bias[:, None], axis=-1).astype(
            v_bmhf.dtype
        )
        return jnp.einsum("bhnm,bmhf->bnhf", weights, v_bmhf)

    return _by_chunks(of_chunk, q_bnhf, bias_bnm)


def _by_chunks(
    of_chunk: Callable[[jax.Array, jax.Array], jax.Array], q_bnhf: Heads, mask_bnm: jax.Array
) -> Heads:
    """Dense attention in chunks of queries, of which each has its rows of the mask: logits are float32[B,H,chunk,M]."""
    B, N, H, F = q_bnhf.shape
    chunk = QUERY_CHUNK if N % QUERY_CHUNK == 0 and not sequence_is_split() else N
    if chunk == N:
        return of_chunk(q_bnhf, mask_bnm)
    split = lambda array: jnp.moveaxis(array.reshape(B, N // chunk, chunk, *array.shape[2:]), 1, 0)
    out = jax.lax.map(lambda given: of_chunk(*given), (split(q_bnhf), split(mask_bnm)))
    return jnp.moveaxis(out, 0, 1).reshape(B, N, H, F)


def choose(backend: str, dtype: jax.typing.DTypeLike, width: int) -> str:
    """The backend that `attend` takes here, by name.

    A kernel's first use in a process compares it with the reference (`check`). One that fails is not used:
    "auto" takes the reference and logs it once. The CPU's own is plain JAX that every test of this package
    runs, and checking it would cost each command seconds of compiling: it is not compared on CPUs.

    Args:
      backend: "auto" is the best that this machine has; it is also taken in place of a kernel of another machine, which
        is logged.
      dtype, width: of queries and keys, and of a head: what a kernel's program depends on.

    Raises:
      UserError: there is no such backend; or the one that was named, or on several hosts the best one, can't be
        trusted here.
    """
    if backend not in ("auto", *BACKENDS):
        raise UserError(
            f"No attention backend is called {backend!r}: choose auto or one of {', '.join(BACKENDS)}."
        )
    here = platform()
    named = backend != "auto"
    if named and backend not in ("reference", "cpu", here):
        _log_once(
            f"Attention {backend!r} needs another machine than this one ({here}): the best of this one is taken."
        )
        named = False
    name = backend if named else here if here in BACKENDS else "reference"
    why = _why_not(name, here, jnp.dtype(dtype).name, width)
    if why is None:
        return name
    kind = jax.devices()[0].device_kind
    which = f"Attention {name!r} can't be used here ({kind}, {jnp.dtype(dtype)}, heads of {width})"
    if named:
        raise UserError(f"{which}: {why}. Set dit.attention to auto or reference.")
    if jax.process_count() > 1:
        # Hosts that each decided alone might compile different programs, and wait for each other for ever.
        raise UserError(f"{which}: {why}. Set dit.attention to reference, the same on all hosts.")
    _log_once(f"{which}: {why}; 'reference' is taken, which is right and slower.")
    return "reference"


def _why_not(name: str, here: str, dtype: str, width: int) -> str | None:
    """Why a backend can't be used, as text."""
    if name == "reference" or (name, here) == ("cpu", "cpu") or here != jax.default_backend():
        return None  # the last: a program for devices that aren't here
    return (missing() if name == "gpu" else None) or check_kernel(BACKENDS[name], dtype, width)


@functools.cache
def _log_once(sentence: str) -> None:
    """Logs it once a process: `attend` is traced often."""
    _log.warning("%s", sentence)
