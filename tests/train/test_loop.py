"""The training loop on a tiny objective: it goes on where it was, whatever ended it."""

import json
import pathlib
import random
import signal
import subprocess
import sys
import warnings

import grain
import jax
import numpy as np
import pytest
from helpers import fake_objective
from helpers.fake_objective import LineObjective, get_config

from sora_jax.checkpoints.store import Checkpoints, load_params, read_config
from sora_jax.distributed.mesh import MeshConfig, make_mesh, on_host, sharding
from sora_jax.errors import UserError
from sora_jax.train.loop import train
from sora_jax.train.loop_config import LoopConfig, read_loop_config
from sora_jax.train.metrics import read_metrics


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


@pytest.mark.slow
def test_a_growing_batch_compiles_once_and_goes_on_where_it_was(tmp_path):
    def run(workdir, *stops):
        config = get_config(12)
        config.optim.update({"accumulate_doubles": (2, 6), "steps": 12})
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*compiled again.*")
            for config.steps in stops:
                state = train(config, workdir, LineObjective())
        return state

    # Its updates are of batches 1, 2, 3-4, 5-6 and 7-10: it is stopped within the last.
    whole = run(tmp_path / "whole", 12)
    assert int(whole.opt_state.gradient_step) == 5 and int(whole.opt_state.mini_step) == 2
    assert_same(run(tmp_path / "stopped", 8, 12), whole)


@pytest.mark.slow
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
