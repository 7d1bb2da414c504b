"""Evaluations that follow each run of a sweep: which there are, and what each takes.

They are checked when a sweep is loaded, before anything is trained; `sweep.measure` makes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sora_jax.errors import UserError, nearest
from sora_jax.pipeline.registry import ABILITIES
from sora_jax.toyworld.scene import check_split

_SAMPLER = ("seed", "steps", "guidance", "solver", "context_noise", "anchor")
_SHAPES = ("durations", "aspects", "resolution", "fps")
TAKES = {
    "toyworld": ("split", "clips", "source", "expand", *_SHAPES, *_SAMPLER),
    "abilities": ("names", "clips", *_SAMPLER),
    "loss": ("clips", "batches", "overrides", "own"),
}
"""By kind, the settings: of `report.evaluate_toyworld`, of `abilities.evaluate_abilities`, of `measure.loss`."""

DEBUG: dict[str, dict[str, Any]] = {
    "toyworld": {"clips": 1, "steps": 1},
    "abilities": {"clips": 1, "steps": 1},
    "loss": {"clips": 8, "batches": 1},
}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is measured of a finished run.

    Attributes:
      kind: "toyworld" (the oracle reads text to video), "abilities", or "loss" (on clips that are the same for all
        runs).
      name: what its metrics begin with: "64 px/shape".
      settings: see `TAKES`.
    """

    kind: str
    name: str
    settings: Mapping[str, Any]

    def debug(self) -> Evaluation:
        """As short as it goes."""
        return dataclasses.replace(self, settings=dict(self.settings) | DEBUG[self.kind])


def evaluation(kind: str, name: str = "", **settings: Any) -> Evaluation:
    """An evaluation for `Sweep.evaluations`.

    Args:
      kind: "toyworld", "abilities" or "loss".
      name: what its metrics begin with; empty: the kind.
      settings: see `TAKES`.

    Raises:
      UserError: there is no such kind, it takes no such setting, or there is no such split or ability.
    """
    if kind not in TAKES:
        raise UserError(f"There is no evaluation {kind!r} for a sweep: choose one of {', '.join(TAKES)}.")
    for setting in settings:
        if setting not in TAKES[kind]:
            near = nearest(setting, TAKES[kind], 0)
            raise UserError(f"The evaluation {kind!r} takes no {setting!r}: did you mean {near!r}?")
    check_split(settings.get("split", "validation"))
    for ability in settings.get("names", ()):
        if ability.removesuffix(" backward") not in ABILITIES:
            near = nearest(ability, ABILITIES, 0)
            raise UserError(f"There is no ability {ability!r} to evaluate: did you mean {near!r}?")
    return Evaluation(kind, name or kind, settings)
