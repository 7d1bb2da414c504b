"""Wan's transformer on meshes of eight simulated devices: what one device gives, forward and gradient."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from helpers.compiling import QUICKLY

TESTS = pathlib.Path(__file__).parents[1]


@pytest.mark.slow  # test_sharding.py has the same layers' parts on every mesh
def test_every_mesh_gives_what_one_device_gives():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 "
        f"--xla_cpu_experimental_onednn_custom_call=false {QUICKLY}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, TESTS / "helpers" / "wan_on_meshes.py"]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    meshes = [json.loads(line) for line in done.stdout.splitlines()]
    assert [mesh["sizes"] for mesh in meshes][-1] == {"data": 2, "tensor": 2, "sequence": 2}
    for mesh in meshes:
        assert max(mesh["error"], mesh["int8"]) < 1e-5, mesh
