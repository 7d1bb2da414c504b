"""A sweep's results: one row a run, in the run's folder when it ends, and all of them in results.jsonl."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import platform
from typing import Any

import jax

from sora_jax.errors import UserError, atomic_path
from sora_jax.evaluation.provenance import made_by
from sora_jax.sweep.points import Point, training_config
from sora_jax.train.metrics import read_metrics

RESULT, RESULTS = "result.json", "results.jsonl"
POINT, LOCK, LOG = "point.json", ".lock", "log.txt"  # in a run's folder
DONE, FAILED, STOPPED = "done", "failed", "stopped"
EXIT = {DONE: 0, FAILED: 2, STOPPED: 130}  # a worker's status

Row = dict[str, Any]


def write_point(point: Point, sweep: str, out: pathlib.Path, latents: pathlib.Path) -> pathlib.Path:
    """Writes what a worker needs into the point's folder below `out`, and returns that."""
    workdir = out / point.folder
    content = {
        "row": point.describe(sweep),
        "latents": str(latents),
        "evaluations": [dataclasses.asdict(one) for one in point.evaluations],
        "config": training_config(point, latents).to_dict(),
        "common": point.common.to_dict(),
    }
    with atomic_path(workdir / POINT) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    return workdir


def write_row(workdir: pathlib.Path, row: Row) -> None:
    """Keeps a run's row in its folder, as result.json."""
    with atomic_path(workdir / RESULT) as temporary:
        temporary.write_text(json.dumps(row, indent=1, ensure_ascii=False) + "\n")


def read_row(workdir: pathlib.Path) -> Row | None:
    """A run's row; None where it has none yet."""
    path = workdir / RESULT
    return json.loads(path.read_text()) if path.is_file() else None


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a results.jsonl; none where there is no such file.

    Raises:
      UserError: a line isn't JSON.
    """
    path = pathlib.Path(path)
    lines = path.read_text().splitlines() if path.is_file() else []
    try:
        return [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise UserError(
            f"{path} is no file of results ({error}): delete the line that is damaged."
        ) from error


def collect(out: pathlib.Path) -> list[Row]:
    """Writes the rows of all runs in a sweep's folder to its results.jsonl, and returns them, in the sweep's order.

    Rows that were there before stay, also where the run's folder is gone.
    """
    rows = {row["key"]: row for row in read_rows(out / RESULTS)}
    for path in out.glob(f"*/{RESULT}"):
        row = json.loads(path.read_text())
        if row["status"] == DONE or rows.get(row["key"], {}).get("status") != DONE:
            rows[row["key"]] = row
    ordered = sorted(rows.values(), key=lambda row: (row["index"], row["key"]))
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ordered)
    if ordered and (not (out / RESULTS).is_file() or (out / RESULTS).read_text() != text):
        with atomic_path(out / RESULTS) as temporary:
            temporary.write_text(text)
    return ordered


def training_figures(workdir: pathlib.Path) -> Row:
    """What a run's metrics.jsonl says of it: losses, and what it cost.

    Returns:
      `steps`; `tokens` of clips, `positions` (tokens and padding), `flops` (forward and backward, without padding), all
      by the means that were logged; `processor_seconds` (user and system, of all threads, without encoding clips); and
      `metrics`.
    """
    rows, before = read_metrics(workdir), 0
    tokens = positions = flops = 0.0
    for row in rows:
        steps, before = row["step"] - before, row["step"]
        tokens += steps * row.get("tokens_per_step", 0.0)
        positions += steps * row.get("tokens_per_step", 0.0) / max(1 - row.get("padding", 0.0), 1e-9)
        flops += steps * row.get("flops_per_step", 0.0)
    held_out = [row["heldout_loss"] for row in rows if "heldout_loss" in row]
    metrics = {"training loss": rows[-1]["loss"]} if rows else {}
    metrics |= {"held-out loss of its own data": held_out[-1]} if held_out else {}
    return {
        "steps": before,
        "tokens": round(tokens),
        "positions": round(positions),
        "flops": flops,
        "processor_seconds": round(sum(row.get("processor_seconds", 0.0) for row in rows), 1),
        "metrics": metrics,
    }


def origin() -> Row:
    """What made a row: commit, whether files differed from it, versions and the machine. Nothing names its owner."""
    made = made_by()
    commit = made.pop("commit")
    return {
        "commit": commit and commit.removesuffix("+changes"),
        "dirty": bool(commit and commit.endswith("+changes")),
        "versions": {name: made[name] for name in ("sora_jax", "jax")}
        | {"python": platform.python_version()},
        "machine": {
            "device": made["device"],
            "devices": jax.device_count(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "processor": _processor(),
            "system": platform.system(),
        },
    }


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
