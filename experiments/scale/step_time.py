"""A training step's time on this machine's accelerator next to what the planner estimates for it.

    python experiments/scale/step_time.py --config configs/ladder.py:S --topology h100:1 --json step_time.json

Sequences are full of clips, as in the planner; numbers are zeros, which cost the same. On a CPU it runs with
`--topology h100:1 --config.dit.size=Pico ...` too, to see that it goes: its ratio then says nothing.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.distributed.chips import read_topology
from sora_jax.distributed.mesh import MeshConfig, make_mesh, parameter_shardings, sharding
from sora_jax.planner import counts, estimate, programs
from sora_jax.train.__main__ import parse
from sora_jax.train.loop import make_steps
from sora_jax.train.loop_config import read_loop_config


def full_batch(spec: programs.StepSpec) -> Any:
    """Zeros, but for segments as long as the configuration's clips."""
    objective = programs.objective_of(spec.config)
    batch = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), objective.shapes(spec.rows))
    clip = estimate.clip_of(spec)
    if clip is None:
        return batch
    segments = np.arange(batch.segment_ids.shape[1]) // clip.tokens + 1
    segments_each = max(batch.segment_ids.shape[1] // clip.tokens, 1)
    ids = np.where(segments <= segments_each, segments, 0).astype(np.int32)
    whole = lambda ids: np.broadcast_to(ids, (spec.rows, len(ids))).copy()
    conditions = np.arange(batch.condition_segment_ids.shape[1], dtype=np.int32)
    return dataclasses.replace(
        batch,
        segment_ids=whole(ids),
        condition_ids=whole(ids),
        init_sigma=whole((ids > 0).astype(np.float32)),
        condition_segment_ids=whole(np.where(conditions <= segments_each, conditions, 0)),
        condition_init_sigma=whole((conditions > 0).astype(np.float32)),
    )


def measure(spec: programs.StepSpec, steps: int) -> float:
    """Seconds of the median step."""
    mesh = make_mesh(MeshConfig(**spec.mesh))
    objective = programs.objective_of(spec.config)
    init, step = make_steps(objective, read_loop_config(spec.config).optim)
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(init, jax.random.key(0))
        kept = parameter_shardings(mesh, abstract)
        state = jax.jit(init, out_shardings=kept)(jax.random.key(0))
        batch = jax.device_put(full_batch(spec), sharding(mesh, "B"))
        update = jax.jit(step, donate_argnums=0, out_shardings=(kept, sharding(mesh, "")))
        took = []
        for _ in range(steps + 2):
            before = time.perf_counter()
            state, metrics = update(state, batch, jax.random.key(1))
            jax.block_until_ready((state, metrics))
            took.append(time.perf_counter() - before)
    assert jnp.isfinite(metrics["loss"])
    return float(np.median(took[2:]))


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--config", "path", default="configs/ladder.py:S")
@click.option("--topology", required=True, help="What this machine is: h100:1.")
@click.option("--steps", default=10)
@click.option("--json", "json_path", type=click.Path(path_type=pathlib.Path), help="Write the figures here.")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def main(
    path: str, topology: str, steps: int, json_path: pathlib.Path | None, overrides: tuple[str, ...]
) -> None:
    spec = programs.make_step_spec(
        parse(["--config", path, "--workdir", "none", *overrides])[0], "train", read_topology(topology)
    )
    found, chip = counts.estimate_counts(spec), spec.topology.chip
    assert chip is not None
    said = estimate.estimate(found, spec.topology, estimate.Assumptions())
    took = measure(spec, steps)
    row = {
        "config": path,
        "device": jax.devices()[0].device_kind,
        "estimated_seconds": said.seconds,
        "measured_seconds": took,
        "ratio": said.seconds / took,
        "useful_share_of_peak": found.useful / took / chip.flops,
    }
    print(json.dumps(row, indent=1))
    if json_path:
        json_path.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
