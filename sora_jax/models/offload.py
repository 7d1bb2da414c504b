"""Transformers larger than their device: blocks stay in the host's memory, or in their file, and come to it one by one.

While a block computes, the next one is read and sent by a thread, so two of them are on the device at most. That is the
double buffering of ZeRO-Inference (Aminabadi et al. 2022, arXiv:2207.00032, section VI) and of diffusers' group
offloading. Blocks are one compiled program; the loop over them is Python's, so such a model is called outside of jit.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from flax import nnx

from sora_jax.axes import Patches, Sigma
from sora_jax.tokens.packing import PackedBatch


class Offloaded(nnx.Module):
    """A transformer (`models.wan.Wan`, `models.ltx.LTX`) whose blocks come to the device one by one; the same call."""

    offloaded = True  # so it isn't compiled as part of a larger program

    def __init__(self, outer: Any, blocks: Any, read: Callable[[int], Any]) -> None:
        """Args: the model without its blocks; their shapes, stacked; and what puts one on the device, by index."""
        self.outer, self.blocks, self.read = outer, blocks, read
        self.config = outer.config

    def __call__(self, patches_bnp: Patches, batch: PackedBatch, sigma_bs: Sigma) -> Patches:
        """Velocity of every token, float32 [B, N, P], as the transformer's own; not inside jit."""
        x, time, given = _embed(self.outer, patches_bnp, batch, sigma_bs)
        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(self.read, 0)
            for i in range(self.config.layers):
                block = coming.result()
                x.block_until_ready()  # the block before this one is given back
                if i + 1 < self.config.layers:
                    coming = reader.submit(self.read, i + 1)
                x = _layer(block, x, given, self.config)
        return _project(self.outer, x, time, batch.condition_ids)


@jax.jit
def _embed(outer: Any, patches_bnp: Patches, batch: PackedBatch, sigma_bs: Sigma) -> Any:
    return outer.embed(patches_bnp, batch, sigma_bs)


@jax.jit(static_argnames="config")
def _layer(block: Any, x_bnd: jax.Array, given: tuple[Any, ...], config: Any) -> jax.Array:
    return block(x_bnd, config, *given)


@jax.jit
def _project(outer: Any, x_bnd: jax.Array, time_bsd: jax.Array, index_bn: jax.Array) -> Patches:
    return outer.project(x_bnd, time_bsd, index_bn)
