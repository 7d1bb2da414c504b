"""What a run shows and keeps: rows, sheets, boards, and what it tries before any long work."""

import sys
import types

import jax
import pytest
from helpers.fake_objective import LineObjective, get_config

from sora_jax.errors import UserError
from sora_jax.train.loop import train
from sora_jax.train.metrics import MetricsWriter, parameter_count, peak_flops, read_metrics


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
