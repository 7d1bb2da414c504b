"""Exports of runs on top of tiny pipelines, for `finetune.py`: OUT/finetune_wan, OUT/finetune_ltx.

    python tools/parity/finetune_write.py OUT

Run by the project's environment, after `wan.py`, `ltx.py` and `ltx_pipeline.py` (which write OUT/pipeline_unipc and
OUT/ltx_text). What the runs learned is `draw`'s.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ltx_check
import numpy as np
import wan_check
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


def write_run(workdir: pathlib.Path, base: pathlib.Path, model: str = "wan", **changes: str) -> None:
    """A run of `configs/finetune_MODEL.py:debug` ("vae" of an autoencoder): its checkpoint holds what `draw` gives.

    Args:
      changes: keys with values as the command line has them, __ for the dot.
    """
    given = {name.replace("__", "."): value for name, value in changes.items()}
    config = make_config(f"finetune_{model}:debug", given | {"pretrained": str(base)})
    objective = make_objective(config, workdir)
    shapes = jax.eval_shape(objective.init, jax.random.key(0))
    learned = {name: jnp.asarray(draw(name, leaf.shape)) for name, leaf in named_leaves(shapes).items()}
    if (initial := objective.initial) is not None:  # near the base
        begun = named_leaves(initial)
        learned = {name: begun[name] + 0.1 * leaf for name, leaf in learned.items()}
    workdir.mkdir(parents=True)
    keep_config(workdir, config.to_dict(), resumed=False)
    check_base(workdir, base, "vae" if model == "vae" else "transformer")
    checkpoints = Checkpoints(workdir, CheckpointConfig())
    checkpoints.save(1, {"params": restore_into(shapes, learned)}, NoData())
    checkpoints.close()


def write_all(out: pathlib.Path, model: str, base: str, golden: str, run: Callable[..., np.ndarray]) -> None:
    """Both runs of a model, their exports, and what they make here.

    Args:
      base, golden: names of the tiny pipeline's folder and of its file in OUT.
      run: the velocity of a transformer for the latent of OUT/MODEL_tiny.npz.
    """
    place = out / f"finetune_{model}"
    shutil.rmtree(place, ignore_errors=True)
    for name, rank in (("lora", "4"), ("full", "0")):
        write_run(place / f"{name}_run", out / base, model, lora__rank=rank, lora__alpha="8")
        export_run(place / f"{name}_run", place / name)
    write_run(place / "vae_run", out / base, "vae")
    export_run(place / "vae_run", place / "vae")
    with np.load(out / f"{model}_tiny.npz") as file:
        npz = dict(file)
    with np.load(out / f"{golden}.npz") as file:
        noise, settings = file["noise"], json.loads(str(file["settings"]))
    velocity = run(sora_jax.load(place / "lora_run").dit, npz)
    pipeline = sora_jax.load(place / "full_run")
    shape = {"frames": settings["num_frames"], "size": (settings["height"], settings["width"])}
    own = {"negative": settings["negative_prompt"], "guidance": settings["guidance_scale"]}
    steps = {"steps": settings["num_inference_steps"]}
    video = pipeline.generate(settings["prompt"], noise=noise[0], **shape, **own, **steps)
    vae = sora_jax.load(place / "vae_run").vae
    latent = np.random.default_rng(0).standard_normal((3, 4, 6, vae.config.channels), np.float32)
    clip = np.clip(vae.decode(latent[None])[0], -1, 1)
    np.savez(place / "ours.npz", velocity=velocity, frames=video.frames, latent=latent, clip=clip)


def main() -> None:
    """Writes those of each model."""
    out = pathlib.Path(sys.argv[1])
    write_all(out, "wan", "pipeline_unipc", "wan_pipeline_unipc", wan_check.run)
    write_all(out, "ltx", "ltx_text", "ltx_pipeline_text", ltx_check.run)


if __name__ == "__main__":
    main()
