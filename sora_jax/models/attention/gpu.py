"""Attention on NVIDIA GPUs: flash attention that walks only blocks of the same runs, in Pallas with its Triton backend.

Flash attention (Dao et al. 2022; Dao 2023, algorithms 1 and 2): a program has a block of queries, walks blocks of keys
with a running softmax (Milakov and Gimelshein 2018), and no [N, N] array is ever written. Here it walks the blocks that
may hold tokens of its runs, a range that is known when the rows are (`blocks.spans`), and masks inside, but
for the middle of the range, where all are of one run. Gradients are two more kernels: one has queries and walks keys,
one has keys and walks queries, so nothing is added to by two programs and results are the same every time.

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
from sora_jax.models.attention.blocks import CHECKPOINT, spans

_LOWEST = -1e30  # where the running peak starts: finite, so that -inf less it is -inf and its power 0
OLDEST = 8.0  # compute capability: Ampere, the first with products of bfloat16


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a kernel cuts a row: tokens of a program's own block and of a block it walks, all powers of two.

    Attributes:
      warps: of 32 threads, that share a program.
      stages: blocks in flight from memory at once.
    """

    own: int
    walked: int
    warps: int
    stages: int

    def fit(self, tokens: int) -> Tile:
        most = max(16, 1 << (tokens - 1).bit_length())
        return dataclasses.replace(self, own=min(self.own, most), walked=min(self.walked, most))


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Those of the forward kernel, of the gradient of queries, and of that of keys and values."""

    forward: Tile
    to_queries: Tile
    to_keys: Tile

    def fit(self, tokens: int) -> Tiles:
        return Tiles(self.forward.fit(tokens), self.to_queries.fit(tokens), self.to_keys.fit(tokens))


# By bytes of a head, padded: the first that is enough. Chosen by what Triton's compiler reports for sm_80 and sm_90
# (shared memory of each fits, nothing of heads of 72 is spilled on sm_90), not by timing: no GPU was at hand.
TILES = {
    160: Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
    256: Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
    1024: Tiles(Tile(64, 32, 4, 2), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
}


def missing() -> str | None:
    """Why this kernel can't run on this machine's GPU, in words; None where it can."""
    capability = getattr(jax.devices()[0], "compute_capability", "none")
    try:
        importlib.import_module("jax.experimental.pallas.triton")
        new = float(capability) >= OLDEST
    except ImportError:
        return "this JAX has no Pallas with Triton"
    except ValueError:  # AMD tells a name
        new = False
    return None if new else f"its compute capability is {capability} and NVIDIA's {OLDEST} is needed"


def flash(
    q_bnhf: jax.Array,
    k_bnhf: jax.Array,
    v_bnhf: jax.Array,
    segment_ids_bn: SegmentIds,
    interpret: bool = False,
    tiles: Tiles | None = None,
) -> jax.Array:
    """See `dispatch.attend`. Softmax and sums are float32, products are of the input's dtype.

    Args:
      interpret: runs the kernel's text in plain JAX, slowly, on any backend; for tests.
      tiles: how rows are cut; None takes what suits the head's width. Rows are padded to whole blocks.
    """
    N, F = q_bnhf.shape[1], q_bnhf.shape[3]
    head = _padded(F) * q_bnhf.dtype.itemsize
    tiles = (tiles or next(fitting for most, fitting in TILES.items() if head <= most)).fit(N)
    sizes = [size for tile in dataclasses.astuple(tiles) for size in tile[:2]]
    pad = lambda x: jnp.pad(x, [(0, 0), (0, -N % max(sizes))] + [(0, 0)] * (x.ndim - 2))
    return _attend(*(pad(x) for x in (q_bnhf, k_bnhf, v_bnhf, segment_ids_bn)), tiles, interpret)[:, :N]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, ids, tiles: Tiles, interpret: bool) -> jax.Array:
    """[B,N,H,F] and ids [B,N], N a multiple of every block."""
    return _forward(q, k, v, ids, tiles, interpret)[0]


def _forward(q, k, v, ids, tiles: Tiles, interpret: bool) -> tuple[jax.Array, tuple[Any, ...]]:
    B, N, H, _ = q.shape
    lse = jax.ShapeDtypeStruct((B, H, N), jnp.float32)
    results = _call(_forward_kernel, tiles.forward, ids, (q,), (k, v), (q, lse), interpret)
    out, lse = (checkpoint_name(x, CHECKPOINT) for x in results)
    return out, (q, k, v, ids, out, lse)


def _backward(tiles: Tiles, interpret: bool, kept: tuple[Any, ...], d_out: jax.Array) -> tuple[Any, ...]:
    q, k, v, ids, out, lse = kept
    through_sum = jnp.einsum("bnhf,bnhf->bhn", d_out, out, preferred_element_type=jnp.float32)
    queries, keys = (q, d_out, lse, through_sum), (k, v)
    (to_q,) = _call(_to_queries_kernel, tiles.to_queries, ids, queries, keys, (q,), interpret)
    to_k, to_v = _call(_to_keys_kernel, tiles.to_keys, ids, keys, queries, (k, v), interpret)
    return to_q, to_k, to_v, None


_attend.defvjp(_forward, _backward)


def _call(
    kernel: Callable[..., None],
    tile: Tile,
    ids: jax.Array,
    own: Sequence[jax.Array],
    walked: Sequence[jax.Array],
    results: Sequence[Any],
    interpret: bool,
) -> list[jax.Array]:
    """Runs a program a block, head and row: it sees its own block of `own`, all of a row of `walked`."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    B, N, H, F = own[0].shape

    def mine(x: Any) -> pl.BlockSpec:
        if x.ndim == 4:
            return pl.BlockSpec((None, tile.own, None, _padded(F)), lambda i, h, b: (b, i, h, 0))
        return pl.BlockSpec((None, None, tile.own), lambda i, h, b: (b, h, i))

    def whole(x: Any) -> pl.BlockSpec:
        if x.ndim == 4:
            return pl.BlockSpec((None, N, None, _padded(F)), lambda i, h, b: (b, 0, h, 0))
        return pl.BlockSpec((None, None, N), lambda i, h, b: (b, h, 0))

    return pl.pallas_call(
        functools.partial(kernel, tile=tile, width=F),
        grid=(N // tile.own, H, B),
        in_specs=[
            pl.BlockSpec((None, None, 4), lambda i, h, b: (b, i, 0)),
            pl.BlockSpec((None, tile.own), lambda i, h, b: (b, i)),
            pl.BlockSpec((None, N), lambda i, h, b: (b, 0)),
            *map(mine, own),
            *map(whole, walked),
        ],
        out_specs=list(map(mine, results)),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=kernel.__name__.strip("_"),
    )(spans(ids, tile.own, tile.walked), ids, ids, *own, *walked)


def _forward_kernel(spans_ref, own_ids, ids, q, k, v, out, lse, *, tile: Tile, width: int) -> None:
    queries = _load(q, width)

    def step(masked: bool, j: jax.Array, state: tuple[Any, ...]) -> tuple[Any, ...]:
        outs, total, row_max = state
        logits = _inner(queries, _load(k, width, j, tile.walked))
        if masked:
            logits = _mask(logits, own_ids, ids, j, tile)
        higher = jnp.maximum(row_max, logits.max(1) * _scale(width))
        weights = jnp.exp2(logits * _scale(width) - higher[:, None])
        kept = jnp.exp2(row_max - higher)
        outs = [o * kept[:, None] for o in outs]
        outs = _add(outs, weights.astype(v.dtype), _load(v, width, j, tile.walked))
        return outs, total * kept + weights.sum(1), higher

    start = _zeros(tile, width), jnp.zeros(tile.own), jnp.full(tile.own, _LOWEST)
    outs, total, row_max = _walk(spans_ref, step, start)
    _store(out, [o / total[:, None] for o in outs], width)
    lse[...] = row_max + jnp.log2(total)


def _to_queries_kernel(
    spans_ref, own_ids, ids, q, d_out, lse, through_sum, k, v, to_q, *, tile: Tile, width: int
) -> None:
    queries, pulls = _load(q, width), _load(d_out, width)
    log_total, through = lse[...], through_sum[...]

    def step(masked: bool, j: jax.Array, sums: list[jax.Array]) -> list[jax.Array]:
        keys = _load(k, width, j, tile.walked)
        logits = _inner(queries, keys)
        if masked:
            logits = _mask(logits, own_ids, ids, j, tile)
        weights = jnp.exp2(logits * _scale(width) - log_total[:, None])
        to_logits = weights * (_inner(pulls, _load(v, width, j, tile.walked)) - through[:, None])
        return _add(sums, to_logits.astype(k.dtype), keys)

    sums = _walk(spans_ref, step, _zeros(tile, width))
    _store(to_q, [x / math.sqrt(width) for x in sums], width)


def _to_keys_kernel(
    spans_ref, own_ids, ids, k, v, q, d_out, lse, through_sum, to_k, to_v, *, tile: Tile, width: int
) -> None:
    from jax.experimental import pallas as pl

    keys, values = _load(k, width), _load(v, width)

    def step(masked: bool, j: jax.Array, sums: tuple[list[jax.Array], ...]) -> tuple[list[jax.Array], ...]:
        to_keys, to_values = sums
        there = pl.ds(j * tile.walked, tile.walked)
        queries, pulls = _load(q, width, j, tile.walked), _load(d_out, width, j, tile.walked)
        logits = _inner(keys, queries)  # of keys by queries: what follows needs no turning round
        if masked:
            logits = _mask(logits, own_ids, ids, j, tile)
        weights = jnp.exp2(logits * _scale(width) - lse[there][None])
        to_values = _add(to_values, weights.astype(v.dtype), pulls)
        to_logits = weights * (_inner(values, pulls) - through_sum[there][None])
        return _add(to_keys, to_logits.astype(q.dtype), queries), to_values

    to_keys, to_values = _walk(spans_ref, step, (_zeros(tile, width), _zeros(tile, width)))
    _store(to_k, [x / math.sqrt(width) for x in to_keys], width)
    _store(to_v, to_values, width)


def _walk(spans_ref: Any, step: Callable[..., Any], state: Any) -> Any:
    """Three loops over the blocks of the range: the second needs no mask, a fifth to a quarter of its instructions."""
    first, plain, mixed, last = (spans_ref[n] for n in range(4))
    for masked, start, end in ((True, first, plain), (False, plain, mixed), (True, mixed, last)):
        state = jax.lax.fori_loop(start, end, functools.partial(step, masked), state)
    return state


def _mask(logits: jax.Array, own_ids: Any, ids: Any, j: jax.Array, tile: Tile) -> jax.Array:
    from jax.experimental import pallas as pl

    same = own_ids[...][:, None] == ids[pl.ds(j * tile.walked, tile.walked)][None]
    return jnp.where(same, logits, -jnp.inf)


def _scale(width: int) -> float:
    """Of logits whose power is of two, not of e: the one that a GPU has."""
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


def _zeros(tile: Tile, width: int) -> list[jax.Array]:
    return [jnp.zeros((tile.own, wide)) for _, wide in _pieces(width)]


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
