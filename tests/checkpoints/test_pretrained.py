"""Diffusers folders: what they make is what diffusers makes of them, and what is wrong with them is said."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from helpers.diffusers_folder import golden, write_folder
from helpers.parity import psnr, relative_error

import sora_jax
from sora_jax.checkpoints import pretrained
from sora_jax.checkpoints.bundle import find, load_bundle
from sora_jax.checkpoints.pretrained import load_model, read_sampling
from sora_jax.cli.main import cli
from sora_jax.errors import UserError
from sora_jax.pipeline.pipeline import list_models

UNIPC = golden("wan_pipeline_unipc")
SETTINGS = UNIPC["settings"]
SHAPE = {"frames": SETTINGS["num_frames"], "size": (SETTINGS["height"], SETTINGS["width"])}
ASKED = SHAPE | {
    "steps": SETTINGS["num_inference_steps"],
    "guidance": SETTINGS["guidance_scale"],
    "negative": SETTINGS["negative_prompt"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("models") / "tiny-wan", UNIPC)


def test_a_pipeline_makes_what_diffusers_makes(folder):
    """Same noise, four steps of UniPC, guidance and a negative prompt; then the rest of the way to frames."""
    pipeline = sora_jax.load(folder)
    job = pipeline.request_job(SETTINGS["prompt"], UNIPC["noise"][0], **ASKED)
    (latents,) = pipeline.sample_latents([job])
    assert relative_error(latents, UNIPC["latents"][0]) < 1e-3
    video = pipeline.decode_job(job, latents).whole()
    assert video.frames.shape == (9, 32, 48, 3)
    assert psnr(video.frames, UNIPC["frames"][0]) > 50
    assert video.fps == 16


def test_the_euler_scheduler_is_followed_too(folder, tmp_path):
    euler = golden("wan_pipeline_euler")
    pipeline = sora_jax.load(write_folder(tmp_path / "euler", euler))
    job = pipeline.request_job(SETTINGS["prompt"], euler["noise"][0], **ASKED)
    assert job.settings.solver == "euler"
    assert relative_error(pipeline.sample_latents([job])[0], euler["latents"][0]) < 1e-3


@pytest.fixture(scope="module")
def sampled(folder):
    """A job, its latents with the model's own weights, and their frames."""
    pipeline = sora_jax.load(folder)
    job = pipeline.request_job(SETTINGS["prompt"], UNIPC["noise"][0], **ASKED)
    (latents,) = pipeline.sample_latents([job])
    return job, latents, pipeline.decode_job(job, latents).whole().frames


def test_int8_weights_make_nearly_the_same_frames(folder, sampled):
    job, latents, frames = sampled
    pipeline = sora_jax.load(folder, weights="int8")
    assert pipeline.dit.blocks.qkv.kernel.dtype == np.int8
    (own,) = pipeline.sample_latents([job])
    assert 1e-4 < relative_error(own, latents) < 0.1
    assert psnr(pipeline.decode_job(job, own).whole().frames, frames / 255.0) > 35


def test_offloaded_blocks_make_the_same_latents(folder, sampled):
    job, latents, _ = sampled
    pipeline = sora_jax.load(folder, offload=True)
    assert relative_error(pipeline.sample_latents([job])[0], latents) < 1e-5
    cached = dataclasses.replace(job, settings=dataclasses.replace(job.settings, step_cache=0.1))
    with pytest.raises(UserError, match="is offloaded, a layer at a time: step_cache is 0 for it"):
        pipeline.sample_latents([cached])


@pytest.mark.slow
def test_a_model_with_a_timestep_a_token_animates_as_diffusers_does(tmp_path):
    """TI2V's kind: the picture is a conditioning frame of the canvas, which is timestep 0 for its tokens."""
    given = golden("wan_pipeline_given")
    pipeline = sora_jax.load(write_folder(tmp_path / "ti2v", given))
    size = given["settings"]["height"], given["settings"]["width"]
    job = pipeline.job(
        "animate", given["picture"], SETTINGS["prompt"], **ASKED | {"size": size, "duration": None}
    )
    assert job.sketch.fps == 24
    job = dataclasses.replace(job, noise=np.moveaxis(given["noise"][0], 0, -1))
    (latents,) = pipeline.sample_latents([job])
    assert relative_error(latents, given["latents"][0]) < 1e-3
    assert psnr(pipeline.decode_job(job, latents).whole().frames, given["frames"][0]) > 50


@pytest.mark.slow
def test_two_transformers_are_taken_by_noise_level(tmp_path):
    """A14B's kind: the first above the boundary, the second below; a packed step runs both where it needs both."""
    pair = golden("wan_pipeline_pair")
    pipeline = sora_jax.load(write_folder(tmp_path / "a14b", pair))
    assert read_sampling(tmp_path / "a14b", "original").shift == 12
    job = pipeline.request_job(SETTINGS["prompt"], pair["noise"][0], **ASKED)
    (latents,) = pipeline.sample_latents([job])
    assert relative_error(latents, pair["latents"][0]) < 1e-3
    offloaded = sora_jax.load(tmp_path / "a14b", offload=True)
    assert relative_error(offloaded.sample_latents([job])[0], latents) < 1e-5
    numbers = lambda dit: sum(np.prod(leaf.shape, dtype=int) for leaf in jax.tree.leaves(dit))
    assert numbers(offloaded.dit) == numbers(pipeline.dit)
    # Beside one that starts late, they are on different sides of the boundary at the same step.
    late = pipeline.job("edit", np.zeros((9, 32, 48, 3), np.uint8), "a", strength=0.6, fps=16, **ASKED)
    together = pipeline.sample_latents([job, late])
    np.testing.assert_allclose(together[0], latents, atol=1e-4)


def test_the_command_line_takes_noise_and_gives_latents(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("noise.npy", UNIPC["noise"][0])
    words = ["generate", SETTINGS["prompt"], "--model", str(folder), "--noise", "noise.npy", "-q"]
    words += ["--latents-out", "latents.npy", "--frames", "9", "--size", "48x32", "--steps", "4"]
    words += [
        "--guidance",
        "5",
        "--negative",
        SETTINGS["negative_prompt"],
        "--weights",
        "float32",
        "--offload",
    ]
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "out.mp4  48×32, 9 frames at 16 fps" in result.output
    assert relative_error(np.load("latents.npy"), UNIPC["latents"][0]) < 1e-3


def test_a_checkpoint_brings_its_settings(folder):
    sampling = read_sampling(folder)
    assert (sampling.solver, sampling.shift, sampling.steps, sampling.guidance) == ("unipc", 3.0, 50, 5.0)
    original = read_sampling(folder, "original")
    assert (original.shift, original.ends, len(original.negative) > 100) == (5.0, (0.999, 0.0), True)
    assert load_model(folder, reference="original").dit.config.reference == "original"
    pipeline = sora_jax.load(folder, lazy=True)
    fields = pipeline.request_defaults({})
    assert (fields["solver"], fields["resolution"], fields["aspect"], fields["fps"]) == (
        "unipc",
        480,
        "832:480",
        16,
    )
    assert "resolution" not in pipeline.request_defaults({"size": (32, 48)})


def test_models_lists_it(folder):
    (entry,) = [entry for entry in list_models([folder.parent]) if entry.name == str(folder)]
    assert (entry.kind, entry.summary) == ("diffusers", "Wan2.1, 480p, Apache-2.0; 2 layers of 48")


def _change(folder, part, **values):
    path = folder / part
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (lambda f: shutil.rmtree(f / "vae"), "has no vae: the model's folder is incomplete"),
        (lambda f: (f / "transformer" / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "scheduler" / "scheduler_config.json").write_text("{"), "can't be read"),
        (
            lambda f: _change(f, "model_index.json", _class_name="CogVideoXPipeline"),
            "is of a CogVideoXPipeline",
        ),
        (
            lambda f: _change(f, "model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"]),
            "has no transformer_2",
        ),
        (
            lambda f: _change(f, "scheduler/scheduler_config.json", use_flow_sigmas=False),
            "isn't set for flow matching",
        ),
        (
            lambda f: _change(f, "scheduler/scheduler_config.json", _class_name="DDIMScheduler"),
            "is a DDIMScheduler",
        ),
        (
            lambda f: _change(f, "text_encoder/config.json", d_model=32),
            "32 wide and the transformer takes 16",
        ),
        (lambda f: _change(f, "transformer/config.json", num_layers=3), "'blocks.2.*missing"),
        (lambda f: _change(f, "transformer/config.json", attn_window=3), "isn't known, 'attn_window'=3"),
        (
            lambda f: (f / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x10\0\0\0"),
            "damaged or cut short",
        ),
        (lambda f: (f / "transformer" / "diffusion_pytorch_model.safetensors").unlink(), "is missing"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(folder, tmp_path, break_it, sentence):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    break_it(broken)
    with pytest.raises(UserError, match=sentence):
        load_model(broken)


@pytest.mark.parametrize(
    ("noise", "sentence"),
    [(np.zeros((4, 3, 4, 8)), "The noise is 3 x 4 x 8 x 4"), (np.zeros((4, 3)), "has 2 axes")],
)
def test_noise_of_another_shape_is_refused(folder, noise, sentence):
    with pytest.raises(UserError, match=sentence):
        sora_jax.load(folder).generate(SETTINGS["prompt"], noise=noise, **ASKED)


@pytest.mark.parametrize("fields", [{"dtype": "int4"}, {"weights": "int4"}, {"reference": "comfyui"}])
def test_unknown_ways_to_load_are_refused(folder, fields):
    with pytest.raises(UserError, match="choose one of"):
        sora_jax.load(folder, **fields)


@pytest.mark.parametrize(
    ("fields", "ways"),
    [
        (
            {},
            "--weights bfloat16, which halves it, --weights int8, which quarters it, --offload, which reads",
        ),
        ({"dtype": "bfloat16"}, "--weights int8, which halves it, --offload, which reads a layer when it is"),
        ({"weights": "int8"}, "--offload, which reads a layer when it is needed, or a machine with more"),
        ({"weights": "int8", "offload": True}, r"a machine with more\."),
    ],
)
def test_too_little_memory_is_said_before_anything_is_read(folder, monkeypatch, fields, ways):
    monkeypatch.setattr(pretrained, "free_memory", lambda: 1e4)
    with pytest.raises(UserError, match=rf"takes 0\.0 GiB and 0\.0 GiB are free here: use {ways}"):
        load_model(folder, **fields)


@pytest.mark.parametrize("fields", [{"weights": "int8"}, {"offload": True}])
def test_what_only_open_models_have_is_refused_for_others(fields):
    with pytest.raises(UserError, match="is for diffusers pipelines, and toyworld is none"):
        sora_jax.load("toyworld", **fields)


def test_training_on_it_is_refused_in_a_sentence(folder):
    with pytest.raises(UserError, match="is a diffusers pipeline"):
        load_bundle(folder)


def test_a_folder_is_found_by_its_index(folder):
    assert find(folder) == folder
    with pytest.raises(UserError, match="did you mean .*tiny-wan"):
        find(folder.parent / "tiny-wam")


def test_a_few_step_model_has_its_own_sigmas_and_draws_new_noise(folder, tmp_path):
    """FastWan's folders: Wan's files under another pipeline's name."""
    few = shutil.copytree(folder, tmp_path / "few")
    index = json.loads((few / "model_index.json").read_text())
    (few / "model_index.json").write_text(json.dumps(index | {"_class_name": "WanDMDPipeline"}))
    pipeline = sora_jax.load(few)
    own = pipeline.sampling
    assert (own.steps, own.guidance, own.solver) == (3, 1.0, "sde")
    np.testing.assert_allclose(pipeline.bundle.schedule(3, 100), [1.0, 0.757, 0.522, 0.0])
    # Of another number of steps: as those three were made, a shift of 8.
    np.testing.assert_allclose(
        pipeline.bundle.schedule(2, 100), [1.0, 8 * 0.5 / (1 + 7 * 0.5), 0.0], rtol=1e-6
    )
    assert not pipeline.dit.config.whole_timesteps
    videos = [pipeline.generate("a ball", seed=seed, **SHAPE).frames for seed in (1, 1, 2)]
    np.testing.assert_array_equal(videos[0], videos[1])
    assert (videos[0] != videos[2]).any()


def test_a_stochastic_scheduler_is_followed(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "stochastic")
    settings = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "stochastic_sampling": True}
    (other / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    assert read_sampling(other).solver == "sde"


def test_a_prompt_is_encoded_once(folder, tmp_path, monkeypatch):
    """Its states are kept on disk, by the encoder's content: another pipeline of it reads no weights for them."""
    monkeypatch.setenv("SORA_JAX_TEXT_STATES", str(tmp_path / "states"))
    first = sora_jax.load(folder).text_encoder.encode(["a ball"])
    assert len(list((tmp_path / "states").rglob("*.npy"))) == 1
    monkeypatch.setattr("sora_jax.models.t5.T5Encoder.encode", lambda *_: pytest.fail("encoded again"))
    np.testing.assert_array_equal(sora_jax.load(folder).text_encoder.encode(["a ball"])[0], first[0])
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SORA_JAX_TEXT_STATES", str(tmp_path / "file" / "states"))  # which can't be made
    np.testing.assert_allclose(sora_jax.load(folder).text_encoder.encode(["a ball"])[0], first[0], atol=1e-6)
