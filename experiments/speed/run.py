"""The transformer's step against PyTorch's on the same machine, in one run. See README.md beside.

python experiments/speed/run.py --json experiments/speed/speed.json [--torch PYTHON]
"""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sora_jax.data.packing import Run, pack_rows
from sora_jax.data.patches import coordinates
from sora_jax.models.dit import SIZES, DiT, DiTConfig, forward_flops

HERE = pathlib.Path(__file__).parent
LENGTHS = (2048, 1024, 512, 256, 128, 64, 32, 32)  # one row of 4,096 tokens
WORDS = 16  # a run
WORK = ("forward", "training step")


@click.command()
@click.option("--json", "out", type=click.Path(path_type=pathlib.Path), help="Where to write the figures.")
@click.option("--torch", "python", default=sys.executable, help="A Python that has torch; default: this one.")
@click.option("--size", default="S", type=click.Choice([*SIZES]))
@click.option("--repeats", default=3, help="The best of so many is told.")
@click.option("--lengths", default=",".join(map(str, LENGTHS)), help="Tokens of the runs in the row.")
def main(out: pathlib.Path | None, python: str, size: str, repeats: int, lengths: str) -> None:
    """Prints seconds of both, their ratio, and how much of the matrix products' speed ours reaches."""
    each = tuple(int(length) for length in lengths.split(","))
    peers = torch_seconds(python, size, each, repeats)
    peaks = {dtype: matmul_peak(dtype) for dtype in ("float32", "bfloat16")}
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE
        ).stdout.strip(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {jax.default_backend()}",
        "jax": jax.__version__,
        "torch": peers["torch"] if peers else None,
        "size": size,
        "lengths": each,
        "matmul_gflops": {dtype: peak / 1e9 for dtype, peak in peaks.items()},
        "rows": {},
    }
    click.echo(f"{'DiT-' + size:28}{'JAX':>9}{'PyTorch':>9}{'ratio':>8}{'of matmul peak':>16}")
    for work in WORK:
        for dtype in peaks:
            flops = (1 if work == "forward" else 3) * count(size, each)
            row: dict[str, Any] = {"jax": measure(size, each, dtype, work, repeats), "gflop": flops / 1e9}
            row["utilisation"] = flops / row["jax"] / peaks[dtype]
            told = f"{'–':>9}{'–':>8}"
            if peers:
                row["torch"] = {
                    name.rpartition(", ")[2]: seconds
                    for name, seconds in peers["seconds"].items()
                    if name.startswith(f"{work}, {dtype}")
                }
                row["ratio"] = min(row["torch"].values()) / row["jax"]
                told = f"{min(row['torch'].values()):8.2f}s{row['ratio']:7.2f}×"
            result["rows"][f"{work}, {dtype}"] = row
            click.echo(f"{work + ', ' + dtype:28}{row['jax']:8.2f}s{told}{row['utilisation']:16.0%}")
    if peers:
        for work in WORK:
            ours, theirs = (
                min(pick(row) for name, row in result["rows"].items() if name.startswith(work))
                for pick in (lambda row: row["jax"], lambda row: min(row["torch"].values()))
            )
            result["rows"][f"{work}, best of both"] = {"jax": ours, "torch": theirs, "ratio": theirs / ours}
            click.echo(f"{work + ', the best of each':28}{ours:8.2f}s{theirs:8.2f}s{theirs / ours:7.2f}×")
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")
        with (HERE / "history.jsonl").open("a") as history:
            history.write(json.dumps(result) + "\n")


def count(size: str, lengths: tuple[int, ...]) -> float:
    """Floating-point operations of one forward pass that are worth doing."""
    whole = [length + WORDS for length in lengths]
    config = DiTConfig(size=size, patch=(1, 1, 1))
    return forward_flops(config, sum(whole), float(sum(n * n for n in whole)))


def measure(size: str, lengths: tuple[int, ...], dtype: str, work: str, repeats: int) -> float:
    """Seconds of ours."""
    rng = np.random.default_rng(0)
    noise = lambda *sides: rng.standard_normal(sides, np.float32)
    runs = [
        Run(
            noise(n, 16),
            coordinates((1, 1, n), (1, 1, 1), fps=8.0),
            np.ones(n, np.float32),
            np.zeros(n, np.float32),
            noise(WORDS, 384),
            np.zeros(WORDS, np.float32),
        )
        for n in lengths
    ]
    batch, _ = pack_rows(runs, sum(lengths), WORDS * len(runs), len(runs), 1)
    batch = jax.tree.map(jnp.asarray, batch)
    config = DiTConfig(size=size, patch=(1, 1, 1), dtype=dtype, remat="dots")
    model = DiT(config, rngs=nnx.Rngs(0))
    sigma = jnp.full(batch.condition_runs.shape, 0.5).at[:, 0].set(0.0)
    target = jnp.asarray(noise(*batch.patches.shape))
    if work == "forward":
        forward = jax.jit(lambda model: model(batch.patches, batch, sigma))
        return best(lambda: forward(model), repeats)
    optimizer = optax.adamw(1e-4)

    def step(state):
        model, kept = state
        loss = lambda model: jnp.mean(jnp.square(model(batch.patches, batch, sigma) - target))
        updates, kept = optimizer.update(jax.grad(loss)(model), kept, model)
        return optax.apply_updates(model, updates), kept

    compiled = jax.jit(step, donate_argnums=0)
    state = [(model, optimizer.init(model))]

    def once() -> Any:
        state[0] = compiled(state[0])
        return state[0]

    return best(once, repeats)


def matmul_peak(dtype: str) -> float:
    """Operations a second of a plain matrix product, the fastest of three sizes."""
    speeds = []
    for rows, inner, columns in ((4224, 384, 1536), (2048, 1024, 1024), (1472, 768, 192)):
        a, b = jnp.ones((rows, inner), dtype), jnp.ones((inner, columns), dtype)
        product = jax.jit(lambda a, b: a @ b)
        speeds.append(2 * rows * inner * columns / best(lambda a=a, b=b, f=product: f(a, b), 10))
    return max(speeds)


def best(function: Callable[[], Any], repeats: int) -> float:
    """Least seconds, the first call not counted."""
    jax.block_until_ready(function())
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(function())
        taken.append(time.perf_counter() - started)
    return min(taken)


def torch_seconds(python: str, size: str, lengths: tuple[int, ...], repeats: int) -> dict[str, Any] | None:
    """What torch_dit.py prints; None, with a sentence, where there is no torch."""
    width, layers, heads = SIZES[size]
    asked = {
        "width": width,
        "layers": layers,
        "heads": heads,
        "lengths": [length + WORDS for length in lengths],
        "repeats": repeats,
        "threads": os.cpu_count(),
    }
    command = [python, str(HERE / "torch_dit.py"), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        click.echo(
            f"note: nothing to compare with ({reason}): give --torch a Python that has torch", err=True
        )
        return None
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
