"""`log.profile_steps`: a profile is written whole or not at all, and training goes on."""

import signal

import jax
import pytest
from helpers.fake_objective import FatalLineObjective, LineObjective, get_config

from sora_jax.errors import UserError
from sora_jax.train.loop import train
from sora_jax.train.metrics import LogConfig


def config_with(steps: int, *profile_steps: int):
    config = get_config(steps)
    config.log.profile_steps = profile_steps
    return config


def test_a_profile_of_the_steps_asked_for(tmp_path, capsys):
    train(config_with(6, 3, 2), tmp_path, LineObjective())
    assert capsys.readouterr().err.count(f"the profile of steps 3 to 4 is in {tmp_path}/profile\n") == 1
    [file] = (tmp_path / "profile").rglob("*.xplane.pb")
    assert file.stat().st_size and not (tmp_path / "profile.partial").exists()


def test_a_full_disk_leaves_nothing_and_training_goes_on(tmp_path, monkeypatch, capsys):
    stop = jax.profiler.stop_trace

    def stop_on_a_full_disk() -> None:
        stop()
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: vm.xplane.pb; No space left on device")

    monkeypatch.setattr(jax.profiler, "stop_trace", stop_on_a_full_disk)
    assert int(train(config_with(5, 2, 2), tmp_path, LineObjective()).step) == 5
    told = [line for line in capsys.readouterr().err.splitlines() if "profile" in line]
    assert (
        len(told) == 1 and "No space left on device" in told[0] and told[0].startswith("warning: no profile")
    )
    assert not list(tmp_path.glob("profile*"))


def test_a_folder_that_can_not_be_written_leaves_nothing_and_training_goes_on(tmp_path, capsys):
    (tmp_path / "profile.partial").write_text("a file is in the way")
    assert int(train(config_with(4, 2, 1), tmp_path, LineObjective()).step) == 4
    assert capsys.readouterr().err.count("warning: no profile of steps 2 to 2") == 1
    assert not (tmp_path / "profile").exists()


def test_a_run_that_stops_amid_the_steps_leaves_nothing(tmp_path, capsys):
    state = train(config_with(9, 3, 6), tmp_path, FatalLineObjective(4, signal.SIGTERM))
    assert int(state.step) < 9 and "the run ended before" in capsys.readouterr().err
    assert not list(tmp_path.glob("profile*"))
    train(config_with(9, 7, 2), tmp_path, LineObjective())  # and the next one may record
    assert (tmp_path / "profile").is_dir()


@pytest.mark.parametrize("steps", [(3,), (0, 2), (3, 0), (1, 2, 3)])
def test_other_numbers_are_refused(steps):
    with pytest.raises(UserError, match=r"config\.log\.profile_steps"):
        LogConfig(profile_steps=steps)
