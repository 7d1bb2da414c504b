"""The transformer on meshes of eight simulated devices: what one device gives, and collectives where they belong."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from helpers.compiling import QUICKLY
from helpers.on_meshes import CONFIG, TOKENS

TESTS = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def meshes():
    """What tests/helpers/on_meshes.py prints: a mesh's sizes, its error, its collectives."""
    environment = os.environ | {
        # Programs that call oneDNN can't be kept for the next time (see backend.py).
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 "
        f"--xla_cpu_experimental_onednn_custom_call=false {QUICKLY}",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, TESTS / "helpers" / "on_meshes.py"],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_every_mesh_gives_what_one_device_gives(meshes):
    assert len(meshes) == 19
    for mesh in meshes:
        assert mesh["error"] < 1e-5, mesh


def test_collectives_are_where_the_design_says(meshes):
    found = {tuple(mesh["sizes"]): mesh["collectives"] for mesh in meshes if mesh["model"] == "dit"}
    # Copies of the model share their gradients, and nothing else.
    assert set(found["data",]) == {"all-reduce"}
    # Parameters are gathered layer by layer; activations stay where their rows are.
    for axes in (("fsdp",), ("data", "fsdp")):
        assert set(found[axes]) <= {"all-gather", "all-reduce", "reduce-scatter"}
        assert found[axes]["all-gather"]
    # Rows become whole for attention, and are split again behind it.
    for axes, kinds in found.items():
        assert ("all-to-all" in kinds) == bool({"sequence", "tensor"} & set(axes)), axes


def test_rows_are_exchanged_by_heads_as_often_as_they_must(meshes):
    """q, k, v and the result, there and back; and all four once more, as `remat` recomputes them."""
    [kinds] = [
        mesh["collectives"] for mesh in meshes if (mesh["model"], [*mesh["sizes"]]) == ("dit", ["sequence"])
    ]
    assert kinds["all-to-all"][str(8 * TOKENS // 8 * CONFIG.width * 4)] == CONFIG.layers * 12


def test_a_ring_sends_what_the_design_says_and_nothing_else_is_exchanged_between_tokens(meshes):
    for mesh in (mesh for mesh in meshes if mesh["model"] == "ring"):
        kinds, devices = mesh["collectives"], mesh["sizes"]["sequence"]
        rows = 8 // (mesh["sizes"].get("data", 1) * mesh["sizes"].get("fsdp", 1))
        share = rows * TOKENS * CONFIG.width * 4 // (devices * mesh["sizes"].get("tensor", 1))
        # Forward k and v; backward q, what came back, and what q gathers, which goes home and one hop more.
        hops = 2 * (devices - 1) + 2 * (devices - 1) + devices + 1
        # With two devices the first of them brings nothing, and the compiler takes it out of the layers' loop.
        sent = CONFIG.layers * hops if devices > 2 else CONFIG.layers * (hops - 1) + 1
        assert kinds["collective-permute"][str(share)] == sent, mesh
        if "tensor" not in mesh["sizes"]:  # which has weights exchanged
            narrow = rows * TOKENS * 4
            assert max(map(int, kinds["all-to-all"])) <= narrow, mesh


def test_activations_of_a_row_are_never_gathered(meshes):
    for mesh in meshes:
        assert not mesh["gathered"], mesh
