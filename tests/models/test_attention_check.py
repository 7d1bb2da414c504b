"""Kernels are compared with the reference before a machine's first use of them: planted wrong ones are found."""

import functools
import logging
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.distributed import mesh as meshes
from sora_jax.errors import UserError
from sora_jax.models.attention import check, dispatch
from sora_jax.models.attention.check import check_kernel, exact_attention, small_sequence
from sora_jax.models.attention.dispatch import attend, choose, reference

WIDTH = 8


def with_gradient(change):
    """The reference, with `change` done to the gradients of q, k and v."""

    @jax.custom_vjp
    def kernel(q, k, v, ids):
        return reference(q, k, v, ids)

    def forward(q, k, v, ids):
        return jax.vjp(lambda *qkv: reference(*qkv, ids), q, k, v)

    kernel.defvjp(forward, lambda pull, d_out: (*change(*pull(d_out)), None))
    return kernel


def raises(*_):
    raise NotImplementedError("this machine has no such instruction.\nA long trace")


def fails_when_run(q, k, v, ids):
    def never(_):
        raise RuntimeError("illegal address")

    return jax.pure_callback(never, jax.ShapeDtypeStruct(q.shape, q.dtype), q, vmap_method="sequential")


def leaves_out(q, k, v, ids):
    """As a kernel does that skips one block of keys too many."""
    return reference(q, k, v, jnp.where(jnp.arange(ids.shape[1]) < 512, ids, 10 * ids))


WRONG = {
    "blind to segments": (lambda q, k, v, ids: reference(q, k, v, jnp.ones_like(ids)), "its result is not"),
    "two segments as one": (
        lambda q, k, v, ids: reference(q, k, v, jnp.where(ids == 2, 1, ids)),
        "its result",
    ),
    "one block too few": (leaves_out, "its result is not"),
    "logits 5% too large": (lambda q, k, v, ids: reference(1.05 * q, k, v, ids), "its result is not"),
    "not a number in one slot": (
        lambda q, k, v, ids: reference(q, k, v, ids).at[0, 700, 1, 3].set(jnp.nan),
        "its result is not",
    ),
    "infinite in empty positions": (
        lambda q, k, v, ids: jnp.where(ids[..., None, None] > 0, reference(q, k, v, ids), jnp.inf),
        "its result is not",
    ),
    "queries get nothing back": (
        with_gradient(lambda q, k, v: (0 * q, k, v)),
        "its gradient of queries is not",
    ),
    "keys get the wrong sign back": (
        with_gradient(lambda q, k, v: (q, -k, v)),
        "its gradient of keys is not",
    ),
    "values' heads are swapped": (
        with_gradient(lambda q, k, v: (q, k, v[:, :, ::-1])),
        "its gradient of values is not",
    ),
    "gradients are not numbers": (with_gradient(lambda q, k, v: (q, k, v / 0)), "its gradient of values"),
    "doesn't compile": (raises, r"it fails (NotImplementedError: this machine has no such instruction)"),
    "fails when run": (fails_when_run, "it fails ("),
}


@pytest.fixture(autouse=True)
def forgotten():
    """What one test's process learned, another's must not know."""
    yield
    check._check.cache_clear()
    dispatch._log_once.cache_clear()


@pytest.fixture
def plant(monkeypatch):
    """Makes this machine one with a GPU, as far as the choice of a kernel goes, whose kernel is `kernel`."""

    def take(kernel):
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(dispatch, "platform", lambda: "gpu")
        monkeypatch.setattr(dispatch, "missing", lambda: None)
        monkeypatch.setitem(dispatch.BACKENDS, "gpu", kernel)

    return take


def row(dtype=np.float32):
    q, k, v = np.random.default_rng(1).normal(size=(3, 1, 12, 2, WIDTH)).astype(dtype)
    return q, k, v, np.repeat([1, 2, 0], [6, 4, 2]).astype(np.int32)[None]


def test_the_exact_one_is_the_reference():
    ids, given = small_sequence(WIDTH)
    assert len(set(ids[0])) == 7 and ids.shape[1] % 512 == 0
    out, pull = jax.vjp(lambda *qkv: reference(*qkv, ids), *given[:3])
    exact = exact_attention(ids, *given)
    filled = (ids > 0)[..., None, None]
    for ours, theirs in zip((np.where(filled, out, 0), *pull(given[3])), exact, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_found(name):
    kernel, words = WRONG[name]
    assert words in check_kernel(kernel, "float32", WIDTH)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_right_kernel_is_trusted(dtype):
    assert check_kernel(reference, dtype, 72) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounded_products_are_no_mistake(dtype):
    """As accelerators take float32 products by default: operands of eight bits."""

    def rounded(q, k, v, ids):
        return reference(*(x.astype(jnp.bfloat16) for x in (q, k, v)), ids).astype(q.dtype)

    assert check_kernel(rounded, dtype, 64) is None


def test_auto_takes_the_reference_for_a_wrong_kernel_and_says_so_once(plant, caplog):
    plant(lambda q, k, v, ids: reference(q, k, v, jnp.ones_like(ids)))
    for _ in range(3):
        np.testing.assert_array_equal(attend(*row()), reference(*row()))
    [said] = caplog.messages
    assert "Attention 'gpu' can't be used here (cpu, float32, heads of 8): its result is not" in said
    assert "'reference' is taken" in said and "\n" not in said


@pytest.mark.parametrize("asked", ["gpu", "cpu"])
def test_a_wrong_kernel_that_was_named_is_refused(plant, monkeypatch, asked):
    plant(raises)
    monkeypatch.setitem(dispatch.BACKENDS, "cpu", raises)
    with pytest.raises(
        UserError, match=rf"'{asked}' can't be used here .*no such instruction.*auto or reference"
    ):
        attend(*row(), asked)
    with pytest.raises(UserError):
        choose(asked, "float32", WIDTH)


def test_several_hosts_must_agree_and_so_are_given(plant, monkeypatch):
    plant(raises)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="dit.attention to reference, the same on all hosts"):
        attend(*row())


def test_a_right_kernel_is_used_and_compared_once_a_type_and_width(plant, caplog):
    asked = []

    def kernel(q, k, v, ids):
        asked.append((q.shape[1], q.dtype.name, threading.current_thread() is threading.main_thread()))
        return reference(q, k, v, ids)

    plant(kernel)
    for _ in range(2):
        attend(*row())
        attend(*row(jnp.bfloat16))
        assert choose("auto", jnp.bfloat16, WIDTH) == "gpu"
    compared = [call for call in asked if call[0] == 1536]
    assert compared == [(1536, "float32", False), (1536, "bfloat16", False)]
    assert len(asked) == 2 + 4 and not caplog.messages


def test_it_is_compared_under_any_trace_mesh_and_guard(plant):
    """Where training first reaches attention: in a scan in a gradient in a compiled step on a mesh."""
    calls = []

    def kernel(q, k, v, ids):
        calls.append(jax.sharding.get_abstract_mesh().empty)
        return reference(q, k, v, ids)

    plant(kernel)
    q, k, v, ids = row()

    def loss(q, k, v):
        layer = jax.checkpoint(lambda x, _: (attend(x, k, v, ids), None))
        return jnp.sum(jax.lax.scan(layer, q, None, length=2)[0])

    mesh = meshes.make_mesh(meshes.MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh), jax.default_matmul_precision("bfloat16"), jax.numpy_dtype_promotion("strict"):
        step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        assert all(np.isfinite(x).all() for x in step(q, k, v))
        jax.eval_shape(loss, q, k, v)
    assert calls[0] and calls.count(True) == 1 and len(calls) > 2


def test_nothing_is_run_for_devices_that_are_not_here(monkeypatch):
    """The planner's mesh is of devices far away: their kernel goes into the program, and is not tried here."""
    monkeypatch.setitem(dispatch.BACKENDS, "tpu", raises)
    monkeypatch.setattr(dispatch, "platform", lambda: "tpu")
    assert choose("auto", "bfloat16", 64) == choose("tpu", "bfloat16", 64) == "tpu"
    assert choose("cpu", "bfloat16", 64) == "cpu"


def test_the_cpus_own_is_not_compared_on_cpus(monkeypatch):
    monkeypatch.setattr(dispatch, "check_kernel", functools.partial(pytest.fail, "compared"))
    assert choose("auto", "bfloat16", 64) == choose("cpu", "bfloat16", 64) == "cpu"


def test_how_long_it_took_is_in_the_log(caplog):
    caplog.set_level(logging.INFO, check.__name__)
    check_kernel(reference, "float32", WIDTH)
    assert "compared with the reference in" in caplog.text
