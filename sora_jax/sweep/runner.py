"""Running a sweep on this machine: n runs at a time, in processes of their own, none twice."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from sora_jax.errors import is_locked
from sora_jax.sweep.points import Point
from sora_jax.sweep.results import (
    DONE,
    EXIT,
    FAILED,
    LOCK,
    LOG,
    POINT,
    RESULT,
    RESULTS,
    STOPPED,
    Row,
    collect,
    origin,
    read_row,
    read_rows,
    write_point,
    write_row,
)
from sora_jax.train.metrics import read_metrics
from sora_jax.train.stopping import terminations

_WORKER = "sora_jax.sweep.worker"
_LOOK = 0.5  # seconds between looks at the runs


@dataclasses.dataclass(frozen=True)
class Run:
    """A point that is to be run, and its folder."""

    point: Point
    workdir: pathlib.Path


@dataclasses.dataclass
class Worker:
    """A process that works on some runs, one after another, and those that it hasn't finished."""

    process: subprocess.Popen[bytes]
    left: list[Run]


def run_sweep(
    points: Sequence[Point],
    sweep: str,
    out: pathlib.Path,
    latents: pathlib.Path,
    jobs: int = 1,
    one_process: bool = False,
) -> list[Row]:
    """Makes the runs that have no result yet; returns the rows of all points, failed ones too, in their order.

    It may be stopped at any time, by Ctrl-C, SIGTERM or a kill, and goes on where it was: finished runs stay, those
    under way go on from their newest checkpoint. A run that fails is marked so in its row and the rest goes on; the
    next time it is tried again. Several of these may work on one folder: a run has one process at a time.

    Args:
      points: of `points.resolve`.
      sweep: its name.
      out: the folder of workdirs and results.jsonl.
      latents: the folder of encoded clips, which all sweeps may share.
      jobs: runs at a time.
      one_process: all in one process, one after another: for runs so short that starting one would take longer.

    Raises:
      KeyboardInterrupt: it was stopped; runs under way have saved.
    """
    done = {row["key"] for row in read_rows(out / RESULTS) if row["status"] == DONE}
    waiting = [
        Run(point, write_point(point, sweep, out, latents)) for point in points if point.key not in done
    ]
    groups = [waiting] if one_process and waiting else [[job] for job in waiting]
    start = len(points) - len(waiting)
    bar = tqdm(total=len(points), initial=start, unit="run", disable=None, dynamic_ncols=True)
    with contextlib.closing(bar):
        for job, row in _finish(collections.deque(groups), bar, jobs):
            _say(f"{job.point.title}: {'done' if row['status'] == DONE else row['error']}")
            bar.update()
            collect(out)
    wanted = {point.key for point in points}
    return [row for row in collect(out) if row["key"] in wanted]


def _finish(waiting: collections.deque[list[Run]], bar: tqdm, jobs: int) -> Iterator[tuple[Run, Row]]:
    """Yields each run with its row when it has ended."""
    workers: list[Worker] = []
    try:
        with terminations():
            while waiting or workers:
                for _ in range(len(waiting)):
                    group = waiting.popleft()
                    # What another process works on is asked for again later.
                    if len(workers) == jobs or any(is_locked(job.workdir / LOCK) for job in group):
                        waiting.append(group)
                    else:
                        workers.append(_start(group))
                bar.set_postfix_str(_progress(workers) or "another process makes these runs: waiting for it")
                time.sleep(_LOOK)
                for worker in list(workers):
                    status = worker.process.poll()
                    while worker.left and (row := _new_row(worker.left[0])):
                        yield worker.left.pop(0), row
                    if status is None:
                        continue
                    workers.remove(worker)
                    if status == EXIT[STOPPED]:
                        raise KeyboardInterrupt
                    if worker.left:  # it ended before the row was written
                        job, *others = worker.left
                        yield job, _mark_killed(job, status)
                        waiting.extend([others] if others else [])
    except BaseException:  # where the caller fails too: it closes this generator
        _stop(workers)
        raise


def _start(group: list[Run]) -> Worker:
    """A process in a session of its own: Ctrl-C then comes to this one alone, which passes it on once."""
    for job in group:
        if (row := read_row(job.workdir)) and not _is_done(job, row):
            (job.workdir / RESULT).unlink()  # of an attempt that failed, or of other evaluations
    command = [sys.executable, "-m", _WORKER, *(str(job.workdir) for job in group)]
    with open(group[0].workdir / LOG, "ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    return Worker(process, list(group))


def _is_done(job: Run, row: Row) -> bool:
    return (row["status"], row["key"]) == (DONE, job.point.key)


def _new_row(job: Run) -> Row | None:
    row = read_row(job.workdir)
    return row if row and row["key"] == job.point.key else None


def _stop(workers: Sequence[Worker]) -> None:
    """Lets runs under way finish their step and save; a second Ctrl-C ends them at once."""
    if not workers:
        return
    _say("finishing the steps under way, then saving; Ctrl-C again ends the runs at once")
    try:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.wait()
    except KeyboardInterrupt:
        for worker in workers:
            worker.process.kill()
        raise


def _mark_killed(job: Run, status: int) -> Row:
    """A row for a run whose process ended without writing one: it was killed, or couldn't begin."""
    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
    memory = ", perhaps for want of memory" if status == -signal.SIGKILL else ""
    sentence = f"The run's process was ended {how}{memory}: see {job.workdir / LOG}."
    begin = json.loads((job.workdir / POINT).read_text())["row"]
    row = begin | {"status": FAILED, "error": sentence, "metrics": {}} | origin()
    write_row(job.workdir, row)
    return row


def _progress(workers: Sequence[Worker]) -> str:
    words = []
    for job in [worker.left[0] for worker in workers if worker.left]:
        rows = read_metrics(job.workdir)
        step = rows[-1]["step"] if rows else 0
        words.append(f"{job.point.title}: step {step}/{job.point.config.steps}")
    return "; ".join(words)


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)
