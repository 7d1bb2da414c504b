"""What can be learned, by name. The loop knows objectives, not models.

An objective has `init(key) -> model`, `loss(model, batch, key) -> (loss, metrics)`, `data(config, share) ->
grain.IterDataset` (of the rows that `share`, a `mesh.Share`, says are this host's), `flops(batch) -> float` (of a
forward and backward pass), `tokens(batch) -> (real, slots)` and `sample_sheet(model, step) -> PIL.Image | None`.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

from ml_collections import ConfigDict

from sora_jax.errors import UserError
from sora_jax.train.dit_objective import DiTObjective
from sora_jax.train.vae_objective import VAEObjective

OBJECTIVES: dict[str, Any] = {"dit": DiTObjective, "vae": VAEObjective}


def make_objective(config: ConfigDict, workdir: str | os.PathLike[str]) -> Any:
    """The objective that `config.objective` names; what it keeps beside the checkpoints lies in `workdir`.

    Raises:
      UserError: there is none of that name.
    """
    if config.objective not in OBJECTIVES:
        raise UserError(
            f"config.objective={config.objective!r} is unknown: choose one of {', '.join(OBJECTIVES)}."
        )
    return OBJECTIVES[config.objective](config, pathlib.Path(workdir))
