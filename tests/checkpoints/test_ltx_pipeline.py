"""Folders of LTX-Video: what they make is what diffusers makes of them, on the canvas of all other models."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.diffusers_folder import golden, write_folder
from helpers.parity import psnr, relative_error
from safetensors.numpy import save_file

import sora_jax
from sora_jax.checkpoints.finetuned import read_sampling
from sora_jax.checkpoints.pretrained import load_model
from sora_jax.cli.main import cli
from sora_jax.diffusion import ltx_schedule
from sora_jax.diffusion.solvers import solver_step
from sora_jax.errors import UserError
from sora_jax.pipeline.pipeline import Pipeline, list_models
from sora_jax.tokens.canvas import Sketch

TEXT, GIVEN = golden("ltx_pipeline_text"), golden("ltx_pipeline_given")
CONDITION = golden("ltx_pipeline_condition")
SETTINGS = TEXT["settings"]
ASKED = {
    "frames": SETTINGS["num_frames"],
    "size": (SETTINGS["height"], SETTINGS["width"]),
    "steps": SETTINGS["num_inference_steps"],
    "guidance": SETTINGS["guidance_scale"],
    "negative": SETTINGS["negative_prompt"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("models") / "tiny-ltx", TEXT)


@pytest.fixture(scope="module")
def pipeline(folder):
    return sora_jax.load(folder)


def test_a_pipeline_makes_what_diffusers_makes(pipeline):
    """Same noise, four steps of the shifted and stretched schedule, guidance; then the rest of the way to frames."""
    job = pipeline.request_job(SETTINGS["prompt"], TEXT["noise"][0], **ASKED)
    assert job.sketch.fps == SETTINGS["frame_rate"]
    (latents,) = pipeline.sample_latents([job])
    assert relative_error(latents, TEXT["latents"][0]) < 1e-3
    video = pipeline.decode_job(job, latents).whole()
    assert video.frames.shape == TEXT["frames"][0].shape
    assert psnr(video.frames, TEXT["frames"][0]) > 50


def test_int8_weights_and_offloaded_blocks_are_for_it_too(folder, pipeline):
    job = pipeline.request_job(SETTINGS["prompt"], TEXT["noise"][0], **ASKED)
    (latents,) = sora_jax.load(folder, weights="int8", offload=True).sample_latents([job])
    assert 1e-4 < relative_error(latents, TEXT["latents"][0]) < 0.1


def test_a_picture_is_animated_as_diffusers_does(tmp_path):
    """Its latent frame is a conditioning one of the canvas; the decoder of this autoencoder takes a timestep."""
    pipeline = sora_jax.load(write_folder(tmp_path / "given", GIVEN))
    job = pipeline.job(
        "animate", GIVEN["picture"], SETTINGS["prompt"], **ASKED | {"fps": 25.0, "duration": None}
    )
    job = dataclasses.replace(job, noise=np.moveaxis(GIVEN["noise"][0], 0, -1))
    (latents,) = pipeline.sample_latents([job])
    assert relative_error(latents, GIVEN["latents"][0]) < 1e-3
    assert psnr(pipeline.decode_job(job, latents).whole().frames, GIVEN["frames"][0]) > 50


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    """A folder of LTXConditionPipeline."""
    return sora_jax.load(write_folder(tmp_path_factory.mktemp("models") / "tiny-condition", CONDITION))


def random_frames(first: int, count: int) -> np.ndarray:
    """As `tools/parity/ltx_pipeline.py` draws them."""
    shape = (count, SETTINGS["height"], SETTINGS["width"], 3)
    return np.random.default_rng(first).integers(0, 256, shape, np.uint8)


def given_clips(frames: int = 33) -> Sketch:
    """A video with what was given to diffusers: a picture, a keyframe, and a clip of 17 frames at the end."""
    shape = (frames, SETTINGS["height"], SETTINGS["width"])
    sketch = Sketch(np.zeros((*shape, 3), np.uint8), np.ones(shape, np.float32), 25.0)
    for first, count in CONDITION["given"]:
        sketch.frames[first : first + count] = random_frames(first, count)
        sketch.strength[first : first + count] = 0
    return sketch


def test_keyframes_and_clips_are_given_as_diffusers_gives_them(conditional):
    """Beside the clip, at their own times, but for the clip's begin and a given clip's later frames."""
    job = conditional.request_job(SETTINGS["prompt"], CONDITION["noise"][0], **ASKED | {"frames": 33})
    job = dataclasses.replace(job, sketch=given_clips())
    canvas = conditional.prepare_latents(job.sketch)
    assert canvas.conditioning_frames.tolist() == [True, False, False, False, True]
    assert canvas.beside.ends.tolist() == [8, 16, 24]
    (latents,) = conditional.sample_latents([job])
    assert relative_error(latents, CONDITION["latents"][0]) < 1e-3
    assert psnr(conditional.decode_job(job, latents).whole().frames[::16], CONDITION["frames"][0]) > 50


def test_sigmas_are_walked_as_they_are_given(conditional, tmp_path, monkeypatch):
    """As diffusers walks timesteps; by the command line, where they take the place of steps."""
    monkeypatch.chdir(tmp_path)
    np.save("noise.npy", CONDITION["noise"][0])
    words = [
        "generate",
        SETTINGS["prompt"],
        "--model",
        conditional.bundle.text.name,
        "--noise",
        "noise.npy",
        "-q",
    ]
    words += ["--latents-out", "latents.npy", "--frames", "33", "--size", "64x32", "--guidance", "1"]
    words += ["--sigmas", ",".join(map(str, CONDITION["sigmas"]))]
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert relative_error(np.load("latents.npy"), CONDITION["listed"][0]) < 1e-3


def test_what_a_conditional_model_brings(conditional):
    """Longer captions with masked padding, and its own schedule, from whose sigmas an edit takes the later ones."""
    bundle = conditional.bundle
    assert (bundle.text.max_tokens, bundle.text.attend_padding) == (256, False)
    assert bundle.card["summary"].startswith("LTX-Video: 2 layers")
    schedule = ltx_schedule.linear_quadratic(8)
    np.testing.assert_allclose(bundle.schedule(8, 7392), schedule, atol=1e-7)
    later = [0.5, *schedule[schedule < 0.5]]
    np.testing.assert_allclose(bundle.schedule(8, 7392, 0.5), later, atol=1e-7)


def test_windows_of_a_longer_video_see_the_keyframes_in_their_time(conditional):
    """Nine latent frames in windows of three, each with what is given beside it and the noise of a whole."""
    model = Pipeline(
        dataclasses.replace(
            conditional.bundle, limits=dataclasses.replace(conditional.bundle.limits, latent_frames=3)
        )
    )
    job = model.request_job("a", **ASKED | {"frames": 65, "steps": 1})
    job = dataclasses.replace(job, sketch=given_clips(65))
    canvas = model.prepare_latents(job.sketch)
    shown = [canvas.part(slice(i, i + 3)).with_beside().ends[3:].tolist() for i in range(5)]
    assert shown == [[8, 16], [8, 16, 24], [16, 24], [24], []]
    (latents,) = model.sample_latents([job])
    assert latents.shape[1] == 9 and np.isfinite(latents).all()


def test_the_command_line_takes_it_too(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("noise.npy", TEXT["noise"][0])
    words = ["generate", SETTINGS["prompt"], "--model", str(folder), "--noise", "noise.npy", "-q"]
    words += ["--latents-out", "latents.npy", "--frames", "17", "--size", "64x32", "--steps", "4"]
    words += ["--negative", SETTINGS["negative_prompt"]]
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "out.mp4  64×32, 17 frames at 25 fps" in result.output
    assert relative_error(np.load("latents.npy"), TEXT["latents"][0]) < 1e-3


def clip(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 32, 64, 3), np.uint8)


@pytest.mark.parametrize("kind", ["pipeline", "conditional"])
def test_abilities_share_one_compiled_step_and_keep_what_is_given(request, kind):
    """Latent frames of eight video frames, on the same canvas: given frames are the autoencoder's reconstruction."""
    pipeline, beside = request.getfixturevalue(kind), []
    given = {"steps": 2, "fps": 25.0}
    jobs = [
        pipeline.job("extend", clip(12), 0.4, "a", **given),
        pipeline.job("extend", clip(9), 0.4, "a", backward=True, **given),
        pipeline.job("fill", clip(19), [(0.2, 0.6)], "a", **given),
        pipeline.job("connect", clip(9), clip(9, 1), 0.5, "a", guidance=3.0, **given),
        pipeline.job("loop", clip(17), "a", 0.4, guidance=3.0, **given),
        pipeline.job("edit", clip(9), "a", strength=0.6, **given),
        pipeline.job("animate", {0.0: clip(1)[0], "last": clip(1, 1)[0]}, "a", duration=0.6, **given),
    ]
    solver_step.clear_cache()
    latents = pipeline.sample_latents(jobs)
    assert solver_step._cache_size() == 1
    for job, latent in zip(jobs, latents, strict=True):
        canvas = pipeline.prepare_latents(job.sketch)
        assert canvas.stride == 8
        beside.append(canvas.beside is not None)
        known = canvas.conditioning_frames
        np.testing.assert_array_equal(np.moveaxis(latent, 0, -1)[known], canvas.latent[known])
        assert np.isfinite(latent).all() and np.abs(latent).max() < 100
    assert beside == ([False] * 7 if kind == "pipeline" else [True] * 5 + [False, True])
    # A transition is one frame short of whole latent frames, of which none shows both kinds.
    for job in jobs[3:5]:
        assert (job.sketch.strength > 0).all((1, 2)).sum() % 8 == 7


def test_what_a_model_brings(folder):
    sampling = read_sampling(folder)
    assert (sampling.steps, sampling.guidance, sampling.solver, sampling.negative) == (50, 3.0, "euler", "")
    np.testing.assert_allclose(load_model(folder).schedule(4, 6), TEXT["sigmas"], atol=1e-6)
    fields = sora_jax.load(folder, lazy=True).request_defaults({})
    assert (fields["resolution"], fields["aspect"], fields["fps"], fields["duration"]) == (
        512,
        "704:512",
        25,
        6.44,
    )
    (entry,) = [entry for entry in list_models([folder.parent]) if entry.name == str(folder)]
    assert (
        entry.summary == "LTX-Video, OpenRAIL-M from 0.9.5 on, before it a licence of its own; 2 layers of 32"
    )


def test_the_original_masks_captions_and_decodes_with_noise(folder):
    ours, original = load_model(folder), load_model(folder, reference="original")
    assert (ours.text.attend_padding, original.text.attend_padding) == (True, False)
    assert (ours.text.max_tokens, original.text.clean) == (128, "lower")
    assert (ours.vae.config.decode_timestep, ours.vae.config.decode_noise) == (0, 0)
    assert (original.vae.config.decode_timestep, original.vae.config.decode_noise) == (0.05, 0.025)
    assert original.sampling.negative.startswith("worst quality")
    assert ours.dit.config.cell == ours.vae.config.compression == (8, 32, 32)


def test_a_scheduler_that_does_not_look_at_tokens_is_followed(folder, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    change(own, "scheduler/scheduler_config.json", use_dynamic_shifting=False, shift=3.0, shift_terminal=None)
    bundle = load_model(own)
    for tokens in (6, 5000):
        np.testing.assert_allclose(bundle.schedule(4, tokens), [1, 0.9, 0.75, 0.5, 0], atol=1e-6)


def test_a_lora_is_merged(folder, tmp_path):
    module = "transformer.transformer_blocks.1.attn2.to_out.0"
    parts = {"lora_A": np.ones((2, 32), np.float32), "lora_B": np.ones((32, 2), np.float32)}
    save_file(
        {f"{module}.{part}.weight": value for part, value in parts.items()}, tmp_path / "own.safetensors"
    )
    plain = load_model(folder).dit.blocks.cross.out.kernel
    merged = load_model(folder, loras=[(str(tmp_path / "own.safetensors"), 0.5)]).dit.blocks.cross.out.kernel
    np.testing.assert_allclose(merged - plain, [np.zeros((32, 32)), np.ones((32, 32))], atol=1e-6)


def change(folder, part, **values):
    path = folder / part
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


SCHEDULER = "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (
            lambda f: change(f, "model_index.json", _class_name="LTX2Pipeline"),
            r"of a LTX2Pipeline: .* WanPipeline \(.*\) and LTXPipeline \(LTX-Video 0.9\) and .* can be loaded",
        ),
        (lambda f: change(f, SCHEDULER, _class_name="DDIMScheduler"), "is a DDIMScheduler: of LTX-Video's"),
        (
            lambda f: change(f, SCHEDULER, use_karras_sigmas=True),
            "use_karras_sigmas=True, which can't be followed",
        ),
        (
            lambda f: change(f, SCHEDULER, time_shift_type="linear"),
            "time_shift_type='linear'.*to 'exponential'",
        ),
        (lambda f: change(f, "text_encoder/config.json", d_model=32), "32 wide and the transformer takes 16"),
        (
            lambda f: change(f, "transformer/config.json", in_channels=4, out_channels=4),
            "have 8 channels.*takes 4",
        ),
        (lambda f: change(f, "transformer/config.json", num_layers=3), "transformer_blocks.2.*missing"),
        (
            lambda f: change(f, "vae/config.json", decoder_layers_per_block=[2, 1, 1, 1, 1]),
            r"missing: decoder\.up_blocks\.3\.resnets\.1\.",
        ),
        (lambda f: shutil.rmtree(f / "tokenizer"), "has no tokenizer"),
        (
            lambda f: change(f, "model_index.json", _class_name="LTXConditionPipeline"),
            "shifts the sigmas that LTXConditionPipeline gives it",
        ),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(folder, tmp_path, break_it, sentence):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    break_it(broken)
    with pytest.raises(UserError, match=sentence):
        load_model(broken)
