"""Plans of open models: from settings alone, counted as the programs are, and what is wrong said in a sentence."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import pytest
from click.testing import CliRunner
from flax import nnx
from helpers.diffusers_folder import golden, write_folder

from sora_jax.checkpoints.pretrained import load_pretrained
from sora_jax.cli.main import cli
from sora_jax.distributed.chips import read_topology
from sora_jax.errors import UserError
from sora_jax.models.dit_config import published_flops
from sora_jax.models.wan import Wan
from sora_jax.planner.counts import count, estimate_counts, host_needs
from sora_jax.planner.estimate import clip_of
from sora_jax.planner.programs import build, make_step_spec, objective_of
from sora_jax.planner.published import _flops, published_config

SIZE, FRAMES = (32, 48), 9
HERE = read_topology("cpu:1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("models") / "tiny-wan", golden("wan_pipeline_unipc"))


@pytest.fixture(scope="module")
def settings_only(whole):
    """The folder without any weights."""
    folder = whole.parent / "settings"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def bytes_of(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_no_weights_are_needed_and_their_bytes_are_right(whole, settings_only):
    found = host_needs(published_config(settings_only, SIZE, FRAMES, "float32"))
    bundle = load_pretrained(whole)
    assert found.weights == {"transformer": bytes_of(bundle.dit), "autoencoder": bytes_of(bundle.vae)}
    assert (found.steps, found.passes) == (50, 2)
    assert found.clip.tokens == 3 * 2 * 3 and found.clip.frames == FRAMES
    narrow = host_needs(published_config(settings_only, SIZE, FRAMES, "bfloat16"))
    assert narrow.weights["transformer"] == bytes_of(bundle.dit) / 2
    small = host_needs(published_config(settings_only, SIZE, FRAMES, "float32", "int8"))
    assert small.weights["transformer"] == bytes_of(load_pretrained(whole, weights="int8").dit)
    assert found.stages["sampling"] > sum(found.weights.values())
    assert found.peak == max(found.stages.values()) and found.peak > sum(found.weights.values())


def test_ltx_video_is_planned_too(tmp_path):
    """Its decoder takes windows of 25 latent frames, each as a whole: of one, operations are the program's."""
    folder = write_folder(tmp_path / "tiny-ltx", golden("ltx_pipeline_text"))
    config = published_config(folder, (64, 96), 41, "float32")
    found, bundle = host_needs(config), load_pretrained(folder)
    assert found.weights == {"transformer": bytes_of(bundle.dit), "autoencoder": bytes_of(bundle.vae)}
    assert found.clip.tokens == 6 * 2 * 3 and found.clip.frames == 41
    latent = jnp.zeros((1, 6, 2, 3, 8))
    traced = _flops(jax.make_jaxpr(lambda latent: bundle.vae.decode(latent))(latent).jaxpr)
    assert found.clip.decode == pytest.approx(traced, rel=0.02)
    sampler = objective_of(config)
    one, two = (sampler.decoding_flops(frames, 32, 32) for frames in (193, 257))
    assert two == pytest.approx(2 * one)  # 33 latent frames are two windows of 25
    assert sampler.decoding_bytes(257, 32, 32) == sampler.decoding_bytes(193, 32, 32)


def test_two_transformers_take_twice_the_memory_and_no_more_time(tmp_path, settings_only):
    pair = write_folder(tmp_path / "pair", golden("wan_pipeline_pair"))
    one, two = (host_needs(published_config(name, SIZE, FRAMES)) for name in (settings_only, pair))
    assert two.weights["transformer"] == 2 * one.weights["transformer"]
    assert two.step_flops == one.step_flops


def test_operations_are_those_of_the_program(settings_only):
    """Arithmetic against a count of the traced products: the transformer's, and by hand the useful ones."""
    config = published_config(settings_only, SIZE, FRAMES, "float32")
    sampler, spec = objective_of(config), make_step_spec(config, "sample", HERE)
    dit = dataclasses.replace(sampler.dit, attention="reference")
    model = jax.eval_shape(lambda: Wan(dit, rngs=nnx.Rngs(0)))
    batch = sampler.shapes(1)
    N, M = batch.patches.shape[1], batch.text.shape[1]
    traced = jax.make_jaxpr(lambda *given: given[0](*given[1:]))(
        model,
        batch.patches,
        batch,
        batch.condition_init_sigma,
    )
    body = next(one for one in traced.jaxpr.eqns if one.primitive.name == "scan")
    outside = _flops(traced.jaxpr) - _flops(body.params["jaxpr"].jaxpr)
    counted = outside + dit.layers * _flops(body.params["jaxpr"].jaxpr)
    assert published_flops(dit, N, N**2, M, N * M) == pytest.approx(counted, rel=0.1)
    counts = estimate_counts(spec)
    clip = clip_of(spec)
    assert counts.useful == 2 * published_flops(
        dit, clip.tokens, clip.tokens**2, clip.words, clip.tokens * clip.words
    )


def test_products_and_convolutions_are_counted_by_hand():
    def work(x, kernel, matrix):
        x = jax.jit(lambda x: x @ matrix)(x)
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    like = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    counted = _flops(jax.make_jaxpr(work)(like(1, 6, 4, 5), like(3, 3, 7, 2), like(5, 7)).jaxpr)
    assert counted == 2 * 24 * 5 * 7 + 2 * 24 * 2 * 3 * 3 * 7


def test_arithmetic_is_near_the_compiler(settings_only):
    spec = make_step_spec(published_config(settings_only, SIZE, FRAMES, "float32"), "sample", HERE)
    built = build(spec)
    by_compiler, by_arithmetic = count(built), estimate_counts(spec)
    assert by_compiler.products == pytest.approx(by_arithmetic.products + by_arithmetic.attention, rel=0.25)


def test_a_video_longer_than_a_sequence_is_planned_by_its_windows(settings_only):
    with pytest.raises(UserError, match=r"in 2 windows of up to 81 frames: plan one of them, --frames 81;"):
        published_config(settings_only, SIZE, 97)
    with pytest.raises(UserError, match="choose a smaller --size"):
        published_config(settings_only, (4096, 4096), 9)


def test_a_video_is_cut_over_as_many_chips_as_the_heads_allow(settings_only):
    config = published_config(settings_only, SIZE, FRAMES)
    heads = objective_of(config).dit.heads
    spec = make_step_spec(config, "sample", read_topology("h100:8"))
    assert spec.mesh["sequence"] == math.gcd(heads, 8)
    assert spec.batch_size == spec.mesh["data"] == 8 // spec.mesh["sequence"]


def run(*arguments: str):
    return CliRunner().invoke(cli, ["plan", *arguments])


def test_the_command_says_what_this_machine_needs(settings_only, tmp_path):
    done = run("--model", str(settings_only), "--size", "48x32", "--frames", str(FRAMES))
    assert done.exit_code == 0, done.output
    for words in (
        "9 frames of 48x32",
        "18 tokens",
        "50 steps of 2 passes",
        "fits (by arithmetic)",
        "Apache-2.0",
    ):
        assert words in done.output
    table = tmp_path / "plan.json"
    done = run("--model", str(settings_only), "--frames", "9", "--topology", "h100:1", "--json", str(table))
    assert done.exit_code == 0, done.output
    [plan] = json.loads(table.read_text())
    assert plan["fits"] and plan["clip"]["frames"] == 9 and plan["bill"]["what"] == "a video"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--topology", "h100:1"], "name a --config, or a --model"),
        (["--model", "{folder}", "--config.steps=3"], "are of --config, not of --model"),
        (["--model", "{folder}", "--json", "x.json"], "are of plans for chips"),
        (
            ["--config", "toyworld_dit", "--size", "64x64", "--devices", "1"],
            "are of --model, not of --config",
        ),
        (["--model", "nowhere"], "nowhere"),
        (["--model", "toyworld"], "no diffusers pipeline"),
        (["--model", "{folder}", "--dtype", "int8"], "'int8' is not one of"),
    ],
)
def test_bad_input_is_one_sentence(settings_only, arguments, sentence, capsys):
    from sora_jax.cli.main import main

    status = main(["plan", *(one.format(folder=settings_only) for one in arguments)])
    said = capsys.readouterr().err
    assert status == 2 and sentence in said and len(said.strip().splitlines()) == 1


def test_an_open_model_s_own_frames_are_one_segment():
    """Its default video is no more tokens than it was trained on: a wider frame would be made in windows."""
    from sora_jax.checkpoints.wan_pipeline import FAMILIES

    for family in FAMILIES.values():
        assert family.width % 16 == family.resolution % 16 == 0
        cell = 32 if family.fps == 24 else 16
        tokens = (1 + (family.frames - 1) // 4) * (family.resolution // cell) * (family.width // cell)
        assert tokens <= family.tokens and 1 + (family.frames - 1) // 4 <= family.latent_frames
