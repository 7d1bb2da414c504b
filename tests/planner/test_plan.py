# ruff: noqa: E501 (lines of programs are as long as XLA makes them)
"""The planner: programs read and counted, chips, the roofline, what makes a spec fit, the command."""

import dataclasses
import importlib.util
import json
import math
import runpy

import jax
import jax.numpy as jnp
import pytest
from click.testing import CliRunner
from ml_collections import ConfigDict

from sora_jax.cli.main import main
from sora_jax.data.shards import own_shards
from sora_jax.distributed.chips import CHIPS, GIB, chip_of, read_topology
from sora_jax.distributed.mesh import PARAM_AXES, Share
from sora_jax.errors import UserError
from sora_jax.planner import estimate, programs, search
from sora_jax.planner.counts import count, estimate_counts
from sora_jax.planner.estimate import Counts, clip_of
from sora_jax.planner.hlo import Program
from sora_jax.train.__main__ import parse

LADDER = "configs/ladder.py"
WHERE = runpy.run_path(LADDER)["SLICES"]


def rung(name: str, *overrides: str) -> ConfigDict:
    return parse(["--config", f"{LADDER}:{name}", "--workdir", "none", *overrides])[0]


def compiled(function, *given):
    return jax.jit(function).lower(*given).compile()


# A program as the TPU's compiler prints it: a loop of three rounds without a count, an asynchronous gather that stands
# in two fusions, an all-reduce of which each device keeps its part, arrays on the chip, S(1).
TPU = """HloModule jit_step, replica_count=1, num_partitions=8

%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add = f32[] add(%x, %y)
}

%async_collective_fusion.1 (p: bf16[64,128]) -> bf16[256,128] {
  %p = bf16[64,128]{1,0} parameter(0)
  ROOT %g = bf16[256,128]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, frontend_attributes={chain_id="0"}
}

%async_collective_fusion.2 (p.2: bf16[64,128]) -> bf16[256,128] {
  %p.2 = bf16[64,128]{1,0} parameter(0)
  ROOT %g.2 = bf16[256,128]{1,0} all-gather(%p.2), channel_id=7, replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, frontend_attributes={chain_id="0"}
}

%all-reduce-scatter (input: f32[8,128]) -> f32[1,128] {
  %input = f32[8,128]{1,0:T(8,128)} parameter(0)
  %r = f32[8,128]{1,0:T(8,128)} all-reduce(%input), channel_id=9, replica_groups=[1,8]<=[8], to_apply=%sum
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,128]{1,0} dynamic-slice(%r, %zero, %zero), dynamic_slice_sizes={1,128}
}, execution_thread="sparsecore"

%body (carry: (s32[], f32[8,128], bf16[64,128])) -> (s32[], f32[8,128], bf16[64,128]) {
  %carry = (s32[], f32[8,128]{1,0:T(8,128)S(1)}, bf16[64,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %v = f32[8,128]{1,0:T(8,128)S(1)} get-tuple-element(%carry), index=1
  %w = bf16[64,128]{1,0} get-tuple-element(%carry), index=2
  %a = bf16[256,128]{1,0} fusion(%w), kind=kCustom, calls=%async_collective_fusion.1
  %b = bf16[256,128]{1,0} fusion(%w), kind=kCustom, calls=%async_collective_fusion.2
  %c = f32[8,128]{1,0:T(8,128)S(1)} convolution(%v, %b), window={size=1}, dim_labels=0bf_0io->0bf
  %s = f32[1,128]{1,0} fusion(%v), kind=kCustom, calls=%all-reduce-scatter
  %k = f32[8,128]{1,0} custom-call(%v), custom_call_target="tpu_custom_call"
  ROOT %t = (s32[], f32[8,128]{1,0:T(8,128)S(1)}, bf16[64,128]{1,0}) tuple(%i, %v, %w)
}

%condition (carry.2: (s32[], f32[8,128], bf16[64,128])) -> pred[] {
  %carry.2 = (s32[], f32[8,128]{1,0:T(8,128)S(1)}, bf16[64,128]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%carry.2), index=0
  %three = s32[] constant(3), metadata={op_name="a number 5 in words (12)"}
  ROOT %less = pred[] compare(%j, %three), direction=LT
}

ENTRY %main (first: (s32[], f32[8,128], bf16[64,128])) -> (s32[], f32[8,128], bf16[64,128]) {
  %first = (s32[], f32[8,128]{1,0:T(8,128)S(1)}, bf16[64,128]{1,0}) parameter(0)
  ROOT %loop = (s32[], f32[8,128]{1,0:T(8,128)S(1)}, bf16[64,128]{1,0}) while(%first), condition=%condition, body=%body
}
"""


def test_a_tpus_program_is_counted_as_often_as_its_loop_runs():
    program = Program(TPU.replace("0bf_0io->0bf", "bf_io->bf").replace("window={size=1}, ", ""))
    found = {one.kind: one for one in program.collectives}
    assert set(found) == {"all-gather", "reduce-scatter"} and len(program.collectives) == 2
    gather, scatter = found["all-gather"], found["reduce-scatter"]
    assert (gather.times, gather.devices, gather.sent) == (3, 4, 3 * 64 * 128 * 2)
    assert (scatter.times, scatter.devices, scatter.sent) == (3, 8, 8 * 128 * 4 * 7 / 8)
    assert program.kernels == {"tpu_custom_call": 3}


def test_loops_products_are_counted_where_xla_counts_one_round():
    def layers(x, kernels):
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]

    program = compiled(layers, jnp.ones((32, 64)), jnp.ones((5, 64, 64)))
    assert Program(program.as_text()).flops == 5 * 2 * 32 * 64 * 64
    assert program.cost_analysis()["flops"] < 2 * 2 * 32 * 64 * 64


def test_without_loops_counts_are_xlas_own():
    def work(x, kernel, image, taps):
        convolved = jax.lax.conv_general_dilated(image, taps, (2, 1), ((1, 1), (0, 2)), rhs_dilation=(1, 2))
        return jax.nn.softmax(x @ kernel), convolved

    given = jnp.ones((64, 96)), jnp.ones((96, 256)), jnp.ones((2, 8, 40, 50)), jnp.ones((16, 8, 3, 3))
    # As it is handed to the compiler: a CPU's makes library calls of convolutions, which nobody counts.
    program = jax.jit(work).lower(*given)
    cost = program.cost_analysis()
    read = Program(program.compiler_ir(dialect="hlo").as_hlo_text())
    # XLA adds the softmax's few operations, one each.
    assert read.flops <= cost["flops"] <= read.flops + 10 * 64 * 256
    assert read.bytes == pytest.approx(cost["bytes accessed"], rel=0.1)


def test_a_slice_is_read_and_an_update_written_not_the_whole():
    def work(table, place):
        row = jax.lax.dynamic_slice(table, (place, 0), (1, 512)) * 2.0
        return jax.lax.dynamic_update_slice(table, row, (place, 0))

    text = jax.jit(work, donate_argnums=0).lower(jnp.ones((4096, 512)), jnp.int32(3)).compile().as_text()
    assert Program(text).bytes < 20 * 512 * 4


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("v5e:3x3", "no slice 3x3 of v5e chips: the nearest are v5e:2x4 and v5e:4x4; sora-jax plan --chips"),
        ("v5e:32x32", "the nearest is v5e:16x16;"),
        ("v6e:4x2", "the nearest is v6e:2x4;"),
        ("v6e:1x8", "the nearest is v6e:2x4;"),
        ("v5e:2x2x1", "the nearest is v5e:2x2;"),
        ("v5p:8x4x4", "the nearest is v5p:4x4x8;"),
        ("v5p:16x16x28", "the nearest is v5p:16x16x24;"),
        ("v4:5x5x5", "the nearest are v4:4x4x4 and v4:4x4x8;"),
        ("v4:1x1x1", "the nearest is v4:2x2x1;"),
        ("v4:16x16x20", "the nearest is v4:16x16x16;"),
        ("tpu7x:99x99x99", "the nearest is tpu7x:16x24x24;"),
        ("v5e", "no slice without a shape of v5e chips: write one as v5e:2x4;"),
        ("v6e:0x2", "no slice 0x2 of v6e chips: write one as v6e:2x4;"),
        ("v5p:²x2x2", "write one as v5p:2x2x4;"),
        ("v5:2x2", r"No chip is called 'v5': did you mean v.+\? There are v4, v5e"),
        ("v7x:2x2x1", r"did you mean tpu7x\?"),
        ("h100:many", "names no number of chips"),
    ],
)
def test_topologies_that_do_not_exist_name_the_nearest_that_do(asked, words):
    with pytest.raises(UserError, match=words):
        read_topology(asked)


def test_topologies_have_chips_and_chips_have_devices():
    assert read_topology("v5p:8x8x8").count == 512 and read_topology("H100:64").count == 64
    assert read_topology("v5e:2x4").of(9).name == "v5e:4x4" and read_topology("h100:8").of(20).count == 20
    assert read_topology("v5p:8x8x8").of(513).name == "v5p:4x12x12"
    assert read_topology("v4:2x2x1").count == 4, "its two cores are one device"
    ironwood = read_topology("tpu7x:2x2x1")
    assert (ironwood.chips, ironwood.count) == (4, 8) and ironwood.of(16).name == "tpu7x:2x2x2"
    for name, chips in (("v4", 4096), ("v5p", 6144), ("tpu7x", 9216), ("v5e", 256)):
        counts = [read_topology(f"{name}:{shape}").chips for shape in CHIPS[name].slices]
        assert counts == sorted(counts) and counts[-1] == chips
        assert len(set(CHIPS[name].slices)) == len(counts)
    for kind, name in (("TPU v5 lite", "v5e"), ("TPU v5p", "v5p"), ("TPU7x", "tpu7x"), ("TPU v4", "v4")):
        assert chip_of(kind) is CHIPS[name]
    assert chip_of("cpu") is None


def test_a_chip_of_two_devices_costs_once():
    spec = programs.make_step_spec(rung("Ti"), "train", read_topology("tpu7x:2x2x1"))
    assert math.prod(spec.mesh.values()) == 8
    counts = Counts("compiler", 1153.5e12, 0.0, 1e12, 0.0, {}, 0, 1000.0)
    sure = estimate.Assumptions(1.0, 1.0, 1.0, 1.0, 0.0)
    found = estimate.estimate(counts, spec.topology, sure)
    assert found.seconds == pytest.approx(1.0), "half a chip's peak for each device"
    assert estimate.bill(spec, counts, found, 36.0, 1e6, sure).dollars == pytest.approx(1000 * 4 * 36 / 3600)
    sampler = dataclasses.replace(spec, step="sample")
    one = estimate.bill(sampler, counts, found, 36.0, None, sure)
    assert one.dollars == pytest.approx(one.seconds * 4 * 36 / 3600)


def test_chips_and_slices_are_listed_without_a_configuration():
    done = run("--chips")
    assert done.exit_code == 0
    assert all(name in done.output for name in CHIPS)
    assert "2x2x1, 2x2x2" in done.output and "16x16" in done.output and "9,216 chips" in done.output


@pytest.mark.parametrize("name", WHERE)
def test_every_rung_of_the_ladder_fits_its_own_numbers(name):
    spec = programs.make_step_spec(rung(name), "train", read_topology(WHERE[name]))
    clip, row = clip_of(spec), spec.config.pipeline
    assert clip.tokens <= row.seq_len, "the longest clip is one run"
    dit = programs.objective_of(spec.config).dit
    assert dit.heads % (spec.mesh["tensor"] * spec.mesh["sequence"]) == 0
    assert (row.seq_len + row.text_len) % (128 * spec.mesh["sequence"]) == 0
    assert row.shards in (1, spec.mesh["data"] * spec.mesh["fsdp"]) and row.batch_size % row.shards == 0
    kept = math.prod(spec.mesh[axis] for axis in PARAM_AXES)
    assert dit.width % (8 * kept) == 0 and dit.width >= 16 * kept, (
        "a share of a matrix is whole tiles, two or more"
    )
    assert programs.make_step_spec(rung(name), "sample", read_topology(WHERE[name])).passes == 2


@pytest.mark.slow
def test_arithmetic_agrees_with_the_compiler():
    """Of a small transformer on this machine: what is kept to the byte, products with attention's within a third."""
    config = rung(
        "Ti", "--config.dit.size=Pico", "--config.dit.remat=none", "--config.pipeline.batch_size=2",
        "--config.pipeline.seq_len=256",
        "--config.pipeline.text_len=128", "--config.text.max_tokens=64",
    )  # fmt: skip
    config.video.resolution = 32
    spec = programs.make_step_spec(config, "train", read_topology("cpu:1"))
    built = programs.build(spec)
    estimated = programs.estimate_memory(spec)
    for kind in ("parameters", "average", "optimizer", "batch"):
        assert built.memory[kind] == estimated.memory[kind] > 0
    found, expected = count(built), estimate_counts(spec)
    # Attention's products are among them here: they are no kernel's.
    assert found.attention == 0
    assert expected.products < found.products < 1.3 * (expected.products + expected.attention)


def test_the_roofline_by_hand():
    chip = read_topology("v5p:8x8x8")
    counts = Counts("compiler", 4.59e12, 0.0, 3e12, 2.765e9, {"all-gather": 6e8}, 3, 1000.0)
    sure = estimate.Assumptions(1.0, 1.0, 1.0, 1.0, 0.0)
    found = estimate.estimate(counts, chip, sure)
    assert found.compute == pytest.approx(0.01) and found.memory == pytest.approx(1e-3)
    assert found.network == pytest.approx(1e-3) and found.seconds == pytest.approx(0.011)
    assert found.best == pytest.approx(0.01) and found.bound == "compute"
    assert found.utilisation == pytest.approx(3e12 / 0.011 / 459e12)
    hidden = estimate.estimate(counts, chip, estimate.Assumptions(1.0, 1.0, 1.0, 1.0, 1.0))
    assert hidden.seconds == pytest.approx(0.01)
    many = read_topology("h100:64")
    assert estimate.estimate(counts, many, sure).network == pytest.approx(6e8 / 50e9), "between machines"
    assert estimate.estimate(counts, many.of(8), sure).network == pytest.approx(6e8 / 450e9)
    assert estimate.estimate(counts, chip, sure, 50).tokens_a_day == pytest.approx(found.tokens_a_day / 50)
    spec = programs.make_step_spec(rung("14B"), "train", read_topology("v5p:8x8x8"))
    bill = estimate.bill(spec, counts, found, 4.2, 1e6, sure)
    assert bill.seconds == pytest.approx(11.0) and bill.dollars == pytest.approx(11 * 512 * 4.2 / 3600)
    # Two clips a row: each video pays for half of it, and takes as long.
    sampler = programs.make_step_spec(rung("Ti"), "sample", read_topology("v5e:1x1"))
    video = estimate.bill(sampler, counts, found, 3600.0, None, sure)
    two = estimate.bill(sampler, dataclasses.replace(counts, clips=2), found, 3600.0, None, sure)
    assert video.seconds == pytest.approx(50 * 0.011, rel=0.1)
    assert two.dollars == pytest.approx(two.seconds / 2)
    with pytest.raises(UserError, match="no share of 1"):
        estimate.Assumptions(products=1.5)


def test_the_smallest_change_is_found_by_trying():
    spec = programs.make_step_spec(rung("XL"), "train", read_topology("v6e:8x8"))
    tried = []

    def build(other):
        tried.append(other)
        fits = other.config.dit.remat == "none" and other.config.pipeline.batch_size == 64
        return programs.Built(other, 0.0, {"activations": GIB}, fits, None)

    words, built = search.find_fit(spec, build, lambda words: None, most=20)
    assert (
        built.fits and "--config.pipeline.batch_size=64" in words and "--config.optim.accumulate=2" in words
    )
    assert tried[0].config.dit.remat == "none" and tried[0].batch_size == 128, "the mildest first"
    never = lambda other: programs.Built(other, 0.0, {}, False, None)
    assert search.find_fit(spec, never, lambda words: None, most=3) == ("", None)


@pytest.mark.parametrize("name", ["B", "14B", "vae-4x8x8"])
def test_every_change_that_may_be_proposed_can_be_typed(name):
    spec = programs.make_step_spec(
        rung(name), "train", read_topology("v5p:8x8x8" if name == "14B" else "v5e:4x8")
    )
    for values, topology in search.changes(spec):
        typed = rung(name, *(f"--config.{key}={value}" for key, value in values.items()))
        part = typed.pipeline if typed.objective == "dit" else typed.loss
        own_shards(Share(), part.get("shards", 1), part.batch_size)
        assert typed.to_dict() == search.change(spec.config, values).to_dict()


def run(*arguments: str):
    """The command as a person starts it, in this process."""
    return CliRunner().invoke(main_command(), ["plan", *arguments])


def main_command():
    from sora_jax.cli.main import cli

    return cli


def test_the_command_says_what_fits_and_what_it_costs(tmp_path):
    table, drawn = tmp_path / "plan.json", tmp_path / "memory.png"
    done = run(
        "--config", f"{LADDER}:B", "--topology", "h100:8", "--topology", "a100:8", "--json", str(table),
        "--picture", str(drawn), "--price", "2", "--assume", "products=0.5",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "h100:8" in done.output and "a100:8" in done.output
    first, second = json.loads(table.read_text())
    assert first["fits"] and first["memory_by"] == "arithmetic"
    assert second["estimate"]["seconds"] > first["estimate"]["seconds"]
    hours = first["bill"]["seconds"] / 3600
    assert first["bill"]["dollars"] == pytest.approx(8 * 2 * hours)
    assert drawn.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_what_does_not_fit_is_told_with_what_makes_it_fit():
    done = run(
        "--config",
        f"{LADDER}:B",
        "--topology",
        "a100:8",
        "--config.dit.remat=all",
        "--config.pipeline.batch_size=128",
    )
    assert "does NOT fit" in done.output and "what makes it fit: --config.dit.remat=" in done.output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--topology", "v5e:3x3"], "no slice 3x3 of v5e"),
        ([], "--topology v5e:4x4, or --devices 8"),
        (["--topology", "h100:8", "--config.dit.sise=B"], "did you mean"),
        (["--topology", "h100:8", "--config.mesh.tensor=3"], "needs a multiple of 24 devices"),
        (
            ["--topology", "h100:10", "--config.mesh.fsdp=1", "--config.mesh.tensor=5"],
            "12 heads can't be split",
        ),
        (["--topology", "h100:8", "--assume", "luck=1"], "is no assumption"),
        (["--topology", "h100:7", "--config.mesh.fsdp=7"], "batch of 64 doesn't divide"),
        (["--topology", "h100:8", "words"], "is no option of plan"),
        (["--config", f"{LADDER}:vae-4x8x8", "--topology", "h100:8", "--step", "sample"], "has no sampler"),
        (
            ["--topology", "h100:8", "--config.pipeline.batch_size=0"],
            "config.pipeline.batch_size=0 must be at least 1",
        ),
        (["--topology", "h100:8", "--config.video.seconds=60"], "tokens and a sequence holds 10,240"),
        (["--topology", "h100:8", "--config.video.steps=0"], "config.video.steps=0 must be above 0"),
        (["--topology", "h100:²"], "names no number of chips"),
        (["--config", f"{LADDER}:C", "--topology", "h100:8"], "No rung is called 'C': choose one of Ti, S"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, capsys):
    assert main(["plan", "--config", f"{LADDER}:B", *arguments]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error: ") and sentence in told


def test_without_libtpu_the_sentence_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["plan", "--config", f"{LADDER}:Ti", "--topology", "v5e:1x1"]) == 2
    assert "pip install libtpu" in capsys.readouterr().err


def test_a_video_is_so_many_tokens():
    clip = clip_of(programs.make_step_spec(rung("14B"), "sample", read_topology("v5p:2x4x4")))
    assert (clip.frames, clip.height, clip.width) == (721, 1080, 1920)
    assert clip.tokens == 181 * math.ceil(1080 / 32) * 60


def test_distillation_is_answered_with_what_can_be_planned():
    config, _, _ = parse(["--config=distill", "--workdir=runs/turbo"])
    with pytest.raises(UserError, match="plan the training of its teacher's architecture"):
        programs.make_step_spec(config, "train", read_topology("v5e:1x1"))
