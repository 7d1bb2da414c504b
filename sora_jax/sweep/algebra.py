"""Sweeps as algebra: lists of points, each a few overrides of a configuration, made of smaller lists.

    product(
        arms("sizes", {"fixed": {"data.resolutions": (64,)}, "native": {"data.resolutions": (32, 64, 96)}}),
        zipped(param("dit.size", ["Pico", "Nano"]), param("optim.lr", [2e-3, 1e-3])),
        seeds(3),
    )

is twelve points. Keys and values are those of `--config.key=value`, and are checked as those are, when the sweep is
loaded (`sweep.points`). The names follow the sweeps of google-deepmind/simply, without text that is evaluated.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sora_jax import values
from sora_jax.errors import UserError

SEED = "seed"
"""The axis over which a table takes means and intervals."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """One point of a sweep, or a part of one.

    Attributes:
      labels: what it is called on each axis, in the order of the axes: {"sizes": "native", "seed": "0"}.
      overrides: keys of the configuration and their values.
    """

    labels: Mapping[str, str]
    overrides: Mapping[str, Any]


Choices = tuple[Choice, ...]


def param(key: str, settings: Iterable[Any], axis: str = "") -> Choices:
    """One point for each value of a key of the configuration.

    Args:
      key: such as "optim.lr".
      settings: its values, as Python's or as the command line's text.
      axis: what the axis is called; empty: as the key.
    """
    return _listed(
        axis or key, [(values.write(values.fixed(value)), {key: value}) for value in settings], axis or key
    )


def arms(axis: str, settings: Mapping[str, Mapping[str, Any]]) -> Choices:
    """One point for each name, with the overrides that it stands for: {"fixed": {}, "native": {…}}."""
    return _listed(axis, list(settings.items()), axis)


def seeds(count: int, *keys: str) -> Choices:
    """Seeds 0, 1, …, on the axis "seed".

    Args:
      keys: those that are set to the seed; none: `seed`, of the weights and of what a step draws, and `pipeline.seed`,
        of the data's order, which only transformers have.
    """
    keys = keys or ("seed", "pipeline.seed")
    return _listed(SEED, [(str(seed), dict.fromkeys(keys, seed)) for seed in range(count)], SEED)


def product(*factors: Sequence[Choice]) -> Choices:
    """Every combination; the last factor changes first.

    Raises:
      UserError: two factors set the same key, or have the same axis.
    """
    return tuple(_joined(parts) for parts in itertools.product(*factors))


def zipped(*factors: Sequence[Choice]) -> Choices:
    """The first points of all factors together, then the second ones, …

    Raises:
      UserError: the factors are of different lengths, set the same key, or have the same axis.
    """
    if len({len(factor) for factor in factors}) > 1:
        lengths = ", ".join(str(len(factor)) for factor in factors)
        raise UserError(
            f"What is zipped must be of one length, and is of {lengths}: use product for all pairs."
        )
    return tuple(_joined(parts) for parts in zip(*factors, strict=True))


def concat(*parts: Sequence[Choice]) -> Choices:
    """One list after another: for changing one thing at a time. The axes of the lists must be the same.

    Raises:
      UserError: they aren't.
    """
    points = tuple(itertools.chain(*parts))
    axes = {tuple(point.labels): None for point in points}
    if len(axes) > 1:
        one, other, *_ = axes
        raise UserError(
            f"What is put together must have the same axes, and has {', '.join(one) or 'none'} and "
            f"{', '.join(other) or 'none'}: name them alike, as in arms('change', {{…}})."
        )
    return points


def _listed(axis: str, settings: Sequence[tuple[str, Mapping[str, Any]]], what: str) -> Choices:
    if not settings:
        raise UserError(f"The sweep's axis {what!r} has no value: give at least one.")
    names = [name for name, _ in settings]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"The sweep's axis {what!r} has {twice} twice: leave one out.")
    return tuple(Choice({axis: name}, dict(overrides)) for name, overrides in settings)


def _joined(parts: Sequence[Choice]) -> Choice:
    labels: dict[str, str] = {}
    overrides: dict[str, Any] = {}
    for part in parts:
        for what, new, there in (("axis", part.labels, labels), ("key", part.overrides, overrides)):
            if same := sorted(set(new) & set(there)):
                raise UserError(f"Two factors of the sweep have the {what} {same[0]!r}: leave one out.")
        labels.update(part.labels)
        overrides.update(part.overrides)
    return Choice(labels, overrides)
