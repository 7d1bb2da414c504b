"""What a sweep found: means over seeds with intervals, differences from one arm, as Markdown and as a plot."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from sora_jax.errors import UserError, atomic_path, nearest
from sora_jax.sweep.algebra import SEED
from sora_jax.sweep.results import DONE, Row

_LEVEL = 0.95
_COST = ("steps", "tokens", "positions", "flops", "processor_seconds")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean of n runs and the half width of its 95% interval, which one run alone doesn't have."""

    mean: float
    half: float | None
    n: int

    def __str__(self) -> str:
        if self.half is None:
            return f"{self.mean:.4g}" if math.isfinite(self.mean) else "–"
        return f"{_short(self.mean, self.half)} ± {_short(self.half, self.half)}"


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of the same arm together.

    Attributes:
      axes: what arms are told apart by.
      arms: the labels of each arm on these axes.
      metrics: the columns.
      values: for each arm, for each metric, by seed: the runs' numbers.
      costs: for each arm, the means of `_COST`.
    """

    axes: tuple[str, ...]
    arms: tuple[tuple[str, ...], ...]
    metrics: tuple[str, ...]
    values: tuple[Mapping[str, Mapping[str, float]], ...]
    costs: tuple[Mapping[str, float], ...]

    def estimate(self, arm: int, metric: str) -> Estimate:
        """Of an arm's runs."""
        return estimate(list(self.values[arm].get(metric, {}).values()))

    def difference(self, arm: int, other: int, metric: str) -> Estimate:
        """Of `arm` from `other`, run by run of the same seed (a paired interval)."""
        mine, theirs = (self.values[one].get(metric, {}) for one in (arm, other))
        return estimate([mine[run] - theirs[run] for run in mine if run in theirs])

    def name(self, arm: int) -> str:
        """An arm in words."""
        return ", ".join(self.arms[arm])


def estimate(values: Sequence[float]) -> Estimate:
    """The mean, and the half width of its interval by Student's t with n − 1 degrees of freedom."""
    n = len(values)
    if n < 2:
        return Estimate(float(np.mean(values)) if n else math.nan, None, n)
    quantile = float(stats.t.ppf((1 + _LEVEL) / 2, n - 1))
    return Estimate(float(np.mean(values)), quantile * float(np.std(values, ddof=1)) / math.sqrt(n), n)


def make_table(rows: Sequence[Row], by: str = "", metrics: Sequence[str] = ()) -> Table:
    """Arms, metrics and numbers of the finished runs among `rows`.

    Args:
      by: one axis, over whose values alone arms are told apart; empty: over all but the seeds'.
      metrics: parts of names of metrics, which a column's name has one of; empty: all columns.

    Raises:
      UserError: no run has finished, or there is no such axis or metric.
    """
    rows = [row for row in rows if row["status"] == DONE]
    if not rows:
        raise UserError("No run of the sweep has finished yet, so there is no table: run the sweep first.")
    axes = tuple(dict.fromkeys(axis for row in rows for axis in row["labels"] if axis != SEED))
    if by:
        if by not in axes:
            near = nearest(by, axes, 0)
            raise UserError(
                f"The sweep has no axis {by!r}: {f'did you mean {near!r}?' if near else 'it has none.'}"
            )
        axes = (by,)
    known = tuple(dict.fromkeys(name for row in rows for name in row["metrics"]))
    kept = tuple(name for name in known if not metrics or any(part in name for part in metrics))
    if not kept:
        raise UserError(
            f"No metric's name has {' or '.join(metrics)}: there are {', '.join(known) or 'none'}."
        )
    arms: dict[tuple[str, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["index"]):
        arms.setdefault(tuple(row["labels"].get(axis, "") for axis in axes), []).append(row)
    values = []
    for members in arms.values():
        by_metric: dict[str, dict[str, float]] = {}
        for row in members:
            # What is the same in two arms: the seed, and the values on axes that aren't shown.
            run = ", ".join(text for axis, text in row["labels"].items() if axis not in axes)
            for name in kept:
                if row["metrics"].get(name) is not None:
                    by_metric.setdefault(name, {})[run] = row["metrics"][name]
        values.append(by_metric)
    costs = tuple(
        {name: float(np.mean([row[name] for row in members if name in row] or [math.nan])) for name in _COST}
        for members in arms.values()
    )
    return Table(axes, tuple(arms), kept, tuple(values), costs)


def latest(rows: Sequence[Row]) -> list[Row]:
    """Of a results.jsonl the rows of the settings that finished last: others can't be compared with them."""
    finished = [row for row in rows if row["status"] == DONE]
    newest = max(finished, key=lambda row: row.get("finished", ""), default=None)
    return [row for row in rows if newest is None or row["sweep_key"] == newest["sweep_key"]]


def as_markdown(table: Table, against: str = "") -> str:
    """The table: an arm a line, mean ± half width of the 95% interval over seeds, n, and what a run cost.

    Args:
      against: an arm from whom the others' differences are a second table; empty: the first.

    Raises:
      UserError: there is no such arm.
    """
    head = [*table.axes, "n", *table.metrics, "tokens", "TFLOP", "processor seconds"]
    lines = []
    for arm, labels in enumerate(table.arms):
        cells = [str(table.estimate(arm, metric)) for metric in table.metrics]
        cost = table.costs[arm]
        spent = [f"{cost['tokens']:,.0f}", f"{cost['flops'] / 1e12:.4g}", f"{cost['processor_seconds']:,.0f}"]
        lines.append([*labels, _runs(table, arm), *cells, *spent])
    text = _markdown(head, lines, len(table.axes))
    text += "\n\nMean ± half width of the 95% interval (Student's t over n runs)."
    if len(table.arms) > 1:
        base = _find_arm(table, against)
        differences = [
            [*labels, *(str(table.difference(arm, base, metric)) for metric in table.metrics)]
            for arm, labels in enumerate(table.arms)
            if arm != base
        ]
        text += f"\n\nDifference from {table.name(base)}, run by run of the same seed:\n\n"
        text += _markdown([*table.axes, *table.metrics], differences, len(table.axes))
    return text


def draw(table: Table, path: pathlib.Path, title: str) -> None:
    """A picture: a panel for each metric, in it for each arm the runs, their mean and its interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(len(table.metrics), 4)
    lines = -(-len(table.metrics) // columns)
    height = 1.2 + 0.32 * len(table.arms)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.4 * columns + 1, height * lines), sharey=True, squeeze=False
    )
    for panel, metric in zip(axes.flat, table.metrics):
        for arm in range(len(table.arms)):
            found = table.estimate(arm, metric)
            runs = list(table.values[arm].get(metric, {}).values())
            panel.plot(runs, [arm] * len(runs), ".", color="0.65", markersize=6)
            panel.errorbar(found.mean, arm, xerr=found.half, fmt="o", color="C0", markersize=5, capsize=3)
        panel.set_title(metric, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(axis="x", color="0.9")
    for panel in axes.flat[len(table.metrics) :]:
        panel.set_visible(False)
    axes[0, 0].set_yticks(range(len(table.arms)), [table.name(arm) for arm in range(len(table.arms))])
    axes[0, 0].set_ylim(len(table.arms) - 0.5, -0.5)
    figure.suptitle(f"{title}: runs, mean and 95% interval over seeds", fontsize=10)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


def _runs(table: Table, arm: int) -> str:
    counts = sorted({len(table.values[arm].get(metric, {})) for metric in table.metrics})
    return "–".join(map(str, counts[:: max(len(counts) - 1, 1)]))


def _find_arm(table: Table, against: str) -> int:
    names = [table.name(arm) for arm in range(len(table.arms))]
    if not against:
        return 0
    if against not in names:
        near = nearest(against, names, 0)
        raise UserError(f"The sweep has no arm {against!r}: did you mean {near!r}?")
    return names.index(against)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[Any]], words: int) -> str:
    """The first `words` columns are flush left, the others, numbers, flush right."""
    rule = ["---" if column < words else "---:" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, rule, *rows))


def _short(value: float, scale: float) -> str:
    """Two digits of `scale`, and so many of `value`."""
    if not math.isfinite(value):
        return "–"
    if not (scale > 0 and math.isfinite(scale)):
        return f"{value:.4g}"
    digits = max(1 - math.floor(math.log10(scale)), 0)
    return f"{value:.{digits}f}" if digits < 8 else f"{value:.2e}"
