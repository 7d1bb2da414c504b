"""What a trained transformer knows: held-out loss, the same clips and noise for all, and shapes of single images."""

from __future__ import annotations

import pathlib
import runpy
import sys

import jax
import numpy as np
from levers import BASELINE

from sora_jax.checkpoints.bundle import load_bundle
from sora_jax.distributed.mesh import WHOLE
from sora_jax.evaluation.report import evaluate_toyworld
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.train.dit import DiTObjective

BATCHES = 24
ROOT = pathlib.Path(__file__).parents[2]


def heldout_loss(workdir: pathlib.Path, latents: pathlib.Path) -> dict[str, float]:
    """The baseline's loss on its held-out clips, without dropped captions; the velocity's, whatever was learned."""
    config = runpy.run_path(str(ROOT / "configs" / "toyworld_dit.py"))["get_config"]()
    for name, value in BASELINE.items():
        section, key = name.split(".")
        config[section][key] = value
    config.latents.folder = str(latents)
    config.log.sheet_every = 0
    config.flow.text_dropout = config.flow.text_noise = 0.0
    bundle = load_bundle(workdir)
    objective = DiTObjective(config, latents.parent / "heldout")
    loss = jax.jit(objective.loss)
    batches = objective.heldout_data(WHOLE, BATCHES)
    losses = [loss(bundle.dit, batch, jax.random.key(index))[0] for index, batch in enumerate(batches)]
    return {"heldout_loss": round(float(np.mean(jax.device_get(losses))), 5)}


def clips_read(workdir: pathlib.Path, clips: int) -> dict[str, float]:
    """What the oracle reads of clips of two seconds, by attribute."""
    accuracy = evaluate_toyworld(Pipeline(load_bundle(workdir)), "validation", clips)["accuracy"]
    return {
        name: round(accuracy[name]["share"], 4) for name in ("colour", "shape", "direction", "size", "all")
    }


def images_read(workdir: str | pathlib.Path, clips: int) -> dict[str, float]:
    """Colour and shape of single images, 64 tokens each: what comes before motion."""
    accuracy = evaluate_toyworld(Pipeline(load_bundle(workdir)), "validation", clips, durations=(0.1,))[
        "accuracy"
    ]
    return {f"image_{name}": round(accuracy[name]["share"], 4) for name in ("colour", "shape")}


def shape_words(workdir: str | pathlib.Path, images: int) -> dict[str, float]:
    """What the word for the shape is worth in pictures: seen long before the oracle sees shapes that are drawn.

    Returns:
      the share of pictures whose true shape is the word of least error at σ = 0.8 and 0.5, and the error it saves
      there against the mean over all words (`experiments/bundled_model/diagnose.py`).
    """
    sys.path.insert(0, str(ROOT / "experiments" / "bundled_model"))
    import diagnose

    pipeline = Pipeline(load_bundle(workdir))
    things, latents = diagnose.true_clips(pipeline, images, 1)
    errors = np.stack(
        [diagnose.errors_by_word(pipeline, *one, "shape") for one in zip(things, latents, strict=True)]
    )
    right = np.array([diagnose.WORDS["shape"].index(thing.shape) for thing in things])
    result = {}
    for sigma in (0.8, 0.5):
        at = errors[:, :, diagnose.SIGMAS.index(sigma)]
        gain = at.mean(1) - at[np.arange(len(at)), right]
        result[f"shape word at {sigma:g}"] = round(float(np.mean(at.argmin(1) == right)), 3)
        result[f"shape gain at {sigma:g}"] = round(float(gain.mean()), 5)
    return result
