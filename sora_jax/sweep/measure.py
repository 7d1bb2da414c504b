"""What is measured of a finished run of a sweep: metrics by name, plain numbers.

"loss" is the one for data that differ from arm to arm: all arms are measured on the same held-out clips, with the same
noise and sigmas, whatever they learned from.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from sora_jax.checkpoints.bundle import load_bundle
from sora_jax.distributed.mesh import WHOLE
from sora_jax.errors import UserError
from sora_jax.evaluation.abilities import evaluate_abilities
from sora_jax.evaluation.report import evaluate_toyworld
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.sweep.evaluations import Evaluation
from sora_jax.sweep.points import latents_folder, loss_config
from sora_jax.train import objectives
from sora_jax.train.dit import DiTObjective

_PROGRAMS: dict[Any, Callable[..., jax.Array]] = {}
_HELD_OUT_SHARE = 20  # `DiTObjective.heldout_data` takes at most one in so many of `latents.clips`


def measure(one: Evaluation, workdir: pathlib.Path, common: ConfigDict, latents: str) -> dict[str, float]:
    """The metrics of a finished run.

    Args:
      workdir: of the run.
      common: the configuration that the sweep's arms are changes of.
      latents: the folder under which clips are kept encoded; see `points.latents_folder`.
    """
    found = KINDS[one.kind](workdir, common, latents, **one.settings)
    return {f"{one.name}/{metric}": value for metric, value in found.items()}


def loss(
    workdir: pathlib.Path,
    common: ConfigDict,
    latents: str,
    clips: int = 64,
    batches: int = 8,
    overrides: Mapping[str, Any] | None = None,
    own: Sequence[str] = (),
) -> dict[str, float]:
    """The velocity's error on held-out clips, the same for every run of a sweep, captions never dropped.

    Args:
      clips: held-out ones.
      batches: packed batches of them; the noise and the sigmas of each are the same for all runs.
      overrides, own: see `loss_config`.
    """
    run = ConfigDict(json.loads((workdir / "config.json").read_text()))
    config = loss_config(common, objectives.complete(run), overrides or {}, own)
    config.latents.clips = _HELD_OUT_SHARE * clips
    config.latents.folder = latents_folder(config, latents)
    config.log.sheet_every = 0
    objective, model = DiTObjective(config, workdir), load_bundle(workdir).dit
    held_out = objective.heldout_data(WHOLE, batches)
    measured = _loss_program(objective)
    losses = [measured(model, batch, jax.random.key(index)) for index, batch in enumerate(held_out)]
    if not losses:
        raise UserError(f"Nothing of {config.data.source!r} is held out, so there is no loss to compare.")
    return {"loss": float(np.mean(jax.device_get(losses)))}


def _loss_program(objective: DiTObjective) -> Callable[..., jax.Array]:
    """The loss, compiled once for all evaluations of a process that differ in their clips alone."""
    own = objective.flow, objective.pipeline.max_segments  # all of an objective that its loss depends on
    if own not in _PROGRAMS:
        _PROGRAMS[own] = jax.jit(lambda model, batch, key: objective.loss(model, batch, key)[0])
    return _PROGRAMS[own]


def toyworld(workdir: pathlib.Path, common: ConfigDict, latents: str, **settings: Any) -> dict[str, float]:
    """Shares of clips that show what their prompt says (`evaluate_toyworld`), by attribute."""
    accuracy = evaluate_toyworld(_pipeline(workdir), **settings)["accuracy"]
    return {name: row["share"] for name, row in accuracy.items()}


def abilities(workdir: pathlib.Path, common: ConfigDict, latents: str, **settings: Any) -> dict[str, float]:
    """Shares and means of abilities' criteria (`evaluate_abilities`): "animate/kept"."""
    figures = evaluate_abilities(_pipeline(workdir), **settings)["abilities"]
    return {
        f"{name}/{criterion}": row.get("share", row.get("mean"))
        for name, criteria in figures.items()
        for criterion, row in criteria.items()
    }


def _pipeline(workdir: pathlib.Path) -> Pipeline:
    return Pipeline(load_bundle(workdir), notify=lambda note: None)  # that the model is small is known here


KINDS: dict[str, Callable[..., dict[str, float]]] = {
    "toyworld": toyworld,
    "abilities": abilities,
    "loss": loss,
}
