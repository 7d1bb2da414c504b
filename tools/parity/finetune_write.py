"""Exports of runs on top of a tiny pipeline, for `finetune.py`: OUT/finetune.

    python tools/parity/finetune_write.py OUT

Run by the project's environment, after `wan.py` (which writes OUT/pipeline_unipc). What the runs learned is `draw`'s.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from seeded import draw

import sora_jax
from sora_jax.checkpoints.base_model import check_base
from sora_jax.checkpoints.finetuned import export_run
from sora_jax.checkpoints.store import CheckpointConfig, Checkpoints, keep_config, named_leaves, restore_into
from sora_jax.train.__main__ import make_config
from sora_jax.train.objectives import make_objective


class NoData:
    """In place of a run's data."""

    def get_state(self) -> dict[str, Any]:
        return {"shards": {}}


def write_run(workdir: pathlib.Path, base: pathlib.Path, **changes: str) -> None:
    """A run of `configs/finetune_wan.py:debug` whose one checkpoint holds what `draw` gives.

    Args:
      changes: keys with values as the command line has them, __ for the dot.
    """
    given = {name.replace("__", "."): value for name, value in changes.items()}
    config = make_config("finetune_wan:debug", given | {"pretrained": str(base)})
    objective = make_objective(config, workdir)
    shapes = jax.eval_shape(objective.init, jax.random.key(0))
    learned = {name: jnp.asarray(draw(name, leaf.shape)) for name, leaf in named_leaves(shapes).items()}
    if objective.lora.rank == 0:  # near the base
        begun = named_leaves(objective.initial)
        learned = {name: begun[name] + 0.1 * leaf for name, leaf in learned.items()}
    workdir.mkdir(parents=True)
    keep_config(workdir, config.to_dict(), resumed=False)
    check_base(workdir, base)
    checkpoints = Checkpoints(workdir, CheckpointConfig())
    checkpoints.save(1, {"params": restore_into(shapes, learned)}, NoData())
    checkpoints.close()


def main() -> None:
    """Writes both runs, their exports, and what they make here."""
    out = pathlib.Path(sys.argv[1])
    base, place = out / "pipeline_unipc", out / "finetune"
    shutil.rmtree(place, ignore_errors=True)
    for name, rank in (("lora", "4"), ("full", "0")):
        write_run(place / f"{name}_run", base, lora__rank=rank, lora__alpha="8")
        export_run(place / f"{name}_run", place / name)
    from wan_check import run

    with np.load(out / "wan_tiny.npz") as file:
        npz = dict(file)
    with np.load(out / "wan_pipeline_unipc.npz") as file:
        noise, settings = file["noise"], json.loads(str(file["settings"]))
    velocity = run(sora_jax.load(place / "lora_run").dit, npz)
    pipeline = sora_jax.load(place / "full_run")
    shape = {"frames": settings["num_frames"], "size": (settings["height"], settings["width"])}
    own = {"negative": settings["negative_prompt"], "guidance": settings["guidance_scale"]}
    steps = {"steps": settings["num_inference_steps"]}
    video = pipeline.generate(settings["prompt"], noise=noise[0], **shape, **own, **steps)
    np.savez(place / "ours.npz", velocity=velocity, frames=video.frames)


if __name__ == "__main__":
    main()
