"""Attention on TPUs: JAX's splash attention, told which blocks to skip by the rows' own segment ids.

Splash attention (jax.experimental.pallas.ops.tpu.splash_attention) takes segment ids as a mask and a map of blocks as
what to skip. Its own helpers make that map from a mask that is known when compiling, or hold the whole [N, N] mask;
here it is made of the ids alone, small enough for scalar memory, anew for every batch.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from sora_jax.axes import SegmentIds
from sora_jax.models.attention.blocks import CHECKPOINT, sharing

BLOCKS = (512, 256, 128)  # tokens: the largest that wastes no more than an eighth of a row is taken
MOST_BLOCKS = 384  # a row; more, and they grow: their map must fit a TPU's scalar memory
MOST_GRADIENT = 1024  # queries: the kernel of their gradient holds all logits of a pair of blocks


def splash(
    q_bnhf: jax.Array,
    k_bnhf: jax.Array,
    v_bnhf: jax.Array,
    segment_ids_bn: SegmentIds,
    interpret: bool = False,
) -> jax.Array:
    """See `dispatch.attend`.

    Args:
      interpret: runs the kernel's text in plain JAX, slowly, on any backend; for tests.
    """
    N, F = q_bnhf.shape[1], q_bnhf.shape[3]
    block = next((size for size in BLOCKS if -N % size <= N // 8), BLOCKS[-1])
    while -(-N // block) > MOST_BLOCKS:
        block *= 2
    padding = -N % block
    pad = lambda x: jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
    q, k, v = (pad(x).transpose(0, 2, 1, 3) for x in (q_bnhf / math.sqrt(F), k_bnhf, v_bnhf))
    ids = pad(segment_ids_bn)
    of_gradient = min(block, MOST_GRADIENT)
    row = functools.partial(_attend_row, blocks=(block, of_gradient), interpret=interpret)
    out = jax.vmap(row)(q, k, v, ids, sharing(ids, block), sharing(ids, of_gradient, block))
    return out.transpose(0, 2, 1, 3)[:, :N].astype(q_bnhf.dtype)


def _attend_row(
    q_hnf, k_hnf, v_hnf, ids_n, share_gg, share_jg, blocks: tuple[int, int], interpret: bool
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as info

    places = jnp.arange(len(share_gg), dtype=jnp.int16)

    def walk(share: jax.Array, there: jax.Array) -> info.MaskInfo:
        # What to fetch where a block is skipped: any that is used, so 0; nothing is computed there.
        skip = jnp.where(share, 2, 0).astype(jnp.int8)
        return info.MaskInfo(jnp.where(share, there, 0)[None], None, skip[None], None, None)

    block, of_gradient = blocks
    at_once = min(block, max(BLOCKS[0] ** 2 // block, 128))  # keys: so many logits fit a TPU's memory on chip
    sizes = kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=at_once,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=at_once,
        block_q_dq=of_gradient,
        block_kv_dq=block,
    )
    attend = kernel.SplashAttentionKernel(
        walk(share_gg, places[None]),
        walk(share_jg, places[None]),
        walk(share_gg, places[:, None]),
        block_sizes=sizes,
        is_mqa=False,
        save_residuals=False,
        mask_value=kernel.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=CHECKPOINT,
        mask_function=None,
        interpret=interpret,
    )
    return attend(q_hnf, k_hnf, v_hnf, segment_ids=kernel.SegmentIds(q=ids_n, kv=ids_n))
