"""Attention on TPUs: JAX's splash attention, with the blocks to skip found from segment ids.

Splash attention (jax.experimental.pallas.ops.tpu.splash_attention) takes segment ids as a mask and a map of blocks as
what to skip. Its own helpers make that map from a mask that is known when compiling, or hold the whole [N, N] mask;
here it is computed from the ids for every batch, small enough for scalar memory.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from sora_jax.axes import SegmentIds
from sora_jax.models.attention.blocks import CHECKPOINT, overlapping_blocks

BLOCKS = (512, 256, 128)  # tokens: the largest that pads no more than an eighth of a sequence is taken
MAX_BLOCKS = 384  # per sequence; beyond, blocks grow: their map must fit a TPU's scalar memory
MAX_GRADIENT = 1024  # queries: the kernel of their gradient holds all logits of a pair of blocks


def splash(
    q_bnhf: jax.Array,
    k_bnhf: jax.Array,
    v_bnhf: jax.Array,
    segment_ids_bn: SegmentIds,
    interpret: bool = False,
) -> jax.Array:
    """See `dispatch.attend`.

    Args:
      interpret: interprets the kernel in plain JAX, slowly, on any backend; for tests.
    """
    N, F = q_bnhf.shape[1], q_bnhf.shape[3]
    block = next((size for size in BLOCKS if -N % size <= N // 8), BLOCKS[-1])
    while -(-N // block) > MAX_BLOCKS:
        block *= 2
    padding = -N % block
    pad = lambda x: jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
    q, k, v = (pad(x).transpose(0, 2, 1, 3) for x in (q_bnhf / math.sqrt(F), k_bnhf, v_bnhf))
    ids = pad(segment_ids_bn)
    of_gradient = min(block, MAX_GRADIENT)
    attend_one = functools.partial(_attend_sequence, blocks=(block, of_gradient), interpret=interpret)
    out = jax.vmap(attend_one)(
        q, k, v, ids, overlapping_blocks(ids, block), overlapping_blocks(ids, of_gradient, block)
    )
    return out.transpose(0, 2, 1, 3)[:, :N].astype(q_bnhf.dtype)


def _attend_sequence(
    q_hnf, k_hnf, v_hnf, ids_n, share_gg, share_jg, blocks: tuple[int, int], interpret: bool
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as info

    indices = jnp.arange(len(share_gg), dtype=jnp.int16)

    def mask_info(share: jax.Array, there: jax.Array) -> info.MaskInfo:
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
        mask_info(share_gg, indices[None]),
        mask_info(share_jg, indices[None]),
        mask_info(share_gg, indices[:, None]),
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
