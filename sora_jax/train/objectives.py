"""What can be learned, by name, and what a run of each takes. The loop knows objectives, not models.

An objective has `init(key) -> model`, `loss(model, batch, key) -> (loss, metrics)`, `data(config, share) ->
grain.IterDataset` (of the rows that `share`, a `mesh.Share`, says are this host's), `flops(batch) -> float` (of a
forward and backward pass), `tokens(batch) -> (real, slots)` and `sample_sheet(model, step) -> PIL.Image | None`. It
may have `data_summary() -> DataSummary | None` (`train.metrics`): what the data are, and what of them was skipped.

`RUNS` is the one table of which dataclass belongs to which key of a configuration: a field that such a dataclass gets
is filled in, documented, typed and set on the command line without another word.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from sora_jax import config as configurations
from sora_jax.config import ABSENT, component, sections_of
from sora_jax.data.encode import LatentsConfig
from sora_jax.data.pipeline import PipelineConfig
from sora_jax.data.sources import DataConfig
from sora_jax.errors import UserError, nearest
from sora_jax.models.dit import DiTConfig
from sora_jax.models.text import TextConfig
from sora_jax.models.vae import VAEConfig
from sora_jax.train.dit import DiTObjective, FlowConfig
from sora_jax.train.loop_config import LoopConfig, read_loop_config
from sora_jax.train.target import TargetConfig
from sora_jax.train.vae import VAELossConfig, VAEObjective

OBJECTIVES: dict[str, Any] = {"dit": DiTObjective, "vae": VAEObjective}


@dataclasses.dataclass(frozen=True)
class DiTRun(LoopConfig):
    """Training a diffusion transformer.

    Attributes:
      autoencoder: a bundled model, a folder that holds one, or the workdir of an autoencoder's run.
      init_from: a model, or a run, whose weights are the ones to begin with; empty: random ones.
      dit: shape of the transformer.
      text: the text encoder.
      flow: how noise levels are drawn.
      data: which clips, and of what shapes.
      latents: the latent cache.
      pipeline: how records become packed batches.
      video: the clip that the configuration is about, for the planner; none: no such clip.
    """

    autoencoder: str = "toyworld"
    init_from: str = ""
    dit: DiTConfig = dataclasses.field(default_factory=DiTConfig)
    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    flow: FlowConfig = dataclasses.field(default_factory=FlowConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    latents: LatentsConfig = dataclasses.field(default_factory=LatentsConfig)
    # The patches are the transformer's.
    pipeline: PipelineConfig = dataclasses.field(
        default_factory=PipelineConfig, metadata={"defaults": {"patch": ABSENT, "coords": ABSENT}}
    )
    video: TargetConfig | None = None


@dataclasses.dataclass(frozen=True)
class VAERun(LoopConfig):
    """Training an autoencoder.

    Attributes:
      init_from: a model, or a run, whose weights are the ones to begin with; empty: random ones.
      vae: shape of the autoencoder.
      loss: how it is trained.
      data: which clips, and of what shapes.
    """

    init_from: str = ""
    vae: VAEConfig = dataclasses.field(default_factory=VAEConfig)
    loss: VAELossConfig = dataclasses.field(default_factory=VAELossConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)


RUNS: dict[str, type[LoopConfig]] = {"dit": DiTRun, "vae": VAERun}

# What a finished run is good for: commands, in which WORKDIR stands for its folder and DATA for the flag that names its
# data, where these aren't toyworld alone. Toyworld's oracle reads nothing else.
NEXT = {
    "dit": ('sora-jax generate "WORDS OF YOUR CAPTIONS" --model WORKDIR',),
    "dit on toyworld": (
        'sora-jax generate "a red circle moves left" --model WORKDIR',
        "sora-jax evaluate toyworld --model WORKDIR",
    ),
    "vae": (
        "sora-jax evaluate vae FILE --model WORKDIR",
        "sora-jax train --config toyworld_dit --workdir runs/dit --config.autoencoder=WORKDIR DATA",
    ),
}


def schema_of(config: Mapping[str, Any]) -> type[LoopConfig]:
    """The dataclass of a run's whole configuration; of an objective that isn't one of ours the loop's part."""
    return RUNS.get(config.get("objective", ""), LoopConfig)


def complete(config: Mapping[str, Any]) -> ConfigDict:
    """A run's configuration with the default of every key that isn't given.

    Raises:
      UserError: a value is none that its key takes.
    """
    return configurations.complete(schema_of(config), config)


def check_run(config: ConfigDict) -> None:
    """Raises UserError where a run's configuration has a key that nothing reads, or a value that none takes."""
    schema: type = schema_of(config)
    known = configurations.types_of(schema)
    for key in config if schema is not LoopConfig else ():
        if key not in known:
            near = nearest(key, known, 0)
            raise UserError(f"config.{key} is no key of this configuration: did you mean config.{near}?")
    read_loop_config(config)
    for key, section in sections_of(schema).items():
        if key in sections_of(LoopConfig) or config.get(key) is None:
            continue
        component(section, config[key], key)
        for name, inner in sections_of(section).items():
            component(inner, config[key].get(name, {}), f"{key}.{name}")


def make_objective(config: ConfigDict, workdir: str | os.PathLike[str]) -> Any:
    """The objective that `config.objective` names; what it keeps beside the checkpoints lies in `workdir`.

    Raises:
      UserError: there is none of that name, or a key is wrong.
    """
    if config.objective not in OBJECTIVES:
        raise UserError(
            f"config.objective={config.objective!r} is unknown: choose one of {', '.join(OBJECTIVES)}."
        )
    config = complete(config)
    check_run(config)
    for name in ("patch", "coords") if config.objective == "dit" else ():
        if (own := config.pipeline.get(name)) not in (None, config.dit[name]):
            raise UserError(
                f"config.pipeline.{name} is {own} and config.dit.{name} is {config.dit[name]}: they are one setting, "
                f"so set config.dit.{name} alone."
            )
    return OBJECTIVES[config.objective](config, pathlib.Path(workdir))
