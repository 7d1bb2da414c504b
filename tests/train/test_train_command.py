"""The training command: its overrides, its messages, and what it says when a run ends."""

import functools
import pathlib
import shlex
import signal
import types

import pytest
from helpers import fake_objective
from helpers.fake_objective import LineObjective

from sora_jax.cli import main as cli
from sora_jax.train import __main__ as command
from sora_jax.train.loop import train

CONFIG_FILE = """
import ml_collections

def get_config(name="base"):
    return ml_collections.ConfigDict({"objective": "line", "name": name, "steps": 3, "optim": {"lr": 1e-3}})
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "line.py"
    path.write_text(CONFIG_FILE)
    return path


def test_command_line_overrides(config_file):
    arguments = [f"--config={config_file}:tiny", "--workdir", "runs/x", "--config.optim.lr=3e-4"]
    config, workdir, hosts = command.parse(arguments)
    assert (config.name, config.optim.lr, config.steps) == ("tiny", 3e-4, 3)
    assert (workdir, hosts.find()) == (pathlib.Path("runs/x"), ("", 1, 0))
    assert (config.optim.b2, config.log.every, config.seed) == (0.99, 50, 0)


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        (["--config.stop_on_nan=false"], False),
        (["--config.stop_on_nan", "False"], False),
        (["--config.stop_on_nan", "0"], False),
        (["--config.stop_on_nan"], True),
        (["--config.stop_on_nan=TRUE"], True),
    ],
)
def test_what_is_true_or_false_is_set_in_every_usual_way(config_file, flags, value):
    config = command.parse([f"--config={config_file}", *flags, "--workdir", "r"])[0]
    assert config.stop_on_nan is value


def test_a_value_may_stand_apart_and_be_negative(config_file):
    flags = [
        "--config.mesh.data",
        "-1",
        "--config.name",
        "a name",
        "--config.seed",
        "5",
        "--config.optim.lr=1",
    ]
    config = command.parse([f"--config={config_file}", "--workdir=r", *flags])[0]
    assert (config.mesh.data, config.name, config.seed, config.optim.lr) == (-1, "a name", 5, 1.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config={}", "--workdir=r", "--config.optim.lrr=1"], "did you mean config.optim.lr?"),
        (["--config={}", "--workdir=r", "--config.optm.lr=1"], "did you mean config.optim.lr?"),
        (
            ["--config={}", "--workdir=r", "--config.optim.lr=fast"],
            "config.optim.lr takes a number, such as 0.001",
        ),
        (["--config={}", "--wrkdir=r"], "Did you mean '--workdir'"),
        (["--config={}"], "--workdir is missing"),
        (["--workdir=r"], "--config is missing"),
        (["--config={}x", "--workdir=r"], "There is no configuration file"),
        (["--config={}:a", "--workdir=r", "more"], "'more' is no flag"),
    ],
)
def test_a_wrong_command_line_is_one_sentence_and_status_2(config_file, capsys, arguments, words):
    assert command.main([argument.format(config_file) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert error.count("\n") == 1


def test_both_commands_have_one_help(capsys, monkeypatch):
    texts = []
    for main, arguments in ((cli.main, ["train", "--help"]), (cli.main, ["train"]), (command.main, ["-h"])):
        assert main(arguments) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    assert texts[0].startswith("Usage: sora-jax train --config NAME --workdir FOLDER")
    for words in ("--host_timeout", "toyworld_dit", "ladder", "sora-jax config"):
        assert words in texts[0]
    assert command.main(["--config", "toyworld_vae", "--config.loss.batch_size=5", "--help"]) == 0
    listed = capsys.readouterr().out
    assert (
        "loss.batch_size = 5" in listed
        and "optim.b2" in listed
        and "weight of the Kullback-Leibler" in listed
    )


def run_command(workdir: pathlib.Path, monkeypatch, objective: LineObjective, steps: int = 6) -> int:
    """The training command, on a line."""
    config = pathlib.Path(fake_objective.__file__).parent / "host_run.py"
    monkeypatch.setattr(command, "run", functools.partial(train, objective=objective))
    return command.main([f"--config={config}", "--workdir", str(workdir), f"--config.steps={steps}"])


def test_an_interrupted_run_says_where_it_stopped_and_how_to_go_on(tmp_path, monkeypatch, capfd):
    workdir = tmp_path / "my run"
    assert run_command(workdir, monkeypatch, fake_objective.FatalLineObjective(3, signal.SIGINT)) == 0
    told = capfd.readouterr().err
    assert "from the beginning to step 6" in told and "finishing this step" in told
    assert f"stopped at step 4 of 6; the checkpoint is {workdir}/checkpoints/4" in told
    (onward,) = (line for line in told.splitlines() if line.startswith("to go on: sora-jax train --config="))
    again = shlex.split(onward.removeprefix("to go on: sora-jax train "))
    assert command.main(again) == 0
    told = capfd.readouterr().err
    assert "continues from step 4 to step 6" in told
    assert f"done: 6 steps; the checkpoint is {workdir}/checkpoints/6" in told
    assert command.main(again) == 0
    assert "nothing to do" in capfd.readouterr().err
    assert run_command(tmp_path / "short", monkeypatch, LineObjective(), steps=1) == 0
    assert "done: 1 step; the checkpoint is" in capfd.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_ended_before_its_first_step_says_so(tmp_path, monkeypatch, capfd, number, status):
    class Encoding(LineObjective):
        def data(self, config, share):
            signal.raise_signal(number)
            raise AssertionError("it was not ended")

    # A shell's background job ignores SIGINT, and so would the test in it.
    before = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    outside = signal.signal(number, before)
    try:
        assert run_command(tmp_path / "run", monkeypatch, Encoding()) == status
        assert signal.getsignal(number) is before
    finally:
        signal.signal(number, outside)
    told = capfd.readouterr().err
    assert "stopped; there is no checkpoint yet. To go on: sora-jax train --config=" in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("objective", "source"),
    [("vae", "my films"), ("vae", "toyworld"), ("dit", "films"), ("dit", "toyworld:1,films")],
)
def test_the_end_of_a_run_names_commands_that_there_are(objective, source):
    config = types.SimpleNamespace(objective=objective, steps=3, data=types.SimpleNamespace(source=source))
    said = command._onward(config, pathlib.Path("runs/x"), 3, [])
    lines = [shlex.split(line) for line in said.splitlines()[1:]]
    assert lines and ("toyworld" in said) == (objective == "vae" or "toyworld" in source)
    for words in lines:
        assert words[0] == "sora-jax" and words[1] in cli.cli.commands and "WORKDIR" not in " ".join(words)
        if words[1] == "train":
            config = command.parse(words[2:])[0]
            assert (config.autoencoder, config.data.source) == ("runs/x", source)
