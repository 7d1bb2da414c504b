"""Runs of a sweep, from their folders: trained, or gone on with, measured, and their rows written.

    python -m sora_jax.sweep.worker runs/sweeps/resolution/native-seed-0-1a2b3c4d5e6f

The runner writes point.json into a folder and starts this. One process works on a folder at a time.
"""

from __future__ import annotations

import datetime
import json
import pathlib
import sys
import time
import traceback
from typing import Any

from ml_collections import ConfigDict

from sora_jax.backend import restart_with_huge_pages
from sora_jax.checkpoints.store import newest_step
from sora_jax.errors import UserError, locked
from sora_jax.sweep.evaluations import Evaluation
from sora_jax.sweep.measure import measure
from sora_jax.sweep.results import (
    DONE,
    EXIT,
    FAILED,
    LOCK,
    LOG,
    POINT,
    STOPPED,
    Row,
    origin,
    read_row,
    training_figures,
    write_row,
)
from sora_jax.train import __main__ as training
from sora_jax.train import objectives
from sora_jax.train.stopping import terminations


def work(workdir: pathlib.Path) -> str:
    """Trains and measures the point in `workdir`, and writes its row; returns how that ended.

    A run that has its row isn't made twice; one that was stopped goes on. What fails is written as failed, with its
    sentence, and tried again the next time.

    Raises:
      KeyboardInterrupt: it was asked to stop where there was nothing to save.
    """
    waiting = f"note: another process works on {workdir}: waiting for it"
    with locked(workdir / LOCK, waiting):
        content = json.loads((workdir / POINT).read_text())
        row = content["row"]
        if (done := read_row(workdir)) and (done["status"], done["key"]) == (DONE, row["key"]):
            return DONE
        began = time.perf_counter()
        try:
            figures = _train_and_measure(workdir, content)
        except Exception as error:
            traceback.print_exc()
            sentence = str(error) if isinstance(error, UserError) else _describe(error)
            figures = training_figures(workdir) | {"status": FAILED, "error": sentence}
        if figures["status"] != STOPPED:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            seconds = {"seconds": round(time.perf_counter() - began, 1), "finished": now}
            write_row(workdir, row | figures | seconds | origin())
        return figures["status"]


def _train_and_measure(workdir: pathlib.Path, content: dict[str, Any]) -> Row:
    config = objectives.complete(ConfigDict(content["config"]))
    if newest_step(workdir) < config.steps:
        state = training.run(config.lock(), workdir)
        if int(state.step) < config.steps:
            return {"status": STOPPED}
    figures = training_figures(workdir)
    common = objectives.complete(ConfigDict(content["common"]))
    before = time.process_time()
    for one in content["evaluations"]:
        figures["metrics"] |= measure(Evaluation(**one), workdir, common, content["latents"])
    figures["evaluation_processor_seconds"] = round(time.process_time() - before, 1)
    return figures | {"status": DONE, "error": None}


def _describe(error: Exception) -> str:
    first = (str(error).strip().splitlines() or ["no more is known"])[0].rstrip(".")
    return f"The program failed ({type(error).__name__}: {first}): the folder's {LOG} has where."


def main(folders: list[str]) -> int:
    """Works on the folders, one after another."""
    try:
        with terminations():
            statuses = []
            for folder in folders:
                statuses.append(work(pathlib.Path(folder)))
                if statuses[-1] == STOPPED:
                    break
    except KeyboardInterrupt:
        return EXIT[STOPPED]
    return max((EXIT[status] for status in statuses), default=0)


if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main(sys.argv[1:]))
