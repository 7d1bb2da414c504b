"""Whether a kernel can be trusted on this machine: compared once on a small packed sequence, forward and gradient.

Kernels of GPUs and TPUs are tested in plain JAX on CPUs and compiled for their machines, but what a driver, a compiler
or an untested chip makes of them is only known there. So before a kernel is used on a device, it is compared
with equation 1 of Vaswani et al. (2017), each segment alone, in float32 on the host.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

_log = logging.getLogger(__name__)

# (segment id, tokens) of one sequence of three of the TPU's largest blocks: segments within a block and over two, one
# of a single token, padding in between and last. The first block shares no segment with the last: it must be skipped.
SEQUENCE = ((1, 300), (2, 1), (3, 37), (0, 29), (4, 420), (5, 23), (0, 86), (6, 540), (0, 100))
HEADS = 2
MOST = 0.1
"""How far a token's numbers may be from the exact ones, relative to a typical token's norm: bfloat16, TF32
and their products differ by 0.03 at most here (all three kernels on a CPU), logits that are 5% too large by 0.35."""
NAMES = ("result", "gradient of queries", "gradient of keys", "gradient of values")


def check_kernel(kernel: Callable[..., jax.Array], dtype: jax.typing.DTypeLike, width: int) -> str | None:
    """Why a kernel can't be trusted on this process's first device, as text; None where it can.

    Kept for the life of the process. It may be asked while JAX traces, under any mesh and transfer guard.

    Args:
      kernel: (q, k, v, segment_ids) to the result, [B, N, H, F] each.
      dtype: of q, k and v.
      width: F, of a head.
    """
    return _check(kernel, jnp.dtype(dtype).name, width)


@functools.cache
def _check(kernel: Callable[..., jax.Array], dtype: str, width: int) -> str | None:
    begun = time.perf_counter()
    # Traces, meshes, guards and precisions belong to a thread: another one has none of them.
    with ThreadPoolExecutor(1) as other_thread:
        why = other_thread.submit(_compare, kernel, dtype, width).result()
    _log.info("Attention's kernel was compared with the reference in %.2f s.", time.perf_counter() - begun)
    return why


def _compare(kernel: Callable[..., jax.Array], dtype: str, width: int) -> str | None:
    ids, given = small_sequence(width)
    given = np.asarray(given.astype(dtype))  # what the kernel sees, and so the exact one

    def results(q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array) -> tuple[jax.Array, ...]:
        out, vjp = jax.vjp(lambda q, k, v: kernel(q, k, v, ids), q, k, v)
        return out, *vjp(d_out)

    try:
        placed = jax.device_put(list(given), jax.local_devices()[0])
        ours = [np.asarray(x, np.float32) for x in jax.device_get(jax.jit(results)(*placed))]
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"it fails ({type(error).__name__}: {lines[0][:200].rstrip('.')})"
    filled = ids > 0
    for name, mine, exact in zip(NAMES, ours, exact_attention(ids, *given), strict=True):
        if name == NAMES[0]:  # padding may hold anything there
            mine = np.where(filled[..., None, None] | ~np.isfinite(mine), mine, 0.0)
        off = np.linalg.norm(mine - exact, axis=-1).max()
        far = off / np.sqrt(np.square(exact[filled]).sum(-1).mean())
        if not far <= MOST:
            return f"its {name} is not the reference's (off by {far:.2g} of its size)"
    return None


def small_sequence(width: int) -> tuple[np.ndarray, np.ndarray]:
    """A packed sequence's ids, int32[1,N], and q, k, v and the gradient of the result, float32[4,1,N,HEADS,width]."""
    ids = np.repeat(*np.array(SEQUENCE).T).astype(np.int32)[None]
    given = np.random.default_rng(0).normal(size=(4, *ids.shape, HEADS, width)).astype(np.float32)
    given[3] *= (ids > 0)[..., None, None]
    return ids, given


def exact_attention(
    ids: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, d_out: np.ndarray
) -> tuple[np.ndarray, ...]:
    """The result and the gradients of q, k and v in float32; zeros at padding."""
    whole = tuple(np.zeros(q.shape, np.float32) for _ in NAMES)
    scale = q.shape[-1] ** -0.5
    for row, segment in sorted({(row, ids[row, position]) for row, position in np.argwhere(ids)}):
        positions = np.flatnonzero(ids[row] == segment)
        one_q, one_k, one_v, one_d_out = (
            x[row, positions].astype(np.float32).swapaxes(0, 1) for x in (q, k, v, d_out)
        )
        logits = one_q @ one_k.mT * scale
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        d_weights = one_d_out @ one_v.mT
        d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * scale
        parts = weights @ one_v, d_logits @ one_k, d_logits.mT @ one_q, weights.mT @ one_d_out
        for array, part in zip(whole, parts, strict=True):
            array[row, positions] = part.swapaxes(0, 1)
    return whole
