"""The training loop on a tiny objective: it goes on where it was, whatever ended it."""

import functools
import json
import pathlib
import random
import shlex
import signal
import subprocess
import sys
import types
import warnings

import fake_objective
import grain
import jax
import numpy as np
import pytest
from fake_objective import LineObjective, get_config

from sora_jax import cli
from sora_jax.errors import UserError
from sora_jax.mesh import MeshConfig, make_mesh, on_host, sharding
from sora_jax.train import __main__ as command
from sora_jax.train.checkpoint import Checkpoints, load_params, read_config
from sora_jax.train.loop import LoopConfig, read_loop_config, train
from sora_jax.train.metrics import MetricsWriter, parameter_count, peak_flops, read_metrics


def run_until_signal(workdir: pathlib.Path, steps: int, fatal_step: int, number: int) -> int:
    arguments = [
        sys.executable,
        fake_objective.__file__,
        str(workdir),
        str(steps),
        str(fatal_step),
        str(number),
    ]
    return subprocess.run(arguments, check=False, capture_output=True, timeout=120).returncode


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    return workdir, train(get_config(20), workdir, LineObjective())


def losses(workdir):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(workdir)]


def test_killed_at_random_steps_ends_where_the_uninterrupted_run_ends(tmp_path, uninterrupted):
    workdir, expected = uninterrupted
    for step in sorted(random.Random().sample(range(2, 20), 3)):
        assert run_until_signal(tmp_path, 20, step, signal.SIGKILL) == -signal.SIGKILL, step
    state = train(get_config(20), tmp_path, LineObjective())
    assert_same(state, expected)
    assert losses(tmp_path) == losses(workdir)


def test_sigterm_saves_and_exits_0(tmp_path, uninterrupted):
    workdir, expected = uninterrupted
    assert run_until_signal(tmp_path, 20, 7, signal.SIGTERM) == 0
    # Step 7 is looked at while step 8 runs: 8 is finished and saved, off the grid of checkpoint.every = 3.
    assert Checkpoints(tmp_path, LoopConfig("line", 20).checkpoint).latest == 8
    assert_same(train(get_config(20), tmp_path, LineObjective()), expected)
    assert losses(tmp_path) == losses(workdir)


def test_an_optimizer_on_the_host_gives_the_same_and_may_move_there_midway(tmp_path, uninterrupted):
    """A CPU's host memory is its own, but arrays, programs and checkpoints tell the two apart."""

    def go_on(steps, offload):
        config = get_config(steps)
        with config.optim.unlocked():
            config.optim.offload, config.optim.steps = offload, 20
        state = train(config, tmp_path, LineObjective())
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.opt_state)}
        assert kinds == {"pinned_host" if offload else "device"}
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.params)} == {"device"}
        return state

    expected = uninterrupted[1]
    for steps, offload in ((6, True), (9, False), (13, True)):
        go_on(steps, offload)
    assert losses(tmp_path) == losses(uninterrupted[0])[:13]
    assert_same(go_on(20, True), expected)


def test_devices_without_host_memory_are_told(monkeypatch):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])

    class Bare:
        device_kind = "Bare v0"

        def addressable_memories(self):
            return []

    assert on_host({"x": sharding(mesh, "B")})["x"].memory_kind == "pinned_host"
    monkeypatch.setattr(jax, "local_devices", lambda: [Bare()])
    with pytest.raises(
        UserError, match=r"'Bare v0' have no pinned_host memory; set config\.optim\.offload=False"
    ):
        on_host(sharding(mesh, "B"))


def test_it_learns_and_keeps_what_it_should(uninterrupted):
    workdir, state = uninterrupted
    rows = read_metrics(workdir)
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert np.mean([row["loss"] for row in rows[-3:]]) < 0.7 * np.mean([row["loss"] for row in rows[:3]])
    assert rows[5]["padding"] == pytest.approx(0.25)
    assert rows[5]["learning_rate"] > rows[18]["learning_rate"] > 0
    assert 0 < rows[5]["utilisation"] < 1
    assert int(state.step) == 20
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [18, 20]
    kept, given = read_config(workdir), json.loads(get_config(20).to_json())
    for key, value in given.items():
        assert kept[key] == (kept[key] | value if isinstance(value, dict) else value)
    assert kept["optim"]["b2"] == 0.99


def test_weights_load_without_the_optimizer(uninterrupted):
    workdir, state = uninterrupted
    template = jax.eval_shape(LineObjective().init, jax.random.key(0))
    assert_same(load_params(workdir, template), state.ema)
    assert_same(load_params(workdir, template, ema=False), state.params)
    table = load_params(workdir, ema=False)
    assert list(table) == ["linear/bias", "linear/kernel"]
    np.testing.assert_array_equal(table["linear/kernel"], state.params.linear.kernel[...])
    with pytest.raises(UserError, match="no checkpoint of step 5: there is only 18, 20"):
        load_params(workdir, template, step=5)


def test_compiles_one_step(tmp_path):
    objective = LineObjective()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(get_config(6), tmp_path, objective)
        train(get_config(9), tmp_path, objective)
    assert objective.traces == 2  # one for each call of train


def test_warns_when_a_batch_changes_its_shape(tmp_path):
    class Ragged(LineObjective):
        def data(self, config, share):
            cut = lambda index, batch: batch if index < 3 else {key: leaf[:2] for key, leaf in batch.items()}
            return super().data(config, share).map_with_index(cut)

    with pytest.warns(UserWarning, match="compiled again") as warned:
        train(get_config(6), tmp_path, Ragged())
    assert ["Step 4" in str(warning.message) for warning in warned if "compiled" in str(warning.message)] == [
        True
    ]


def test_stops_on_nan_and_keeps_the_batch(tmp_path):
    with pytest.raises(UserError, match="stopped at step 5: loss nan"):
        train(get_config(9), tmp_path, LineObjective(nan_at=5))
    with np.load(tmp_path / "nan_batch_step5.npz") as batch:
        assert list(batch["index"]) == [16, 17, 18, 19]
        assert np.isnan(batch["y"]).all()
    assert Checkpoints(tmp_path, LoopConfig("line", 9).checkpoint).latest == 3
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_never_saves_a_state_that_is_not_finite(tmp_path):
    with pytest.raises(UserError, match="stopped at step 6"):
        train(get_config(9), tmp_path, LineObjective(nan_at=6))
    assert Checkpoints(tmp_path, LoopConfig("line", 9).checkpoint).latest == 3


def test_goes_on_through_nan_where_asked(tmp_path):
    config = get_config(4)
    config.stop_on_nan = False
    train(config, tmp_path, LineObjective(nan_at=2))
    assert read_metrics(tmp_path)[1]["loss"] is None


def test_sheets_and_tensorboard(tmp_path):
    config = get_config(4)
    config.log.update(sheet_every=2, tensorboard=True, every=2)
    train(config, tmp_path, LineObjective())
    assert sorted(p.name for p in (tmp_path / "sheets").iterdir()) == ["step_0000002.png", "step_0000004.png"]
    assert list((tmp_path / "tensorboard").iterdir())
    assert [row["step"] for row in read_metrics(tmp_path)] == [2, 4]


def test_a_sheet_that_can_not_be_drawn_is_told_and_does_not_end_the_run(tmp_path, capsys):
    class NoSheet(LineObjective):
        def sample_sheet(self, model, step):
            raise UserError("the clip is gone")

    config = get_config(4)
    config.log.sheet_every = 2
    assert int(train(config, tmp_path, NoSheet()).step) == 4
    assert "no sheet of samples at step 2: UserError: the clip is gone" in capsys.readouterr().err


class FakeWandB(types.ModuleType):
    """As much of the package as a run uses; `calls` are what it was told."""

    Image = staticmethod(lambda image: image.size)

    def __init__(self, fails: Exception | None = None):
        super().__init__("wandb")
        self.calls, self.fails = [], fails

    def init(self, **settings):
        if self.fails:
            raise self.fails
        self.calls.append(("init", settings))
        return self

    def log(self, row, step):
        self.calls.append((step, row))

    def finish(self):
        self.calls.append(("finish", None))


def test_weights_and_biases_gets_rows_sheets_and_the_whole_configuration(tmp_path, monkeypatch):
    config = get_config(2)
    config.log.update(wandb="lines", sheet_every=2)
    names = []
    for steps in (2, 4):
        monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandB())
        config.steps = steps
        train(config, tmp_path / "run", LineObjective())
        (_, settings), *rows, (last, _) = fake.calls
        assert (settings["project"], settings["name"], settings["resume"]) == ("lines", "run", "allow")
        assert settings["config"]["optim"]["b2"] == 0.99
        assert [step for step, row in rows if "loss" in row] == [steps - 1, steps] and last == "finish"
        assert (steps, {"sheet": (8, 8)}) in rows
        names.append(settings["id"])
    assert names[0] == names[1]


class Untouched(LineObjective):
    """Fails where the long work begins."""

    def data(self, config, share):
        raise AssertionError("the data were asked for")


@pytest.mark.parametrize(
    ("package", "key", "value", "words"),
    [
        (
            "tensorboardX",
            "tensorboard",
            True,
            r"config\.log\.tensorboard needs .* pip install 'sora_jax\[tensorboard\]'",
        ),
        (
            "wandb",
            "wandb",
            "lines",
            r"config\.log\.wandb needs the package wandb: run pip install 'sora_jax\[wandb\]'",
        ),
    ],
)
def test_a_missing_package_is_told_before_any_long_work(tmp_path, monkeypatch, package, key, value, words):
    monkeypatch.setitem(sys.modules, package, None)
    config = get_config(2)
    config.log[key] = value
    with pytest.raises(UserError, match=words):
        train(config, tmp_path, Untouched())


def test_what_the_run_will_need_is_tried_before_any_long_work(tmp_path, monkeypatch):
    def refused(change=lambda config: None):
        config = get_config(2)
        change(config)
        with pytest.raises(UserError) as error:
            train(config, tmp_path / "run", Untouched())
        return str(error.value)

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "wandb", FakeWandB(RuntimeError("no network\nat all")))
        said = refused(lambda config: config.log.update(wandb="lines"))
        assert "can't be reached (no network)" in said and "WANDB_MODE=offline" in said
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=10))
        assert "No space is left on the disk for checkpoint" in refused()
    with monkeypatch.context() as patch:
        patch.setattr("sora_jax.train.loop.contact_sheet", lambda *a: exec("raise ImportError('no fonts')"))
        assert "can't be drawn (ImportError: no fonts)" in refused(
            lambda config: config.log.update(sheet_every=1)
        )


def test_data_that_were_skipped_are_in_the_log_the_metrics_and_the_end(tmp_path, capsys):
    class Summary:
        def __str__(self):
            return "3 videos; skipped 2 files"

        def metrics(self):
            return {"data/skipped_files": 2.0}

    class Told(LineObjective):
        def data_summary(self):
            return Summary()

    train(get_config(3), tmp_path, Told())
    assert [row["data/skipped_files"] for row in read_metrics(tmp_path)] == [2.0] * 3
    assert capsys.readouterr().err.count("data: 3 videos; skipped 2 files") == 1


def test_another_configuration_is_refused_by_name(tmp_path):
    train(get_config(3), tmp_path, LineObjective())
    config = get_config(3)
    config.data.clips = 500
    config.optim.lr = 0.5
    with pytest.raises(UserError, match=r"data.clips was 1000 and is 500; optim.lr was 0.1 and is 0.5"):
        train(config, tmp_path, LineObjective())
    longer = get_config(5)
    longer.log.every = 2
    assert int(train(longer, tmp_path, LineObjective()).step) == 5
    assert read_config(tmp_path)["steps"] == 5


def test_the_end_of_the_data_is_a_sentence(tmp_path):
    class Short(LineObjective):
        def data(self, config, share):
            return grain.experimental.LimitIterDataset(super().data(config, share), 2)

    with pytest.raises(UserError, match="data ended after 2 steps"):
        train(get_config(5), tmp_path, Short())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"optim": {"lrr": 1.0}},
            r"config.optim.lrr is no key of OptimConfig: did you mean config.optim.lr\?",
        ),
        ({"log": {"evry": 1}}, r"config.log.evry is no key of LogConfig: did you mean config.log.every\?"),
        ({"chekpoint": {}}, r"config.chekpoint is no key .* config.checkpoint\?"),
    ],
)
def test_mistyped_keys_are_named_with_the_nearest(change, words):
    config = get_config()
    del config["checkpoint"]
    with pytest.raises(UserError, match=words):
        read_loop_config(type(config)({**config.to_dict(), **change}))


def test_learning_rate_falls_over_the_run_unless_told_otherwise():
    assert read_loop_config(get_config(77)).optim.steps == 77
    config = get_config(77)
    config.optim.steps = 5
    assert read_loop_config(config).optim.steps == 5


def test_metrics_drop_rows_past_the_resumed_step_and_a_torn_line(tmp_path):
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.write('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    writer = MetricsWriter(tmp_path, 2)
    writer.write(3, {"loss": float("nan")})
    writer.close()
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": None}]


def test_peak_and_parameter_count():
    assert 1e8 < peak_flops() < 1e16
    assert parameter_count(LineObjective().init(jax.random.key(0))) == 9


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
    assert command.main(["--config", "toyworld_vae", "--config.loss.rows=5", "--help"]) == 0
    listed = capsys.readouterr().out
    assert "loss.rows = 5" in listed and "optim.b2" in listed and "weight of the Kullback-Leibler" in listed


def run_command(workdir: pathlib.Path, monkeypatch, objective: LineObjective, steps: int = 6) -> int:
    """The training command, on a line."""
    config = pathlib.Path(fake_objective.__file__).parent / "host_run.py"
    monkeypatch.setattr("sora_jax.train.loop.train", functools.partial(train, objective=objective))
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
