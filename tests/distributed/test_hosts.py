"""Several hosts: they meet, compute what one computes, end with a sentence when one is lost, and go on from there."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from helpers.compiling import QUICKLY
from helpers.fake_objective import LineObjective, get_config
from helpers.tiny_run import tiny_config

from sora_jax.checkpoints.store import load_params
from sora_jax.distributed import hosts, rendezvous
from sora_jax.distributed.hosts import Hosts
from sora_jax.distributed.mesh import Share, batch_share
from sora_jax.errors import UserError
from sora_jax.train import __main__ as command
from sora_jax.train.loop import train
from sora_jax.train.metrics import read_metrics

SCRIPT = pathlib.Path(__file__).parents[1] / "helpers" / "host_run.py"


def free_port() -> int:
    with socket.create_server(("", 0)) as door:
        return door.getsockname()[1]


def run_hosts(
    workdir: pathlib.Path, steps: int, mesh: dict, *each: list[str], devices: int = 2
) -> list[tuple[int, str]]:
    """Runs a process a host, with flags of its own; returns their statuses and what they wrote to stderr."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICKLY}",
        "PYTHONPATH": f"{SCRIPT.parents[2]}{os.pathsep}{SCRIPT.parents[1]}",
    }
    together = [f"--coordinator=127.0.0.1:{free_port()}", f"--hosts={len(each)}"]
    processes = []
    for host, flags in enumerate(each):
        flags = flags if len(each) == 1 else [*together, f"--host={host}", *flags]
        arguments = [sys.executable, str(SCRIPT), str(workdir), str(steps), json.dumps(mesh), *flags]
        processes.append(
            subprocess.Popen(
                arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
        )
    try:
        return [
            (process.returncode, error)
            for process, (_, error) in zip(
                processes, [process.communicate(timeout=230) for process in processes]
            )
        ]
    finally:
        for process in processes:
            process.kill()


def succeed(*arguments, **options) -> None:
    for status, error in run_hosts(*arguments, **options):
        assert status == 0, error[-3000:]


def ends(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """What a run ends with, by name: parameters and their averages."""
    averages = {f"ema/{name}": leaf for name, leaf in load_params(workdir, ema=True).items()}
    return load_params(workdir, ema=False) | averages


def assert_equal(one: pathlib.Path, other: pathlib.Path, atol: float = 0.0) -> None:
    ours, theirs = ends(one), ends(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=atol, err_msg=name)
    losses = [[(row["step"], row["loss"]) for row in read_metrics(run)] for run in (one, other)]
    np.testing.assert_allclose(*losses, rtol=0, atol=atol)


@pytest.mark.slow
def test_a_killed_host_ends_the_job_and_one_host_goes_on(tmp_path):
    """Step 8 is looked at before 9 runs, and every third is saved: the restart takes up step 3 or 6."""
    (first, told), (second, _) = run_hosts(tmp_path / "run", 12, {"data": 4}, [], ["--kill=8"])
    assert (first, second) == (2, -signal.SIGKILL), told
    assert "error: Another host of this job, host 1, is gone" in told
    assert "start all hosts again: the run goes on from step" in told and "Traceback" not in told
    step = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").glob("*") if path.name.isdigit())
    assert step in (3, 6) and f"from step {step} of {tmp_path / 'run'}." in told
    for name in ("run", "whole"):
        config = get_config(12)
        config.data.shards = 4
        train(config, tmp_path / name, LineObjective())
    # Four devices add up their rows' gradients in another order than one does.
    assert_equal(tmp_path / "run", tmp_path / "whole", atol=5e-6)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    flags = ["--sheet=12", "--heldout=4"]
    succeed(workdir, 12, {"data": 4}, flags, flags)
    return workdir


@pytest.mark.slow
def test_two_hosts_equal_one_and_write_once(uninterrupted, tmp_path):
    succeed(tmp_path / "one", 12, {"data": 4}, ["--heldout=4"], devices=4)
    assert_equal(uninterrupted, tmp_path / "one", atol=5e-7)
    rows = read_metrics(uninterrupted)
    measured = [(row["step"], row["heldout_loss"]) for row in rows if "heldout_loss" in row]
    one = [
        (row["step"], row["heldout_loss"]) for row in read_metrics(tmp_path / "one") if "heldout_loss" in row
    ]
    assert [step for step, _ in measured] == [4, 8, 12]
    np.testing.assert_allclose(measured, one, atol=5e-7)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[5]["padding"] == pytest.approx(0.25)
    # Both hosts' tokens are counted: three a row, four rows.
    assert rows[5]["tokens_per_second"] == pytest.approx(12 * rows[5]["steps_per_second"])
    assert [path.name for path in (uninterrupted / "sheets").iterdir()] == ["step_0000012.png"]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_both_start_again_and_end_where_the_uninterrupted_run_ends(uninterrupted, tmp_path, victim):
    flags = [["--kill=8"] if host == victim else [] for host in range(2)]
    statuses = run_hosts(tmp_path / "run", 12, {"data": 4}, *flags)
    assert statuses[victim][0] == -signal.SIGKILL
    status, told = statuses[1 - victim]
    assert status == 2 and f"error: Another host of this job, host {victim}, is gone" in told
    succeed(tmp_path / "run", 12, {"data": 4}, [], [])
    assert_equal(tmp_path / "run", uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [{"data": 2, "fsdp": 2}, {"fsdp": 4}, {"tensor": 4}, {"data": 2, "tensor": 2}]
)
def test_other_meshes_of_two_hosts_equal_one(tmp_path, mesh):
    """Where tensor lies over both hosts, both hold the same rows."""
    succeed(tmp_path / "two", 6, mesh, [], [])
    succeed(tmp_path / "one", 6, mesh, [], devices=4)
    assert_equal(tmp_path / "two", tmp_path / "one", atol=5e-7)
    rows = read_metrics(tmp_path / "two")
    assert rows[3]["tokens_per_second"] == pytest.approx(12 * rows[3]["steps_per_second"])


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 3])
def test_a_signal_to_one_host_stops_all_at_the_same_step(uninterrupted, tmp_path, every):
    succeed(tmp_path / "run", 12, {"data": 4}, [f"--every={every}"], [f"--every={every}", "--stop=5"])
    steps = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert 6 <= max(steps) <= 9
    succeed(tmp_path / "run", 12, {"data": 4}, [], [])
    assert_equal(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_the_transformer_on_two_hosts(tmp_path):
    """The autoencoder, the latent cache and sheets are several hosts' work too."""
    tiny_config(tmp_path, 1)  # makes its autoencoder
    flags, mesh = ["--real", "--sheet=3", "--heldout=3"], {"data": 2, "fsdp": 2}
    succeed(tmp_path / "two", 3, mesh, flags, flags)
    assert len(list((tmp_path / "two" / "sheets").iterdir())) == 1
    succeed(tmp_path / "one", 3, mesh, ["--real", "--heldout=3"], devices=4)
    assert_equal(tmp_path / "two", tmp_path / "one", atol=2e-6)
    two, one = (read_metrics(tmp_path / run)[-1]["heldout_loss"] for run in ("two", "one"))
    assert two == pytest.approx(one, abs=1e-5)


def meet_all(count: int, wait: float, *each: dict) -> list:
    """What `connect_hosts` gives each host that comes, or its error."""
    port = free_port()

    def come(changes: dict) -> object:
        arguments = {"address": f"127.0.0.1:{port}", "count": count, "wait": wait, "about": "a"} | changes
        try:
            return rendezvous.connect_hosts(**arguments)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(come, each))


def test_hosts_that_meet_hold_a_line_to_each_other():
    first, second, third = meet_all(3, 5.0, *({"index": i} for i in range(3)))
    assert (list(first), list(second), list(third)) == ([1, 2], [0], [0])
    second[0].sendall(b"?")
    assert first[1].recv(1) == b"?"
    for peers in (first, second, third):
        for peer in peers.values():
            peer.close()


def test_a_host_that_never_joins_is_named_to_all():
    first, third = meet_all(3, 0.5, {"index": 0}, {"index": 2})
    assert "Host 0 waited 0.5 s at 127.0.0.1:" in first and "of 3 hosts these never joined: 1." in first
    assert third == first
    [alone] = meet_all(2, 0.3, {"index": 1})
    assert "Host 1 could not reach host 0 at 127.0.0.1:" in alone and "connection refused" in alone


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"about": "b"}, "Host 1 was started with another configuration or version than host 0"),
        ({"count": 3}, "Host 1 was started as one of 3 and host 0 as one of 2"),
        ({"index": 2, "count": 2}, "Host 2 was started as one of 2"),
    ],
)
def test_a_host_that_was_started_otherwise_is_refused(wrong, words):
    first, second = meet_all(2, 0.5, {"index": 0}, {"index": 1} | wrong)
    assert words in second
    assert "these never joined: 1" in first


def test_the_same_host_twice_is_refused_and_strangers_are_passed_over():
    port = free_port()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(rendezvous.connect_hosts, f"127.0.0.1:{port}", 3, 0, 10.0, None)
        with contextlib.ExitStack() as stack:
            stranger = stack.enter_context(_connect(port))
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            one = pool.submit(rendezvous.connect_hosts, f"127.0.0.1:{port}", 3, 1, 10.0, None)
            time.sleep(0.3)
            with pytest.raises(UserError, match="There is a host 1 of this job already"):
                rendezvous.connect_hosts(f"127.0.0.1:{port}", 3, 1, 10.0, None)
            rendezvous.connect_hosts(f"127.0.0.1:{port}", 3, 2, 10.0, None)
            assert list(first.result()) == [1, 2] and list(one.result()) == [0]


def _connect(port: int) -> socket.socket:
    for _ in range(100):
        try:
            return socket.create_connection(("127.0.0.1", port))
        except OSError:
            time.sleep(0.05)
    raise TimeoutError


@dataclasses.dataclass
class Watched:
    """Host 0's watch over host 1 with a patience of 0.6 s, host 1's end of the line, and what the watch ended with."""

    watch: rendezvous.Watch
    there: socket.socket
    said: list[str]

    def last_words(self) -> str:
        self.watch.join(timeout=5)
        [words] = self.said
        return words


@pytest.fixture
def watched(monkeypatch):
    said = []

    def say(self, lost: str) -> None:
        said.append(f"{lost}; {self.advice()}")
        self._done.update(self._peers)

    monkeypatch.setattr(rendezvous.Watch, "_fail", say)
    here, there = socket.socketpair()
    watch = rendezvous.Watch({1: here}, 0, 0.6)
    yield Watched(watch, there, said)
    watch.leave()
    watch.join()
    here.close()
    there.close()


def test_values_are_exchanged_in_the_hosts_order(monkeypatch):
    """Three hosts, as many rounds; the first to come waits, and long values are whole."""
    pairs = [socket.socketpair() for _ in range(2)]
    own = [{1: pairs[0][0], 2: pairs[1][0]}, {0: pairs[0][1]}, {0: pairs[1][1]}]
    watches = [rendezvous.Watch(peers, host, 10.0) for host, peers in enumerate(own)]

    def rounds(host: int) -> list:
        got = []
        for number in range(3):
            time.sleep(0.02 * ((host + number) % 3))
            got.append(watches[host].all_gather_json({"host": host, "round": number, "long": "x" * 200_000}))
        return got

    with ThreadPoolExecutor() as pool:
        first, *others = pool.map(rounds, range(3))
    assert others == [first, first]
    assert [[(one["host"], one["round"]) for one in values] for values in first] == [
        [(host, number) for host in range(3)] for number in range(3)
    ]
    for watch in watches:
        watch.leave()
    for watch in watches:
        watch.join(timeout=5)
        assert not watch.is_alive()


def test_values_of_one_host_are_its_own_and_strangers_are_refused(monkeypatch):
    assert hosts.all_gather_json({"a": 1}) == [{"a": 1}]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="call sora_jax.distributed.hosts.join instead"):
        hosts.all_gather_json(None)


def test_a_closed_line_is_told_at_once(watched):
    watched.watch.advice = lambda: "start again."
    before = time.monotonic()
    watched.there.close()
    assert watched.last_words() == (
        "Another host of this job, host 1, is gone: its connection closed; start again."
    )
    assert time.monotonic() - before < 0.5


def test_host_0_passes_on_that_another_host_is_gone(watched):
    pairs = [socket.socketpair() for _ in range(2)]
    watch = rendezvous.Watch({number: here for number, (here, _) in enumerate(pairs, 1)}, 0, 10.0)
    pairs[0][1].close()
    with pairs[1][1].makefile() as heard:
        told = next(message for message in map(json.loads, heard) if message)
    watch.join(timeout=5)
    assert watched.said == [f"{told['lost']}; start the job again."]
    for here, there in pairs:
        here.close()
        there.close()


def test_a_silent_host_is_given_up_after_a_while(watched):
    before = time.monotonic()
    assert "host 1, is gone: no heartbeat for 0.6 s (--host_timeout)" in watched.last_words()
    assert 0.5 < time.monotonic() - before < 3


def test_an_error_is_passed_on(watched):
    watched.there.sendall(b'null\n{"ended": "The disk is full."}\n')
    assert "host 1, ended with an error (The disk is full); " in watched.last_words()


def test_a_host_that_is_done_may_go(watched):
    watched.there.sendall(b'{"done": 1}\n')
    watched.there.close()
    watched.watch.join(timeout=5)
    assert not watched.said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--hosts=2", "--host=0"],
            "--coordinator= is no address of host 0: write it as HOST:PORT, or set JAX_C",
        ),
        (["--hosts=2", "--host=2", "--coordinator=a:1"], "--host=2 is none of --hosts=2: they are 0 to 1"),
        (["--hosts=two"], "--hosts=two is no whole number of 1 or more"),
        (["--hosts=2", "--coordinator=a:1"], "--host= is no whole number of 0 or more"),
        (["--hosts=auto"], "--hosts=auto finds no TPU pod, SLURM, Open MPI or Kubernetes here"),
        (
            ["--hosts=2", "--host=1", "--coordinator=127.0.0.1:{}", "--join_timeout=0.2"],
            "Host 1 could not reach host 0",
        ),
        (
            ["--hosts=2", "--host=0", "--coordinator=127.0.0.1:{}", "--join_timeout=0.2"],
            "these never joined: 1.",
        ),
    ],
)
def test_wrong_flags_and_hosts_that_never_come_are_one_sentence_and_status_2(tmp_path, capsys, flags, words):
    (tmp_path / "c.py").write_text("import ml_collections\nget_config = ml_collections.ConfigDict\n")
    given = [f"--config={tmp_path / 'c.py'}", "--workdir=x", *(flag.format(free_port()) for flag in flags)]
    assert command.main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1


def test_hosts_are_found_in_the_environment(monkeypatch):
    for name, value in ((hosts.ADDRESS, "10.0.0.1:1234"), (hosts.COUNT, "4"), (hosts.INDEX, "3")):
        monkeypatch.setenv(name, value)
    assert Hosts().find() == ("10.0.0.1:1234", 4, 3)
    assert Hosts(hosts="2", host="1").find() == ("10.0.0.1:1234", 2, 1)
    slurm = {"JOB_ID": "7", "STEP_NODELIST": "node[001-002]", "NTASKS": "2", "PROCID": "1", "LOCALID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert Hosts(hosts="auto").find() == ("node001:61447", 2, 1)


def test_the_commands_of_the_page_on_scaling_are_understood(monkeypatch):
    monkeypatch.chdir(SCRIPT.parents[2])
    page = (
        pathlib.Path("docs/scaling.md")
        .read_text()
        .replace("\\\n", " ")
        .replace(" … ", " configs/toyworld_dit.py ")
    )
    calls = re.findall(r"python -m sora_jax\.train (--[^#\n'&]+--workdir[^#\n'&]+)", page)
    assert len(calls) == 5
    added = re.findall(r"`(--config\.[^`]+)`", page)
    assert len(added) == 2
    for call in [*calls, *(f"{calls[0]} {flags}" for flags in added)]:
        _, _, hosts = command.parse(shlex.split(call))
        assert hosts.count == "auto" or hosts.find()


def mesh_of(processes: list, **sizes: int) -> types.SimpleNamespace:
    """As much of a mesh as `batch_share` reads: the processes whose devices lie on it, in order."""
    shape = {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1} | sizes
    devices = [types.SimpleNamespace(empty=False, process_index=process) for process in processes]
    return types.SimpleNamespace(empty=False, shape=shape, devices=np.array(devices).reshape(*shape.values()))


def test_a_host_reads_the_shards_whose_rows_lie_on_its_devices(monkeypatch):
    pairs = [0, 0, 1, 1]
    assert batch_share(mesh_of(pairs, data=4)) == Share(((0, 1), (2, 3)), 4, 0)
    assert batch_share(mesh_of(pairs, tensor=4)) == Share(((0,), (0,)), 1, 0)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert batch_share(mesh_of(pairs, data=4)).assign(8) == (4, 5, 6, 7)
    assert batch_share(mesh_of(pairs, data=4)).assign(2) == (1,)
    assert batch_share(mesh_of(pairs, data=2, sequence=2)).assign(2) == (1,)
    assert batch_share(mesh_of(pairs, tensor=4)).assign(3) == (0, 1, 2)
    assert batch_share(mesh_of(pairs, tensor=4)).copies == 2
    # A pod's devices may lie on the mesh in an order of their own.
    crossed = batch_share(mesh_of([0, 1, 0, 1], data=4))
    assert crossed.assign(4) == (1, 3) and crossed.assign(8) == (2, 3, 6, 7)
    with pytest.raises(UserError, match="shards=2 .* use 1 or 2 of them, .* a multiple of 4"):
        crossed.assign(2)
    with pytest.raises(UserError, match="shards=1 .* the 2 hosts .* use 1 of them"):
        batch_share(mesh_of(pairs, data=4)).assign(1)
