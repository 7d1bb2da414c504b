"""experiments/speed: the roofline, the counts behind it, and the whole table at toy size, without torch."""

import json
import pathlib

import pytest
from click.testing import CliRunner
from helpers.scripts import scripts_of

from sora_jax.models.dit_config import DiTConfig, forward_flops
from sora_jax.models.vae import VAEConfig, reconstruction_flops

SPEED = pathlib.Path(__file__).parents[2] / "experiments" / "speed"


@pytest.fixture
def speed():
    """Gives a script of the experiment by name, as if run from its folder."""
    with scripts_of("speed") as load:
        yield load


def test_roofline_by_hand(speed):
    bound = speed("roofline").Roofline(flops=600.0, bytes=100.0, peak=200.0, bandwidth=50.0)
    assert (bound.intensity, bound.compute_seconds, bound.memory_seconds) == (6.0, 3.0, 2.0)
    assert (bound.limit, bound.seconds) == ("compute", 3.0)
    slow = speed("roofline").Roofline(flops=600.0, bytes=400.0, peak=200.0, bandwidth=50.0)
    assert (slow.limit, slow.seconds) == ("memory", 8.0)
    assert "memory limits it" in slow.sentence(16.0)
    assert slow.sentence(16.0).endswith("it takes 2.0 times the bound.")


def test_bytes_and_operations_of_a_pass_and_of_a_training_step(speed):
    # 10 rows through a matrix of 3×5, and a table that only takes part as parameters.
    roofline = speed("roofline")
    layers = [roofline.linear(10, 3, 5), roofline.Layer(0.0, 7.0, 0.0)]
    forward = roofline.roofline(layers, "bfloat16", 1.0, 1.0)
    assert forward.flops == 2 * 10 * 3 * 5
    assert forward.bytes == 4 * (15 + 7) + 2 * 10 * (3 + 5)
    training = roofline.roofline(layers, "float32", 1.0, 1.0, training=True)
    assert training.flops == 3 * forward.flops
    assert training.bytes == 4 * 10 * (15 + 7) + 4 * 3 * 10 * (3 + 5)


def test_layers_add_up_to_what_the_models_say(speed):
    roofline = speed("roofline")
    dit, lengths = DiTConfig(size="Nano", patch=(1, 1, 1)), [33, 7]
    total = lambda layers: sum(layer.flops for layer in layers)
    assert total(roofline.dit_layers(dit, lengths)) == pytest.approx(forward_flops(dit, 40, 33**2 + 7**2))
    vae, clips = VAEConfig(), (2, 9, 32, 64)
    both = (total(roofline.vae_layers(vae, work, *clips)) for work in ("encode", "decode"))
    assert sum(both) == pytest.approx(reconstruction_flops(vae, *clips))


def test_parameters_of_bert_are_counted(speed):
    settings = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
    layers = speed("roofline").bert_layers(settings, captions=3, slots=5)
    assert sum(layer.parameters for layer in layers) == 6 * 12 * 384**2
    assert sum(layer.flops for layer in layers) == 6 * (24 * 15 * 384**2 + 4 * 3 * 5 * 5 * 384)


@pytest.mark.slow
def test_the_table_at_toy_size(speed, monkeypatch, tmp_path):
    run = speed("run")
    # The machine's own speeds take seconds to measure, and are the roofline's business.
    monkeypatch.setattr(run, "compute_peak", lambda dtype: 1e12)
    monkeypatch.setattr(run, "memory_bandwidth", lambda: 1e11)
    out, history = tmp_path / "speed.json", tmp_path / "history.jsonl"
    toy = "--no-torch --size Pico --lengths 8,16 --clips 1x5x16x16 --captions 2x8 --repeats 1 --dtype float32"
    done = CliRunner().invoke(run.main, [*toy.split(), "--json", str(out), "--history", str(history)])
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert [json.loads(line) for line in history.read_text().splitlines()] == [result]
    names = ["DiT-Pico forward", "DiT-Pico training step", "VAE encode", "VAE decode", "MiniLM-L6"]
    assert len(result["rows"]) == len(names)
    for name, (row_name, row) in zip(names, result["rows"].items(), strict=True):
        assert row_name.startswith(name) and row_name in done.output
        assert row["utilisation"] == pytest.approx(row["gflop"] / 1e3 / row["jax"])
        assert row["limit"] in ("compute", "memory") and row["times_the_bound"] > 0
    assert done.output.count("times the bound.") == len(names)
    assert result["machine"] and result["commit"] and result["lengths"] == [8, 16]


def test_one_work_alone(speed, monkeypatch):
    run = speed("run")
    monkeypatch.setattr(run, "compute_peak", lambda dtype: 1e12)
    monkeypatch.setattr(run, "memory_bandwidth", lambda: 1e11)
    chosen = ["--part", "vae", "--work", "decode", "--dtype", "bfloat16", "--clips", "1x1x8x8"]
    done = CliRunner().invoke(run.main, ["--no-torch", *chosen, "--repeats", "1"])
    assert done.exit_code == 0, done.output
    assert "VAE decode 1×1×8×8, bfloat16" in done.output
    assert "encode" not in done.output and "DiT" not in done.output


def test_a_peer_that_computes_something_else_is_refused(speed):
    run, ours = speed("run"), speed("ours")

    class Wrong:
        def build(self, asked):
            way = {"first": 1.0, "gflop": 1.0, "parameters": 1, "same": True, "difference": 0.01}
            return {"ways": {"channels last": way}, "missing": []}

    case = ours.Case("VAE encode", "encode", "float32", lambda: None, [], {}, dict)
    with pytest.raises(run.click.ClickException, match="channels last computes something else"):
        run.measure(case, "vae", Wrong(), 1)


def test_without_torch_ours_stands_alone(speed, capsys):
    run = speed("run")
    assert run.start_peer("false") is None
    assert "nothing to compare with" in capsys.readouterr().err
