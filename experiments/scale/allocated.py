"""Memory that the planner says, beside memory that the same step takes when it runs, on simulated devices.

    python experiments/scale/allocated.py --devices 8

The step is compiled, given a state and a batch of zeros, and run three times, while a thread reads how much memory this
process holds. A CPU's devices are threads of one process, so what they hold together is what it holds more than before.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import pathlib
import sys
import threading
import time
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np

PAGE = os.sysconf("SC_PAGE_SIZE")
CASES = {
    "data 8, keep everything": ("--config.pipeline.batch_size=8", "--config.mesh.data=8"),
    "data 8, rematerialised": (
        "--config.pipeline.batch_size=16",
        "--config.mesh.data=8",
        "--config.dit.remat=none",
    ),
    "fsdp 8": (
        "--config.pipeline.batch_size=8",
        "--config.mesh.fsdp=8",
        "--config.dit.size=B",
        "--config.dit.remat=none",
    ),
    "sequence 2, tensor 2, data 2": (
        *("--config.pipeline.batch_size=4", "--config.mesh.sequence=2", "--config.mesh.tensor=2"),
        "--config.dit.size=B",
    ),
}


def held() -> int:
    """Bytes of this process's memory now."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * PAGE


class Watch(threading.Thread):
    """Notes the most that is held while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.over = held(), False

    def run(self) -> None:
        while not self.over:
            self.most = max(self.most, held())
            time.sleep(0.002)


def measure(name: str, overrides: tuple[str, ...], devices: int) -> dict[str, float]:
    from sora_jax.distributed.chips import read_topology
    from sora_jax.planner import programs
    from sora_jax.train.__main__ import parse

    config = parse(["--config", "configs/ladder.py:Ti", "--workdir", "none", *overrides])[0]
    spec = programs.make_step_spec(config, "train", read_topology(f"cpu:{devices}"))
    said = sum(programs.build(spec).memory.values()) * devices
    traced, _, _ = programs.trace(spec)
    compiled = traced.lower().compile()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what compiling held goes back first
    before, watch = held(), Watch()
    watch.start()
    state, batch, key = jax.tree.map(_filled, compiled.in_avals[0], compiled.input_shardings[0])
    for _ in range(3):
        state, metrics = compiled(state, batch, key)
    jax.block_until_ready((state, metrics))
    watch.over = True
    watch.join()
    took = watch.most - before
    return {
        "case": name,
        "mesh": spec.mesh,
        "said_mib": said / 2**20,
        "took_mib": took / 2**20,
        "ratio": said / took,
    }


def _filled(leaf: Any, place: jax.sharding.Sharding) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.device_put(jax.random.key(0), place)
    # Not by a program: compiling a hundred of them would be counted as memory of the step.
    return jax.device_put(np.zeros(leaf.shape, leaf.dtype), place)


@click.command()
@click.option("--devices", type=int, default=8)
@click.option(
    "--case", type=click.Choice([*CASES]), help="One of them, in this process; else all, one process each."
)
@click.option("--json", "path", type=click.Path(path_type=pathlib.Path), help="Write the figures here.")
def main(devices: int, case: str | None, path: pathlib.Path | None) -> None:
    if case:
        jax.config.update("jax_num_cpu_devices", devices)
        jax.config.update("jax_enable_compilation_cache", False)
        print(json.dumps(measure(case, CASES[case], devices)))
        return
    import subprocess

    rows = []
    for name in CASES:
        command = [sys.executable, __file__, "--devices", str(devices), "--case", name]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(
            f"| {name} | {rows[-1]['said_mib']:.0f} | {rows[-1]['took_mib']:.0f} | {rows[-1]['ratio']:.2f} |"
        )
    if path:
        path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
