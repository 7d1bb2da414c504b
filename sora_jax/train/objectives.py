"""The registry of objectives: what can be trained, by name, and what a configuration of each takes.

An objective's `schema` says which dataclass belongs to which key of its configuration: a field that such a dataclass
gets is filled in, documented, typed and set on the command line without another word.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from sora_jax import config as configurations
from sora_jax.config import component, sections_of
from sora_jax.errors import UserError, nearest
from sora_jax.train.distill import DistillObjective, DistillRun
from sora_jax.train.dit import DiTObjective, DiTRun, Sheets
from sora_jax.train.finetune import FinetuneObjective, FinetuneRun
from sora_jax.train.finetune_vae import FinetuneVAEObjective, FinetuneVAERun
from sora_jax.train.loop_config import LoopConfig, read_loop_config
from sora_jax.train.protocol import Objective
from sora_jax.train.vae import VAEObjective, VAERun

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "dit": DiTObjective,
    "vae": VAEObjective,
    "distill": DistillObjective,
    "finetune": FinetuneObjective,
    "finetune_vae": FinetuneVAEObjective,
}
RUNS: dict[str, type[LoopConfig]] = {
    "dit": DiTRun,
    "vae": VAERun,
    "distill": DistillRun,
    "finetune": FinetuneRun,
    "finetune_vae": FinetuneVAERun,
}

# What a finished run is good for: commands, in which WORKDIR stands for its folder and DATA for the flag that names its
# data, where these aren't toyworld alone. Toyworld's oracle reads nothing else.
NEXT = {
    "dit": ('sora-jax generate "WORDS OF YOUR CAPTIONS" --model WORKDIR',),
    "dit on toyworld": (
        'sora-jax generate "a red circle moves left" --model WORKDIR',
        "sora-jax evaluate toyworld --model WORKDIR",
    ),
    "distill": ('sora-jax generate "WORDS OF YOUR CAPTIONS" --model WORKDIR',),
    "finetune": (
        'sora-jax generate "WORDS OF YOUR CAPTIONS" --model WORKDIR',
        "sora-jax export WORKDIR --to FOLDER",
    ),
    "finetune_vae": (
        'sora-jax generate "A PROMPT" --model WORKDIR',
        "sora-jax export WORKDIR --to FOLDER",
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


def make_objective(
    config: ConfigDict,
    workdir: str | os.PathLike[str],
    sheets: Callable[[DiTObjective], Sheets] | None = None,
) -> Objective:
    """The objective that `config.objective` names; what it keeps next to the checkpoints is in `workdir`.

    Args:
      sheets: makes what draws a transformer's sheets of samples (`train.sheets`); None: it draws none.

    Raises:
      UserError: there is none of that name, or a key is wrong.
    """
    if config.objective not in OBJECTIVES:
        raise UserError(
            f"config.objective={config.objective!r} is unknown: choose one of {', '.join(OBJECTIVES)}."
        )
    config = complete(config)
    check_run(config)
    for name in ("patch", "coords") if "dit" in config else ():
        if (own := config.pipeline.get(name)) not in (None, config.dit[name]):
            raise UserError(
                f"config.pipeline.{name} is {own} and config.dit.{name} is {config.dit[name]}: they are one setting, "
                f"so set config.dit.{name} alone."
            )
    options = {"sheets": sheets} if config.objective not in ("vae", "finetune_vae") else {}
    return OBJECTIVES[config.objective](config, pathlib.Path(workdir), **options)
