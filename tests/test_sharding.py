"""The transformer on meshes of eight simulated devices: what one device gives, and collectives where they belong."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def meshes():
    """What tests/on_meshes.py prints: a mesh's sizes, its error, its collectives."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, HERE / "on_meshes.py"], env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_mesh_gives_what_one_device_gives(meshes):
    assert len(meshes) == 15
    for mesh in meshes:
        assert mesh["error"] < 1e-5, mesh


def test_collectives_are_where_the_design_says(meshes):
    found = {tuple(mesh["sizes"]): mesh["collectives"] for mesh in meshes if mesh["model"] == "dit"}
    # Copies of the model share their gradients, and nothing else.
    assert set(found["data",]) == {"all-reduce"}
    # Parameters are gathered layer by layer; activations stay where their rows are.
    for axes in (("fsdp",), ("data", "fsdp")):
        assert set(found[axes]) <= {"all-gather", "all-reduce", "reduce-scatter"}
        assert found[axes]["all-gather"] > 0
    # Rows become whole for attention, and are split again behind it.
    for axes, counts in found.items():
        assert ("all-to-all" in counts) == bool({"sequence", "tensor"} & set(axes)), axes


def test_activations_of_a_row_are_never_gathered(meshes):
    for mesh in meshes:
        assert not mesh["gathered"], mesh
