"""A run's checkpoint is of no mesh: saved by eight devices it goes on on four, then on one, bit for bit."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile
import types

import jax
import numpy as np
import pytest
from flax import nnx
from helpers.compiling import QUICKLY
from helpers.records import records
from helpers.tiny_batch import CONFIG

from sora_jax.checkpoints.store import CheckpointConfig, Checkpoints, named_leaves
from sora_jax.data.pipeline import PipelineConfig, make_pipeline
from sora_jax.distributed.mesh import (
    MeshConfig,
    Share,
    batch_share,
    make_mesh,
    parameter_shardings,
    place_batch,
    sharding,
)
from sora_jax.models.dit import DiT
from sora_jax.train.loop import TrainState, make_steps
from sora_jax.train.optim import OptimConfig

MESHES = ((8, {"data": 8}), (4, {"fsdp": 2, "tensor": 2}), (1, {}))
ROWS = PipelineConfig(seq_len=64, text_len=40, batch_size=8, shards=4, max_segments=8, num_packing_bins=8)


@pytest.mark.slow
def test_eight_devices_four_and_one():
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {QUICKLY}", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | flags,
        check=False,
        capture_output=True,
        text=True,
        timeout=230,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def states() -> tuple[TrainState, TrainState]:
    """A training state of a tiny transformer, in shapes and in numbers that are all different."""
    config = dataclasses.replace(CONFIG, width=48, heads=4)
    objective = types.SimpleNamespace(init=lambda key: DiT(config, rngs=nnx.Rngs(key)))
    init, _ = make_steps(objective, OptimConfig(name="muon", lr=1e-3, ema_decay=0.9))
    shapes = jax.eval_shape(init, jax.random.key(0))
    rng = np.random.default_rng(0)
    return shapes, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)


def from_mesh_to_mesh(folder: pathlib.Path) -> None:
    """Each restore also compares the bits' sums, made on one mesh, with those on the next."""
    shapes, expected = states()
    data = records(30)
    wanted = iter(make_pipeline(ROWS, data))
    state = stream = None
    for step, (devices, sizes) in enumerate(MESHES, 1):
        mesh = make_mesh(MeshConfig(**sizes), jax.devices()[:devices])
        placed = parameter_shardings(mesh, shapes)
        before, stream = stream, iter(make_pipeline(ROWS, data, batch_share(mesh)))
        checkpoints = Checkpoints(folder, CheckpointConfig())
        if before is None:
            state = jax.device_put(expected, placed)
        else:
            templates = jax.tree.map(
                lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, placed
            )
            state = TrainState.of(checkpoints.restore(templates.trees(), stream))
        for (name, leaf), shape, number in zip(
            named_leaves(state).items(), jax.tree.leaves(placed), jax.tree.leaves(expected), strict=True
        ):
            assert leaf.sharding.is_equivalent_to(shape, leaf.ndim), name
            np.testing.assert_array_equal(np.asarray(leaf), number, err_msg=name, strict=True)
        rows = place_batch(mesh, next(stream))
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(rows), next(wanted))
        assert rows.patches.sharding.is_equivalent_to(sharding(mesh, "B"), 3)
        checkpoints.save(step, state.trees(), stream)
        checkpoints.close()


if __name__ == "__main__":
    assert Share() == batch_share(make_mesh(MeshConfig(), jax.devices()[:1]))
    with tempfile.TemporaryDirectory() as folder:
        from_mesh_to_mesh(pathlib.Path(folder))
