"""Every attention backend against softmax attention in NumPy, where each segment is alone."""

import math
import re
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_jax.errors import UserError
from sora_jax.models.attention import tpu
from sora_jax.models.attention.blocks import overlapping_blocks
from sora_jax.models.attention.cpu import SIZES, Blocks, block_ranges, blocked, make_blocks
from sora_jax.models.attention.dispatch import BACKENDS, attend, reference
from sora_jax.models.attention.gpu import BlockSizes, KernelBlocks, flash
from sora_jax.models.attention.ring import ring
from sora_jax.models.attention.tpu import splash
from sora_jax.models.dit_config import Backend

B, N, H, F = 2, 16, 2, 8
# Kernels of other machines in plain JAX, and blocks so small that rows of 16 have several.
CONFIGS = KernelBlocks(BlockSizes(8, 4, 4, 1), BlockSizes(8, 4, 4, 1), BlockSizes(4, 8, 4, 1))
KERNELS = BACKENDS | {
    "tpu": partial(splash, interpret=True),
    "gpu": partial(flash, interpret=True, configs=CONFIGS),
    "cpu, small": partial(blocked, sizes=(6, 5, 4, 2)),
    "cpu, several segments a block": partial(blocked, sizes=(8, 6, 2)),
    "cpu, two sizes": partial(blocked, sizes=(4, 1)),
    "ring of one": ring,
    "ring of one, chunks": partial(ring, chunk=5),
}
every_backend = pytest.mark.parametrize("backend", KERNELS)


def tensors(seed: int = 0) -> tuple[np.ndarray, ...]:
    """q, k, v and the gradient that comes back into the output."""
    return tuple(np.random.default_rng(seed).normal(size=(4, B, N, H, F)).astype(np.float32))


@partial(jax.jit, static_argnums=1)
def cut(ids: jax.Array, sizes: tuple[int, ...]) -> tuple[tuple[Blocks, ...], dict[tuple[int, int], Any]]:
    """The blocks of each size, and for sets a and b of them which of b's each of a's visits."""
    block_sets = make_blocks(ids, sizes)
    pairs = np.ndindex(len(block_sets), len(block_sets))
    return block_sets, {(a, b): block_ranges(block_sets[a], block_sets[b]) for a, b in pairs}


@lru_cache
def packed(backend: str) -> Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]]:
    @jax.jit
    def output_and_gradients(q, k, v, d_out, segment_ids):
        with jax.default_matmul_precision("highest"):
            out, pull = jax.vjp(lambda q, k, v: KERNELS[backend](q, k, v, segment_ids), q, k, v)
            return out, pull(d_out)

    return output_and_gradients


def alone(q: np.ndarray, k: np.ndarray, v: np.ndarray, d_out: np.ndarray) -> tuple[np.ndarray, ...]:
    """One run [n,H,F] by itself: output and the gradients of q, k, v, in float64."""
    q, k, v, d_out = (x.astype(np.float64).swapaxes(0, 1) for x in (q, k, v, d_out))
    logits = q @ k.swapaxes(1, 2) / np.sqrt(F)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    to_weights = d_out @ v.swapaxes(1, 2)
    to_logits = weights * (to_weights - (weights * to_weights).sum(-1, keepdims=True)) / np.sqrt(F)
    results = weights @ v, to_logits @ k, to_logits.swapaxes(1, 2) @ q, weights.swapaxes(1, 2) @ d_out
    return tuple(x.swapaxes(0, 1) for x in results)


def check_runs(backend: str, segment_ids: np.ndarray, seed: int = 0) -> None:
    q, k, v, d_out = tensors(seed)
    d_out = d_out * (segment_ids > 0)[..., None, None]
    out, gradients = packed(backend)(q, k, v, d_out, segment_ids)
    got = [np.asarray(x) for x in (out, *gradients)]
    assert all(np.isfinite(x).all() for x in got)
    for row in range(B):
        for segment in set(segment_ids[row]) - {0}:
            positions = segment_ids[row] == segment
            expected = alone(*(x[row, positions] for x in (q, k, v, d_out)))
            for name, ours, theirs in zip(("output", "dq", "dk", "dv"), got, expected, strict=True):
                np.testing.assert_allclose(
                    ours[row, positions], theirs, atol=1e-5, rtol=1e-5, err_msg=f"{name} of run {segment}"
                )
    for name, gradient in zip("qkv", got[1:], strict=True):
        assert not gradient[segment_ids == 0].any(), f"padding's {name} has a part in a segment's output"


def test_every_backend_has_a_name_in_the_configuration():
    assert get_args(Backend) == ("auto", *BACKENDS)


@every_backend
@settings(max_examples=40)
@given(ids=st.lists(st.integers(0, 4), min_size=B * N, max_size=B * N), seed=st.integers(0, 9))
def test_packed_equals_alone(backend, ids, seed):
    """Segments of any lengths, in any order, even torn ones: only the ids say who belongs together."""
    check_runs(backend, np.array(ids, np.int32).reshape(B, N), seed)


@every_backend
def test_packed_equals_alone_at_the_extremes(backend):
    full, singles, empty, last = (
        np.full(N, 1),
        np.arange(1, N + 1),
        np.zeros(N),
        np.eye(N)[-1],
    )
    check_runs(backend, np.stack([full, empty]).astype(np.int32))
    check_runs(backend, np.stack([singles, last]).astype(np.int32))


@every_backend
def test_what_lies_in_other_slots_does_not_matter(backend):
    """Not even when it's huge: a mask that only adds a large negative number to the logits would show."""
    q, k, v, d_out = tensors()
    ids = np.tile(np.repeat([1, 2, 0], [6, 6, 4]), (B, 1)).astype(np.int32)
    mine = (ids == 1)[..., None, None]
    here, gradients_here = packed(backend)(q, k, v, d_out * mine, ids)
    other = [np.where(mine, x, 1e4 * x) for x in (q, k, v)]
    there, gradients_there = packed(backend)(*other, d_out * mine, ids)
    np.testing.assert_allclose(there[:, :6], here[:, :6], rtol=1e-6)
    for a, b in zip(gradients_here, gradients_there, strict=True):
        np.testing.assert_allclose(b[:, :6], a[:, :6], rtol=1e-5, atol=1e-6)
        assert not np.asarray(b[:, 6:]).any()
    assert np.isfinite(there).all()


@every_backend
def test_bfloat16_keeps_its_dtype_and_its_three_digits(backend):
    ids = np.tile(np.repeat([1, 2, 0], [7, 5, 4]), (B, 1)).astype(np.int32)
    q, k, v, _ = (jnp.asarray(x, jnp.bfloat16) for x in tensors())
    out = jax.jit(KERNELS[backend])(q, k, v, ids)
    assert out.dtype == jnp.bfloat16
    exact = attend(*(x.astype(jnp.float32) for x in (q, k, v)), ids, "reference")
    filled = np.s_[:, :12]  # what padding holds is a kernel's own affair
    np.testing.assert_allclose(np.asarray(out, np.float32)[filled], exact[filled], atol=0.03)


def test_a_ring_in_layers_holds_no_array_of_all_pairs():
    """Masks depend on ids alone: without care JAX computes all of them at once, before the layers."""
    n, F = 64, 2

    def loss(x, ids):
        layer = lambda x, _: (ring(x, x, x, ids, chunk=8), None)
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, None, length=3)[0])

    shapes = jax.ShapeDtypeStruct((1, n, 1, F), jnp.float32), jax.ShapeDtypeStruct((1, n), jnp.int32)
    text = str(jax.make_jaxpr(jax.grad(loss))(*shapes))
    sizes = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"\w\[(\d[\d,]*)\]", text)]
    assert n * F in sizes
    assert max(sizes) <= 3 * n * F  # what three layers keep


def test_auto_is_what_suits_this_machine():
    q, k, v, _ = tensors()
    ids = np.ones((B, N), np.int32)
    best = jax.default_backend() if jax.default_backend() in BACKENDS else "reference"
    np.testing.assert_array_equal(
        *(jax.jit(partial(attend, backend=name))(q, k, v, ids) for name in ("auto", best))
    )


def test_an_unknown_backend_is_refused_and_the_known_ones_are_named():
    q, k, v, _ = tensors()
    with pytest.raises(UserError, match="'flash'.*reference"):
        attend(q, k, v, np.ones((B, N), np.int32), "flash")


def test_a_kernel_of_another_machine_is_given_and_this_machine_s_taken(caplog):
    q, k, v, _ = tensors()
    ids = np.ones((B, N), np.int32)
    np.testing.assert_array_equal(attend(q, k, v, ids, "tpu"), attend(q, k, v, ids))
    assert (
        "Attention 'tpu' needs another machine than this one (cpu): the best of this one is taken."
        in caplog.text
    )


@given(ids=st.lists(st.integers(0, 5), min_size=24, max_size=24))
def test_blocks_that_are_left_out_share_no_run(ids):
    row = np.array(ids, np.int32)
    share = np.asarray(overlapping_blocks(jnp.asarray(row[None]), 4))[0]
    for a, b in np.ndindex(share.shape):
        here, there = (set(row[4 * i : 4 * i + 4]) - {0} for i in (a, b))
        assert share[a, b] or not here & there


def test_a_packed_row_leaves_out_all_that_can_be_left_out():
    """Text first, then segments in order: a block sees its own segment's blocks, text too, and its neighbours'."""
    row = np.concatenate([np.repeat([1, 2, 3, 0], [4, 4, 4, 4]), np.repeat([1, 2, 3, 0], [16, 24, 8, 16])])
    share = np.asarray(overlapping_blocks(jnp.asarray(row[None].astype(np.int32)), 4))[0]
    exact = np.array([[bool(set(a) & set(b) - {0}) for b in row.reshape(-1, 4)] for a in row.reshape(-1, 4)])
    np.testing.assert_array_equal(share, exact | np.eye(len(exact), dtype=bool))


@pytest.mark.slow
@given(
    ids=st.lists(st.integers(0, 6), min_size=80, max_size=80),
    sizes=st.sampled_from(((7, 6, 5, 3), (30, 12, 8), (4, 1))),
)
def test_every_slot_is_one_block_s_and_every_pair_of_a_segment_is_visited(ids, sizes):
    """Torn segments too: there is room for all the blocks that there can be."""
    rows = np.array(ids, np.int32).reshape(2, 40)
    block_sets, ranges = jax.device_get(cut(rows, sizes))
    owned = []
    for blocks in block_sets:
        assert (blocks.stop - blocks.start <= blocks.size).all()
        own = zip(blocks.start[: blocks.count], blocks.stop[: blocks.count], strict=True)
        owned.append([start + np.flatnonzero(blocks.segments[start:stop] >= 0) for start, stop in own])
    assert sorted(slot for kind in owned for block in kind for slot in block) == [*np.flatnonzero(rows)]
    of = [[{(slot // 40, rows.flat[slot]) for slot in block} for block in kind] for kind in owned]
    for (a, b), (first, last) in ranges.items():
        for i, j in np.ndindex(len(of[a]), len(of[b])):
            together = of[a][i] & of[b][j]
            if block_sets[a].whole or block_sets[b].whole:
                assert not together or (a, i) == (b, j)
            else:
                assert not together or first[i] <= j < last[i]


def test_a_segment_is_visited_as_if_it_had_the_row_alone():
    """Blocks begin where segments do: three segments of 489 tokens take three pairs, in a grid of 512 seven."""

    def pairs(*lengths: int) -> dict[tuple[int, int], int]:
        ids = np.repeat(np.arange(len(lengths), dtype=np.int32) + 1, lengths)
        # Rows of one length, so that they are one program.
        block_sets, ranges = jax.device_get(cut(np.pad(ids, (0, 1664 - len(ids)))[None], SIZES))
        found = {(own.size, own.size): int(own.count) for own in block_sets if own.whole}
        for (a, b), (first, last) in ranges.items():
            own, others = block_sets[a], block_sets[b]
            if not (own.whole or others.whole):
                found[own.size, others.size] = int((last - first)[: int(own.count)].sum())
        return {sizes: count for sizes, count in found.items() if count}

    assert SIZES == (512, 384, 256, 128)
    assert pairs(489, 489, 489, 100, 28, 60) == {(512, 512): 3, (128, 128): 2}
    assert pairs(336, 240, 128, 50) == {(384, 384): 1, (256, 256): 1, (128, 128): 2}
    assert pairs(1040) == {(512, 512): 4, (512, 128): 2, (128, 512): 2, (128, 128): 1}
    assert pairs(512 + 385) == {(512, 512): 4}
    assert pairs(*[30] * 8) == {(128, 128): 2}


def test_blocks_of_long_rows_on_tpus_grow_and_give_the_same(monkeypatch):
    """Rows of hundreds of thousands of tokens: here of 700, with bounds as many times smaller."""
    q, k, v, d_out = np.random.default_rng(0).normal(size=(4, 1, 700, 1, F)).astype(np.float32)
    ids = np.repeat([1, 2, 0, 3], [300, 90, 10, 300])[None].astype(np.int32)

    def output_and_gradients(attention):
        @jax.jit
        def pulled(q, k, v, d_out):
            with jax.default_matmul_precision("highest"):
                out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, ids), q, k, v)
                return out, *pull(d_out)

        return [np.asarray(x)[ids > 0] for x in pulled(q, k, v, d_out * (ids > 0)[..., None, None])]

    plain = output_and_gradients(reference)
    for name, bound in (("BLOCKS", (128,)), ("MAX_BLOCKS", 3), ("MAX_GRADIENT", 128)):
        monkeypatch.setattr(tpu, name, bound)
    asked = []
    watched = lambda ids, block, other=None: (
        asked.append((block, other)) or overlapping_blocks(ids, block, other)
    )
    monkeypatch.setattr(tpu, "overlapping_blocks", watched)
    for ours, expected in zip(output_and_gradients(partial(splash, interpret=True)), plain, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
    assert asked == [(256, None), (128, 256)]
