"""The runner: nothing is made twice, what fails is marked and the rest goes on, and any end can be gone on from."""

from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from helpers.slow import rest_slow

from sora_jax.cli.main import main
from sora_jax.errors import UserError, is_locked, locked
from sora_jax.sweep import runner
from sora_jax.sweep.algebra import Choice, product, seeds
from sora_jax.sweep.points import Point, Sweep, resolve
from sora_jax.sweep.results import DONE, FAILED, read_rows

PROGRAM = """
import pathlib, signal, sys
from sora_jax.sweep import runner
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
from tests.sweep.test_runner import points_of
runner._WORKER = "helpers.stub_worker"
runner.run_sweep(points_of("good", "slow", seeds_of=1), "s", pathlib.Path(sys.argv[1]), pathlib.Path("latents"))
"""


@pytest.fixture(autouse=True)
def stub(monkeypatch):
    monkeypatch.setattr(runner, "_WORKER", "helpers.stub_worker")
    monkeypatch.setattr(runner, "_LOOK", 0.02)


def points_of(*kinds: str, seeds_of: int = 2) -> list[Point]:
    """A point for each kind of `stub_worker` and seed."""
    choices = [Choice({"kind": kind}, {"steps": 100 + n}) for n, kind in enumerate(kinds)]
    return resolve(Sweep("toyworld_dit:debug", product(choices, seeds(seeds_of))))


def starts(out: pathlib.Path) -> dict[str, int]:
    """How often a process began on each run."""
    return {
        path.parent.name.rpartition("-")[0]: len(path.read_text().split())
        for path in out.glob("*/starts.txt")
    }


@pytest.mark.parametrize(("jobs", "one_process"), [(1, False), (2, False), (1, True)])
def test_every_run_is_made_once_and_has_one_row(tmp_path, jobs, one_process, capfd):
    points = points_of("good", "fine")
    for _ in range(2):
        rows = runner.run_sweep(points, "s", tmp_path, tmp_path / "latents", jobs, one_process)
        assert [row["status"] for row in rows] == [DONE] * 4
    assert starts(tmp_path) == {f"{kind}-seed-{seed}": 1 for kind in ("good", "fine") for seed in (0, 1)}
    assert read_rows(tmp_path / "results.jsonl") == rows
    assert [row["key"] for row in rows] == [point.key for point in points]
    assert rows[3]["labels"] == {"kind": "fine", "seed": "1"} and rows[3]["overrides"]["steps"] == "101"
    assert "fine, seed 1: done" in capfd.readouterr().err


@pytest.mark.parametrize("one_process", [False, True])
def test_what_fails_is_marked_the_rest_goes_on_and_it_is_tried_again(tmp_path, one_process):
    points = points_of("good", "bad", "killed", "silent", "fine", seeds_of=1)
    rows = runner.run_sweep(points, "s", tmp_path, tmp_path / "latents", 1, one_process)
    assert [row["status"] for row in rows] == [DONE, FAILED, FAILED, FAILED, DONE]
    errors = [row["error"] for row in rows]
    assert errors[1] == "It is bad: be good."
    assert errors[2].startswith("The run's process was ended by SIGKILL, perhaps for want of memory: see ")
    assert errors[3].startswith("The run's process was ended with status 1: see ")
    assert rows[2]["labels"]["kind"] == "killed" and rows[2]["machine"] and rows[2]["metrics"] == {}
    runner.run_sweep(points, "s", tmp_path, tmp_path / "latents", 1, one_process)
    counts = starts(tmp_path)
    assert counts["good-seed-0"] == counts["fine-seed-0"] == 1
    assert counts["bad-seed-0"] == counts["killed-seed-0"] == counts["silent-seed-0"] == 2


def test_a_row_stays_when_the_runs_folder_is_gone(tmp_path):
    points = points_of("good", seeds_of=1)
    runner.run_sweep(points, "s", tmp_path, tmp_path / "latents")
    (tmp_path / points[0].folder / "result.json").unlink()
    rows = runner.run_sweep(points, "s", tmp_path, tmp_path / "latents")
    assert starts(tmp_path) == {"good-seed-0": 1} and rows[0]["status"] == DONE


def begin(out: pathlib.Path) -> subprocess.Popen:
    """A sweep in a process of its own, which has one run finished and one under way when this returns."""
    root = pathlib.Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'tests'}"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(out)], env=environment, stderr=subprocess.PIPE
    )
    until = time.monotonic() + 120
    while "slow-seed-0" not in starts(out):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("number", rest_slow([signal.SIGTERM, signal.SIGINT, signal.SIGKILL]))
def test_an_interrupted_sweep_goes_on_where_it_was(tmp_path, number):
    process = begin(tmp_path)
    process.send_signal(number)
    process.wait(30)
    [folder] = tmp_path.glob("slow-*")
    if number != signal.SIGKILL:  # what ran was told to save, and did
        assert not is_locked(folder / ".lock") and b"finishing the steps" in process.stderr.read()
    assert [row["status"] for row in read_rows(tmp_path / "results.jsonl")] == [DONE]
    (folder / "be_quick").touch()
    if number == signal.SIGKILL:  # its run goes on alone, and no second process may work in its folder
        assert is_locked(folder / ".lock")
        os.kill(int((folder / "starts.txt").read_text()), signal.SIGTERM)
    points = points_of("good", "slow", seeds_of=1)
    rows = runner.run_sweep(points, "s", tmp_path, tmp_path / "latents")
    assert [row["status"] for row in rows] == [DONE, DONE]
    assert starts(tmp_path) == {"good-seed-0": 1, "slow-seed-0": 2}


def test_a_run_that_another_process_makes_is_waited_for(tmp_path, monkeypatch):
    points = points_of("good", "fine", seeds_of=1)
    asked = []

    def busy_at_first(path: pathlib.Path) -> bool:
        asked.append(path.parent.name[:4])
        return asked.count("good") < 3 and asked[-1] == "good"

    monkeypatch.setattr(runner, "is_locked", busy_at_first)
    runner.run_sweep(points, "s", tmp_path, tmp_path / "latents", jobs=1)
    assert starts(tmp_path) == {"good-seed-0": 1, "fine-seed-0": 1} and asked[:2] == ["good", "fine"]


def test_a_lock_is_one_process_at_a_time(tmp_path):
    path = tmp_path / "folder" / ".lock"
    assert not is_locked(path)
    with locked(path):
        assert is_locked(path)
    assert not path.exists()
    with pytest.raises(UserError, match="can't be written"), locked("/dev/null/lock"):
        pass


def test_many_that_want_a_lock_have_it_one_after_another(tmp_path):
    """Though the file is removed each time, under those that wait for it."""
    inside, most = 0, 0

    def work(_: int) -> None:
        nonlocal inside, most
        with locked(tmp_path / "lock"):
            inside += 1
            most = max(most, inside)
            time.sleep(0.005)
            inside -= 1

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        [*pool.map(work, range(40))]
    assert most == 1 and inside == 0


FILE = """
from sora_jax.sweep.algebra import arms, product, seeds
from sora_jax.sweep.points import Sweep

def get_sweep():
    kinds = {KINDS}
    settings = {{kind: {{"steps": 100 + number}} for number, kind in enumerate(kinds)}}
    return Sweep("toyworld_dit:debug", product(arms("kind", settings), seeds(2)))
"""


def test_the_command_shows_a_table_and_says_what_failed(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("s.py").write_text(FILE.format(KINDS=["good", "bad"]))
    assert main(["sweep", "s.py", "--jobs", "2"]) == 2
    out, err = capfd.readouterr()
    assert "| good | 2 | 1.5 ± 6.4 |" in out and "2 of 4 runs are done: runs/sweeps/s/results.jsonl" in err
    assert "error: 2 of 4 runs failed (bad, 0: It is bad: be good): the same command tries them again" in err
    assert main(["sweep", "s.py", "--only", "0-1", "--only", "0"]) == 0
    assert main(["sweep", "table", "s.py"]) == 0
    assert "note: 2 runs failed." in capfd.readouterr().err
    assert len(read_rows("runs/sweeps/s/results.jsonl")) == 4


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["s.py", "--config.stpes=3"],
            "config.stpes is no key of this configuration: did you mean config.steps?",
        ),
        (["s.py", "--only", "9"], "The sweep has no run '9': give a number from 0 to 1"),
        (["s.py", "--only", "1-2"], "The sweep has no run '2'"),
        (["s.py", "--print", "--xpk"], "--print, --slurm and --xpk exclude each other"),
        (["s.py", "--xpk"], "--out runs/sweeps/s must begin with /"),
        (["t.py"], "There is no sweep t.py"),
        (["table", "s.py"], "There are no results in runs/sweeps/s: run the sweep first"),
        (["s.py", "--jbos", "2"], "No such option '--jbos'"),
    ],
)
def test_what_the_command_cannot_do_is_one_sentence(tmp_path, monkeypatch, capfd, words, sentence):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("s.py").write_text(FILE.format(KINDS=["good"]))
    assert main(["sweep", *words]) == 2
    error = capfd.readouterr().err
    assert f"error: {sentence}" in error and error.count("\n") == 1
    assert not pathlib.Path("runs").exists()


def test_commands_for_clusters_make_the_same_runs(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("s.py").write_text(FILE.format(KINDS=["good", "slow"]))
    assert main(["sweep", "s.py", "--print"]) == 0
    lines = capfd.readouterr().out.splitlines()
    points = [line.partition("  # ") for line in lines]
    assert [title for _, _, title in points] == [
        "good, seed 0",
        "good, seed 1",
        "slow, seed 0",
        "slow, seed 1",
    ]
    for command, _, _ in points[:2]:
        program, *words = command.split()
        assert program == "sora-jax" and main(words) == 0
    assert [row["labels"]["kind"] for row in read_rows("runs/sweeps/s/results.jsonl")] == ["good", "good"]

    assert main(["sweep", "s.py", "--slurm"]) == 0
    script = capfd.readouterr().out.partition("#!/bin/bash")
    pathlib.Path("array.sh").write_text(script[1] + script[2])
    assert "#SBATCH --array=0-3" in script[2]
    pathlib.Path("srun").write_text('#!/bin/sh\necho "$@"\n')
    pathlib.Path("srun").chmod(0o755)
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": "2", "PATH": f".:{os.environ['PATH']}"}
    ran = subprocess.run(["bash", "array.sh"], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == points[2][0].split()

    out = tmp_path / "out"
    assert main(["sweep", "s.py", "--xpk", "--out", str(out), "--latents", str(out / "latents")]) == 0
    text = capfd.readouterr().out
    [wanted] = [line for line in text.splitlines() if line.endswith("# slow, seed 1")]
    assert "--workload s-3 " in wanted and "sora-jax train --hosts=auto --config toyworld_dit:debug" in wanted
    assert f"--workdir {out}/slow-seed-1-" in wanted and "--config.pipeline.seed=1" in wanted
    assert f"--config.latents.folder={out}/latents/" in wanted


def test_rows_say_what_made_them_and_name_no_owner(tmp_path):
    rows = runner.run_sweep(points_of("killed", seeds_of=1), "s", tmp_path, tmp_path / "latents")
    assert {"commit", "dirty", "versions", "machine"} <= set(rows[0])
    import socket

    assert socket.gethostname() not in json.dumps(rows[0]["machine"]).split('"')
