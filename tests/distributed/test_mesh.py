"""The mesh and its one table; several devices are virtual CPU devices in a process of their own."""

import os
import pathlib
import re
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compiling import QUICKLY
from helpers.tiny_batch import BATCH, SIGMAS, make_dit
from jax.sharding import PartitionSpec

from sora_jax.distributed.mesh import (
    MESH_AXES,
    MeshConfig,
    check_heads,
    check_sequence_split,
    constrain,
    make_mesh,
    parameter_sharding,
    place_batch,
    sharding,
    spec,
)
from sora_jax.errors import UserError
from sora_jax.models.dit_config import DiTConfig
from sora_jax.train.objectives import make_objective


def test_one_device():
    mesh = make_mesh(MeshConfig(data=-1), jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}
    placed = place_batch(mesh, {"x": np.ones((3, 2), np.float32)})
    assert placed["x"].sharding.spec == PartitionSpec(("data", "fsdp"))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            MeshConfig(data=3),
            r"data=3, fsdp=1, tensor=1, sequence=1\) needs 3 devices and there are 1",
        ),
        (MeshConfig(data=-1, fsdp=2), "needs a multiple of 2 devices and there are 1"),
        (MeshConfig(data=-1, fsdp=-1), "at most one of which may be -1"),
        (MeshConfig(data=0), "needs positive sizes"),
    ],
)
def test_sizes_must_multiply_to_the_devices(config, words):
    with pytest.raises(UserError, match=words):
        make_mesh(config, jax.devices()[:1])


def test_the_table():
    assert spec("BND") == PartitionSpec(("data", "fsdp"), "sequence", None)
    assert sharding(make_mesh(MeshConfig(), jax.devices()[:1]), "BNHF").spec[2] == "tensor"


def test_heads_must_divide_over_tensor_and_sequence():
    mesh = jax.sharding.AbstractMesh((1, 1, 4, 2), MESH_AXES)
    check_heads(12)  # no mesh is set
    with jax.sharding.use_abstract_mesh(mesh):
        check_heads(16)
        with pytest.raises(
            UserError, match=r"12 heads .* tensor x sequence = 8 devices: .* 1, 2, 3, 4, 6, 12"
        ):
            check_heads(12)
        check_heads(12, DiTConfig(size="B", sequence="ring").heads_over)
        with pytest.raises(
            UserError, match=r"6 heads .* over tensor = 4 .*: make config.mesh.tensor one of 1, 2, 3, 6"
        ):
            check_heads(6, "tensor")


def test_slots_must_divide_over_sequence():
    check_sequence_split(28, 8)  # no mesh is set
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1, 2, 1, 8), MESH_AXES)):
        check_sequence_split(64, 0)
        for patches, words, fit in ((28, 8, "32 and 8"), (32, 4, "32 and 8")):
            with pytest.raises(
                UserError, match=f"{patches} positions .* sequence = 8 .* such as {fit} .*seq_len"
            ):
                check_sequence_split(patches, words)
        model = jax.eval_shape(lambda: make_dit())
        with pytest.raises(UserError, match="20 positions for patches and 6 for text"):
            jax.eval_shape(model, BATCH.patches, BATCH, SIGMAS[0])


def test_training_tells_what_a_mesh_can_not_split_before_it_reads_data(tmp_path):
    config = runpy.run_path(str(pathlib.Path(__file__).parents[2] / "configs" / "toyworld_dit.py"))[
        "get_config"
    ]()
    key = jax.random.key(0)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1, 1, 1, 7), MESH_AXES)):
        with pytest.raises(UserError, match=r"3 heads .* sequence = 7 .* set dit.sequence='ring'"):
            make_objective(config, tmp_path).init(key)
        config.dit.sequence = "ring"
        with pytest.raises(UserError, match=r"Sequences of \d+ positions .* over sequence = 7 .*seq_len"):
            make_objective(config, tmp_path).init(key)


def test_constrain_without_a_mesh_does_nothing_and_checks_its_letters():
    x = jnp.ones((2, 3))
    assert constrain(x, "BN") is x
    with pytest.raises(ValueError, match="names 3 axes and the array has 2"):
        constrain(x, "BND")


def test_four_devices_equal_one():
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {QUICKLY}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),  # for helpers
    }
    done = subprocess.run(
        [sys.executable, __file__], env=environment, check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def rows_stay_on_their_devices() -> None:
    """Attention's kernel gives what the reference gives, forward and gradient, and no device asks another."""
    from sora_jax.models.attention.dispatch import attend

    rng = np.random.default_rng(0)
    q, k, v, back = rng.normal(size=(4, 4, 24, 2, 8)).astype(np.float32)
    ids = np.sort(rng.integers(1, 4, (4, 24)), axis=1).astype(np.int32)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2))

    def pulled(q, k, v, back, ids, backend):
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, ids, backend), q, k, v)
        return out, *pull(back)

    with jax.set_mesh(mesh):
        rows = [place_batch(mesh, array) for array in (q, k, v, back, ids)]
        split = jax.jit(pulled, static_argnums=5)
        text = split.lower(*rows, "cpu").compile().as_text()
        asking = re.compile(r" (all-gather|all-reduce|all-to-all|collective-permute)\(")
        # What is left is between axes of one device.
        asked = [line for line in text.splitlines() if asking.search(line)]
        assert all("{'tensor','sequence'}" in line for line in asked), asked
        ours = split(*rows, "cpu")
    for mine, plain in zip(ours, pulled(q, k, v, back, ids, "reference"), strict=True):
        np.testing.assert_allclose(mine, plain, atol=1e-5)


def on_four_devices() -> None:
    import tempfile

    from helpers.fake_objective import LineObjective, get_config

    from sora_jax.train.loop import train

    mesh = make_mesh(MeshConfig(data=2, fsdp=-1))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 1, "sequence": 1}
    assert parameter_sharding(mesh, (3, 8)).spec == PartitionSpec(None, "fsdp")
    assert parameter_sharding(mesh, (3, 5)).spec == PartitionSpec()
    with jax.set_mesh(mesh):
        x = jax.jit(lambda x: constrain(x * 2, "BN"))(jnp.ones((4, 6)))
    assert x.sharding.spec[0] == ("data", "fsdp")
    with pytest.raises(UserError, match="batch of 3 doesn't divide over data x fsdp = 4"):
        place_batch(mesh, np.ones((3, 2)))

    ends = []
    with tempfile.TemporaryDirectory() as folder:
        for name, sizes in (("split", {"data": 2, "fsdp": 2}), ("whole", {"data": 1})):
            config = get_config(4)
            config.mesh = sizes
            if name == "whole":
                jax.devices = lambda: jax.local_devices()[:1]
            ends.append(train(config, f"{folder}/{name}", LineObjective()))
        assert ends[0].params.linear.kernel[...].sharding.spec == PartitionSpec("fsdp")
        for a, b in zip(jax.tree.leaves(ends[0]), jax.tree.leaves(ends[1]), strict=True):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6)
        # The checkpoint of four devices goes on on one.
        config = get_config(6)
        config.mesh = {"data": 1}
        assert int(train(config, f"{folder}/split", LineObjective()).step) == 6


if __name__ == "__main__":
    rows_stay_on_their_devices()
    on_four_devices()
