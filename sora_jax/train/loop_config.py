"""What the training loop itself reads of a configuration; the objective reads the rest (`train.objectives`)."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from sora_jax.checkpoints.store import CheckpointConfig
from sora_jax.config import COUNT, SEED, check_ranges, component, sections_of
from sora_jax.distributed.mesh import MeshConfig
from sora_jax.errors import UserError, nearest
from sora_jax.train.metrics import LogConfig
from sora_jax.train.optim import OptimConfig


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """A training run.

    Attributes:
      objective: what is trained: "dit" (the transformer), "vae" (the autoencoder), "distill" (a flow map), "finetune"
        (an open model) or "finetune_vae" (an open model's autoencoder).
      steps: batches in all.
      seed: of the weights to begin with, and of all that a step draws.
      stop_on_nan: whether the run ends where loss or gradient are not finite.
      log: metrics, sheets and boards.
      checkpoint: when the run is saved.
      mesh: how many devices along each axis.
      optim: how parameters follow their gradients.
    """

    objective: str
    steps: int
    seed: int = 0
    stop_on_nan: bool = True
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    # The learning rate falls over the whole run unless `steps` says otherwise.
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig, metadata={"defaults": {"steps": 0}})

    def __post_init__(self) -> None:
        check_ranges(self, "", steps=COUNT, seed=SEED)


def read_loop_config(config: ConfigDict) -> LoopConfig:
    """The loop's part of a configuration.

    Raises:
      UserError: a key is mistyped or missing, or a value is none that its field takes.
    """
    fields = [field.name for field in dataclasses.fields(LoopConfig)]
    for key in config:
        near = nearest(key, fields, 0.8)
        if key not in fields and near and near not in config:
            raise UserError(f"config.{key} is no key of the configuration: did you mean config.{near}?")
    sections = sections_of(LoopConfig)
    loop = component(
        LoopConfig, {name: config[name] for name in fields if name in config and name not in sections}, ""
    )
    given = {name: config.get(name, {}) for name in sections}
    given["optim"] = dict(given["optim"]) | {"steps": given["optim"].get("steps") or loop.steps}
    parts = {name: component(sections[name], given[name], name) for name in sections}
    return dataclasses.replace(loop, **parts)
