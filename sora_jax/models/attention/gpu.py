"""Attention on NVIDIA GPUs: flash attention over blocks of the same segments, in Pallas with its Triton backend.

Flash attention (Dao et al. 2022; Dao 2023, algorithms 1 and 2): a program has a block of queries, loops over blocks of
keys with an online softmax (Milakov and Gimelshein 2018), and no [N, N] array is ever written. Here it loops over the
blocks that may hold tokens of its segments, a range computed from segment ids (`blocks.masked_block_ranges`), and masks
all but the middle of the range, where all tokens are of one segment. Gradients are two more kernels: one has queries
and loops over keys, one has keys and loops over queries, so no two programs add to the same array and results are
deterministic.

Triton wants sides that are powers of two. A head of 72 would be padded to 128; here it is 64 and 16 (8 of them
padding), in two products, which a tensor core takes as well.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sora_jax.axes import SegmentIds
from sora_jax.models.attention.blocks import CHECKPOINT, masked_block_ranges

_LOWEST = -1e30  # initial row maximum: finite, so that -inf minus it is -inf and its power 0
MIN_CAPABILITY = 8.0  # compute capability: Ampere, the first with products of bfloat16


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Block sizes of a kernel: tokens of a program's own block and of one it loops over, all powers of two.

    Attributes:
      num_warps: of 32 threads, that a program has.
      num_stages: blocks in flight from memory at once.
    """

    own: int
    other: int
    num_warps: int
    num_stages: int

    def fit(self, tokens: int) -> BlockSizes:
        most = max(16, 1 << (tokens - 1).bit_length())
        return dataclasses.replace(self, own=min(self.own, most), other=min(self.other, most))


@dataclasses.dataclass(frozen=True)
class KernelBlocks:
    """Of the forward kernel, of the gradient of queries, and of the gradient of keys and values."""

    forward: BlockSizes
    d_queries: BlockSizes
    d_keys: BlockSizes

    def fit(self, tokens: int) -> KernelBlocks:
        return KernelBlocks(self.forward.fit(tokens), self.d_queries.fit(tokens), self.d_keys.fit(tokens))


# By bytes of a head, padded: the first that is enough. Chosen by what Triton's compiler reports for sm_80 and sm_90
# (shared memory of each fits, heads of 72 spill nothing on sm_90), not by timing: no GPU was at hand.
BLOCK_CONFIGS = {
    160: KernelBlocks(BlockSizes(128, 64, 4, 3), BlockSizes(128, 64, 8, 2), BlockSizes(64, 64, 4, 2)),
    256: KernelBlocks(BlockSizes(128, 64, 8, 2), BlockSizes(64, 64, 4, 2), BlockSizes(64, 64, 8, 2)),
    1024: KernelBlocks(BlockSizes(64, 32, 4, 2), BlockSizes(32, 32, 4, 1), BlockSizes(32, 32, 4, 1)),
}


def missing() -> str | None:
    """Why this kernel can't run on this machine's GPU, as text; None where it can."""
    capability = getattr(jax.devices()[0], "compute_capability", "none")
    try:
        importlib.import_module("jax.experimental.pallas.triton")
        new = float(capability) >= MIN_CAPABILITY
    except ImportError:
        return "this JAX has no Pallas with Triton"
    except ValueError:  # AMD gives a name
        new = False
    return None if new else f"its compute capability is {capability} and NVIDIA's {MIN_CAPABILITY} is needed"


def flash(
    q_bnhf: jax.Array,
    k_bnhf: jax.Array,
    v_bnhf: jax.Array,
    segment_ids_bn: SegmentIds,
    interpret: bool = False,
    configs: KernelBlocks | None = None,
) -> jax.Array:
    """See `dispatch.attend`. Softmax and sums are float32, products are of the input's dtype.

    Args:
      interpret: interprets the kernel in plain JAX, slowly, on any backend; for tests.
      configs: block sizes; None takes those of the head's width. Sequences are padded to whole blocks.
    """
    N, F = q_bnhf.shape[1], q_bnhf.shape[3]
    head = _padded(F) * q_bnhf.dtype.itemsize
    configs = (configs or next(fitting for most, fitting in BLOCK_CONFIGS.items() if head <= most)).fit(N)
    sizes = [size for config in dataclasses.astuple(configs) for size in config[:2]]
    pad = lambda x: jnp.pad(x, [(0, 0), (0, -N % max(sizes))] + [(0, 0)] * (x.ndim - 2))
    return _attend(*(pad(x) for x in (q_bnhf, k_bnhf, v_bnhf, segment_ids_bn)), configs, interpret)[:, :N]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, ids, configs: KernelBlocks, interpret: bool) -> jax.Array:
    """[B,N,H,F] and ids [B,N], N a multiple of every block."""
    return _forward(q, k, v, ids, configs, interpret)[0]


def _forward(q, k, v, ids, configs: KernelBlocks, interpret: bool) -> tuple[jax.Array, tuple[Any, ...]]:
    B, N, H, _ = q.shape
    lse = jax.ShapeDtypeStruct((B, H, N), jnp.float32)
    results = _call(_forward_kernel, configs.forward, ids, (q,), (k, v), (q, lse), interpret)
    out, lse = (checkpoint_name(x, CHECKPOINT) for x in results)
    return out, (q, k, v, ids, out, lse)


def _backward(
    configs: KernelBlocks, interpret: bool, kept: tuple[Any, ...], d_out: jax.Array
) -> tuple[Any, ...]:
    q, k, v, ids, out, lse = kept
    delta = jnp.einsum("bnhf,bnhf->bhn", d_out, out, preferred_element_type=jnp.float32)
    queries, keys = (q, d_out, lse, delta), (k, v)
    (d_q,) = _call(_d_queries_kernel, configs.d_queries, ids, queries, keys, (q,), interpret)
    d_k, d_v = _call(_d_keys_kernel, configs.d_keys, ids, keys, queries, (k, v), interpret)
    return d_q, d_k, d_v, None


_attend.defvjp(_forward, _backward)


def _call(
    kernel: Callable[..., None],
    config: BlockSizes,
    ids: jax.Array,
    own: Sequence[jax.Array],
    other: Sequence[jax.Array],
    results: Sequence[Any],
    interpret: bool,
) -> list[jax.Array]:
    """Runs a program a block, head and sequence: it sees its own block of `own`, and all of a sequence of `other`."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    B, N, H, F = own[0].shape

    def mine(x: Any) -> pl.BlockSpec:
        if x.ndim == 4:
            return pl.BlockSpec((None, config.own, None, _padded(F)), lambda i, h, b: (b, i, h, 0))
        return pl.BlockSpec((None, None, config.own), lambda i, h, b: (b, h, i))

    def whole(x: Any) -> pl.BlockSpec:
        if x.ndim == 4:
            return pl.BlockSpec((None, N, None, _padded(F)), lambda i, h, b: (b, 0, h, 0))
        return pl.BlockSpec((None, None, N), lambda i, h, b: (b, h, 0))

    return pl.pallas_call(
        functools.partial(kernel, config=config, width=F),
        grid=(N // config.own, H, B),
        in_specs=[
            pl.BlockSpec((None, None, 4), lambda i, h, b: (b, i, 0)),
            pl.BlockSpec((None, config.own), lambda i, h, b: (b, i)),
            pl.BlockSpec((None, N), lambda i, h, b: (b, 0)),
            *map(mine, own),
            *map(whole, other),
        ],
        out_specs=list(map(mine, results)),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        compiler_params=triton.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name=kernel.__name__.strip("_"),
    )(masked_block_ranges(ids, config.own, config.other), ids, ids, *own, *other)


def _forward_kernel(ranges_ref, own_ids, ids, q, k, v, out, lse, *, config: BlockSizes, width: int) -> None:
    queries = _load(q, width)

    def step(masked: bool, j: jax.Array, state: tuple[Any, ...]) -> tuple[Any, ...]:
        outs, total, row_max = state
        logits = _inner(queries, _load(k, width, j, config.other))
        if masked:
            logits = _mask(logits, own_ids, ids, j, config)
        new_max = jnp.maximum(row_max, logits.max(1) * _scale(width))
        weights = jnp.exp2(logits * _scale(width) - new_max[:, None])
        rescale = jnp.exp2(row_max - new_max)
        outs = [o * rescale[:, None] for o in outs]
        outs = _add(outs, weights.astype(v.dtype), _load(v, width, j, config.other))
        return outs, total * rescale + weights.sum(1), new_max

    start = _zeros(config, width), jnp.zeros(config.own), jnp.full(config.own, _LOWEST)
    outs, total, row_max = _loop_over_blocks(ranges_ref, step, start)
    _store(out, [o / total[:, None] for o in outs], width)
    lse[...] = row_max + jnp.log2(total)


def _d_queries_kernel(
    ranges_ref, own_ids, ids, q, d_out, lse, delta, k, v, d_q, *, config: BlockSizes, width: int
) -> None:
    queries, d_outs = _load(q, width), _load(d_out, width)
    lse_row, delta_row = lse[...], delta[...]

    def step(masked: bool, j: jax.Array, sums: list[jax.Array]) -> list[jax.Array]:
        keys = _load(k, width, j, config.other)
        logits = _inner(queries, keys)
        if masked:
            logits = _mask(logits, own_ids, ids, j, config)
        weights = jnp.exp2(logits * _scale(width) - lse_row[:, None])
        d_logits = weights * (_inner(d_outs, _load(v, width, j, config.other)) - delta_row[:, None])
        return _add(sums, d_logits.astype(k.dtype), keys)

    sums = _loop_over_blocks(ranges_ref, step, _zeros(config, width))
    _store(d_q, [x / math.sqrt(width) for x in sums], width)


def _d_keys_kernel(
    ranges_ref, own_ids, ids, k, v, q, d_out, lse, delta, d_k, d_v, *, config: BlockSizes, width: int
) -> None:
    from jax.experimental import pallas as pl

    keys, values = _load(k, width), _load(v, width)

    def step(masked: bool, j: jax.Array, sums: tuple[list[jax.Array], ...]) -> tuple[list[jax.Array], ...]:
        d_keys, d_values = sums
        there = pl.ds(j * config.other, config.other)
        queries, d_outs = _load(q, width, j, config.other), _load(d_out, width, j, config.other)
        logits = _inner(keys, queries)  # of keys by queries: what follows needs no transpose
        if masked:
            logits = _mask(logits, own_ids, ids, j, config)
        weights = jnp.exp2(logits * _scale(width) - lse[there][None])
        d_values = _add(d_values, weights.astype(v.dtype), d_outs)
        d_logits = weights * (_inner(values, d_outs) - delta[there][None])
        return _add(d_keys, d_logits.astype(q.dtype), queries), d_values

    d_keys, d_values = _loop_over_blocks(ranges_ref, step, (_zeros(config, width), _zeros(config, width)))
    _store(d_k, [x / math.sqrt(width) for x in d_keys], width)
    _store(d_v, d_values, width)


def _loop_over_blocks(ranges_ref: Any, step: Callable[..., Any], state: Any) -> Any:
    """Three loops over the blocks of the range: the second needs no mask, a fifth to a quarter of its instructions."""
    first, plain, mixed, last = (ranges_ref[n] for n in range(4))
    for masked, start, end in ((True, first, plain), (False, plain, mixed), (True, mixed, last)):
        state = jax.lax.fori_loop(start, end, functools.partial(step, masked), state)
    return state


def _mask(logits: jax.Array, own_ids: Any, ids: Any, j: jax.Array, config: BlockSizes) -> jax.Array:
    from jax.experimental import pallas as pl

    same = own_ids[...][:, None] == ids[pl.ds(j * config.other, config.other)][None]
    return jnp.where(same, logits, -jnp.inf)


def _scale(width: int) -> float:
    """Of logits for exp2 in place of exp: the one that a GPU has."""
    return math.log2(math.e) / math.sqrt(width)


def _pieces(width: int) -> list[tuple[int, int]]:
    """(start, size): powers of two from 16 on that cover a head's width; the last may reach over its end."""
    padded = _padded(width)
    bits = [1 << bit for bit in reversed(range(padded.bit_length())) if padded >> bit & 1]
    return [(padded & ~(2 * bit - 1), bit) for bit in bits]


def _padded(width: int) -> int:
    return -(-width // 16) * 16


def _cut(ref: Any, width: int, j: jax.Array | int, size: int | None) -> list[tuple[Any, dict[str, Any]]]:
    """The pieces of `size` tokens of a ref [N,F], each with the mask it needs."""
    from jax.experimental import pallas as pl

    size = size or ref.shape[0]
    cuts = []
    for start, wide in _pieces(width):
        piece = ref.at[pl.ds(j * size, size), pl.ds(start, wide)]
        inside = jnp.arange(wide)[None] + start < width
        cuts.append((piece, {} if start + wide <= width else {"mask": inside}))
    return cuts


def _load(ref: Any, width: int, j: jax.Array | int = 0, size: int | None = None) -> list[jax.Array]:
    from jax.experimental.pallas import triton

    return [
        triton.load(piece, **mask, **({"other": 0.0} if mask else {}))
        for piece, mask in _cut(ref, width, j, size)
    ]


def _store(ref: Any, arrays: Sequence[jax.Array], width: int) -> None:
    from jax.experimental.pallas import triton

    for (piece, mask), array in zip(_cut(ref, width, 0, None), arrays, strict=True):
        triton.store(piece, array.astype(ref.dtype), **mask)


def _zeros(config: BlockSizes, width: int) -> list[jax.Array]:
    return [jnp.zeros((config.own, wide)) for _, wide in _pieces(width)]


def _inner(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> jax.Array:
    """a·bᵀ of tokens cut into pieces, float32."""
    parts = [_product(x, y, (1, 1)) for x, y in zip(a, b, strict=True)]
    return functools.reduce(jnp.add, parts)


def _add(sums: Sequence[jax.Array], a: jax.Array, b: Sequence[jax.Array]) -> list[jax.Array]:
    """sums + a·b, b of tokens cut into pieces."""
    return [x + _product(a, y, (1, 0)) for x, y in zip(sums, b, strict=True)]


def _product(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    dimensions = ((axes[0],), (axes[1],)), ((), ())
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
