"""The GPU's kernel in plain JAX: what it leaves out, heads of every width, and that it lowers for CUDA."""

from functools import lru_cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.slow import rest_slow
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from sora_jax.errors import UserError
from sora_jax.models.attention import dispatch
from sora_jax.models.attention.blocks import CHECKPOINT, masked_block_ranges
from sora_jax.models.attention.gpu import BlockSizes, KernelBlocks, flash, missing

CONFIGS = KernelBlocks(BlockSizes(16, 8, 4, 1), BlockSizes(16, 8, 4, 1), BlockSizes(8, 16, 4, 1))
small = partial(flash, interpret=True, configs=CONFIGS)
# 44 positions, no multiple of a block: segments of uneven lengths, one of them over several blocks, and padding.
ROW = np.repeat([1, 2, 3, 4, 0], [5, 26, 1, 7, 5]).astype(np.int32)


def tensors(width: int, heads: int = 2) -> np.ndarray:
    """q, k, v and the gradient that comes back into the output; none comes back into empty positions."""
    drawn = np.random.default_rng(0).normal(size=(4, 1, len(ROW), heads, width)).astype(np.float32)
    drawn[3] *= (ROW > 0)[:, None, None]
    return drawn


@lru_cache
def d_out(attend):
    def output_and_gradients(q, k, v, back, ids):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, ids[None]), q, k, v)
        return out, *pull(back)

    # Most of the time goes into compiling a kernel's text for the CPU.
    return jax.jit(output_and_gradients, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize(
    ("width", "dtype", "tolerance"),
    rest_slow(
        [(72, "float32", 1e-5), (16, "float32", 1e-5), (72, "bfloat16", 0.05), (128, "float32", 1e-5)],
        several=True,
    ),
)
def test_heads_of_any_width_are_as_the_reference_has_them(width, dtype, tolerance):
    """72 is a power of two and a piece that reaches over the head's end; what lies there must not be read."""
    arrays = [jnp.asarray(x, dtype) for x in tensors(width)]
    expected = d_out(dispatch.reference)(*(x.astype(jnp.float32) for x in arrays), ROW)
    for name, ours, theirs in zip(
        ("output", "dq", "dk", "dv"), d_out(small)(*arrays, ROW), expected, strict=True
    ):
        assert ours.dtype == dtype
        ours, theirs = (np.asarray(x, np.float32)[:, ROW > 0] for x in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, atol=tolerance, rtol=tolerance, err_msg=name)


def test_blocks_of_other_segments_are_not_read():
    """Not a number in a block of another segment would be in every sum, weighted with zero or not."""
    ids = np.repeat([1, 2, 3, 0], 16).astype(np.int32)
    q, k, v, back = np.random.default_rng(0).normal(size=(4, 1, 64, 1, 16)).astype(np.float32)
    mine = ids == 2
    q, k, v, back = (np.where(mine[:, None, None], x, np.nan) for x in (q, k, v, back))
    for x in d_out(small)(q, k, v, back, ids):
        assert np.isfinite(np.asarray(x)[:, mine]).all()
        assert np.isnan(np.asarray(x)[:, ~mine]).all()  # else the test could not fail


@given(ids=st.lists(st.integers(0, 3), min_size=32, max_size=32), sizes=st.sampled_from([(4, 8), (8, 4)]))
def test_spans_hold_every_pair_of_a_segment_and_their_middle_nothing_else(ids, sizes):
    row = np.array(ids, np.int32)
    mine, others = row.reshape(-1, sizes[0]), row.reshape(-1, sizes[1])
    for i, (first, plain, mixed, last) in enumerate(
        np.asarray(masked_block_ranges(jnp.asarray(row[None]), *sizes))[0]
    ):
        assert 0 <= first <= plain <= mixed <= last <= len(others)
        assert first * sizes[1] <= i * sizes[0] < last * sizes[1], "it doesn't see itself"
        for j, other in enumerate(others):
            assert first <= j < last or not set(mine[i]) & set(other) - {0}
            assert not plain <= j < mixed or (mine[i][:, None] == other).all()


def test_spans_of_a_packed_row_are_as_short_as_can_be():
    row = np.repeat([1, 2, 3, 0], [24, 18, 6, 16]).astype(np.int32)
    got = np.asarray(masked_block_ranges(jnp.asarray(row[None]), 8, 4))[0]
    expected = (
        [(0, 0, 6, 6)] * 3 + [(6, 6, 10, 11)] * 2 + [(6, 12, 12, 12), (12, 12, 14, 14), (14, 14, 16, 16)]
    )
    np.testing.assert_array_equal(got, expected)


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="JAX 0.10 recomputes the kernel, whatever the policy saves"
)
def test_the_backward_pass_keeps_the_result_and_does_not_compute_it_again():
    keep = jax.checkpoint_policies.save_only_these_names(CHECKPOINT)
    q, k, v, _ = tensors(16)
    loss = lambda q, k, v: small(q, k, v, ROW[None]).sum()
    kept, lost = (
        str(jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=policy)))(q, k, v)).count("pallas_call[")
        for policy in (keep, jax.checkpoint_policies.nothing_saveable)
    )
    assert (kept, lost) == (3, 4)


def test_it_lowers_for_cuda_at_dit_xl_s_shapes():
    """As far as a machine without a GPU can tell: Triton's text is made and verified, not compiled."""
    tokens = jax.ShapeDtypeStruct((1, 32768, 16, 72), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((1, 32768), jnp.int32)

    def gradients(q, k, v, ids, back):
        out, pull = jax.vjp(lambda q, k, v: flash(q, k, v, ids), q, k, v)
        return out, *pull(back)

    h100 = AbstractDevice("NVIDIA H100 80GB HBM3", None, "cuda")
    with use_abstract_mesh(AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=h100)):
        for function, given, kernels in (
            (flash, (tokens, tokens, tokens, ids), 1),
            (gradients, (tokens, tokens, tokens, ids, tokens), 3),
        ):
            lowered = jax.jit(function).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
            assert lowered.count("__gpu$xla.gpu.triton") == kernels
            assert "32768x32768" not in lowered


@pytest.mark.parametrize(("why", "taken"), [(None, "gpu"), ("it's old", "reference")])
def test_a_gpu_takes_its_kernel_where_it_can(monkeypatch, caplog, why, taken):
    dispatch._log_once.cache_clear()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(dispatch, "missing", lambda: why)
    monkeypatch.setattr(dispatch, "check_kernel", lambda *_: None)
    names = [*dispatch.BACKENDS]
    backends = {name: lambda q, *_, name=name: np.full_like(q, names.index(name)) for name in names}
    monkeypatch.setattr(dispatch, "BACKENDS", backends)
    used = lambda asked: names[int(dispatch.attend(q, q, q, ids, asked).max())]
    q, ids = np.zeros((1, 4, 1, 16), np.float32), np.ones((1, 4), np.int32)
    for asked in ("auto", "tpu", "auto"):
        assert used(asked) == taken
    assert used("cpu") == "cpu"
    said = ["Attention 'gpu' can't be used here (cpu, float32, heads of 16): it's old; 'reference' is taken"]
    others = ["Attention 'tpu' needs another machine than this one (gpu): the best of this one is taken."]
    assert [message for message in caplog.messages if "other" in message] == others
    told = [message.partition(", which")[0] for message in caplog.messages if "other" not in message]
    assert told == (said if why else [])
    if why:
        with pytest.raises(UserError, match="it's old. Set dit.attention to auto"):
            dispatch.attend(q, q, q, ids, "gpu")


@pytest.mark.parametrize(
    ("capability", "can"), [("9.0", True), ("8.0", True), ("7.5", False), ("gfx942", False), ("12.0", True)]
)
def test_gpus_of_nvidia_since_ampere_can(monkeypatch, capability, can):
    device = SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert (missing() is None) == can
    assert can or capability in missing()
