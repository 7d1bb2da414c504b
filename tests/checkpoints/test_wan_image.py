"""Wan's image-to-video folders: what they make of a picture is what diffusers makes; what they can't do is said."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner
from helpers.diffusers_folder import golden, write_folder
from helpers.parity import psnr, relative_error

import sora_jax
from sora_jax.checkpoints.pretrained import pretrained_summary, read_sampling, read_shapes
from sora_jax.cli.main import cli
from sora_jax.diffusion.solvers import solver_step
from sora_jax.errors import UserError
from sora_jax.planner.counts import host_needs
from sora_jax.planner.published import published_config

PAIR = golden("wan_image_pair")
ASKED = {"frames": 5, "size": (32, 48), "steps": 4, "fps": 16.0}
PICTURE = PAIR["picture"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("models") / "tiny-i2v", PAIR)


@pytest.fixture(scope="module")
def pipeline(folder):
    return sora_jax.load(folder)


def job_of(pipeline, kept, **fields):
    settings = kept["settings"]
    own = {"guidance": settings["guidance_scale"], "negative": settings["negative_prompt"]}
    job = pipeline.job("animate", kept["picture"], settings["prompt"], **ASKED | own | fields)
    return dataclasses.replace(job, noise=np.moveaxis(kept["noise"][0], 0, -1))


@pytest.fixture(scope="module")
def sampled(pipeline):
    """The golden file's job, with a guidance scale for each of the two transformers, and its latents."""
    job = job_of(pipeline, PAIR, low_noise_guidance=PAIR["settings"]["guidance_scale_2"])
    return job, pipeline.sample_latents([job])[0]


def test_a_picture_is_animated_as_diffusers_does(pipeline, sampled):
    job, latents = sampled
    assert relative_error(latents, PAIR["latents"][0]) < 1e-3
    frames = pipeline.decode_job(job, latents).whole().frames
    assert frames.shape == (5, 32, 48, 3)
    assert psnr(frames, PAIR["frames"][0] / 255.0) > 50


def test_packed_it_is_what_it_is_alone_in_one_compiled_step(pipeline, sampled):
    """Beside another shape, picture and guidance; a last picture may be given too, and guidance be one for both."""
    job, latents = sampled
    before = solver_step._cache_size()
    pictures = {"first": PICTURE[:, :32], "last": 255 - PICTURE[:, 16:]}
    other = pipeline.job("animate", pictures, "a", **ASKED | {"frames": 9, "size": (32, 32), "seed": 1})
    (alone,) = pipeline.sample_latents([other])
    together = pipeline.sample_latents([job, other])
    for got, wanted in zip(together, (latents, alone), strict=True):
        assert relative_error(got, wanted) < 1e-5
    assert solver_step._cache_size() == before
    one = dataclasses.replace(job.settings, low_noise_guidance=None)
    (same,) = pipeline.sample_latents([dataclasses.replace(job, settings=one)])
    assert relative_error(same, latents) > 1e-2


def test_the_mask_has_a_channel_for_each_video_frame(pipeline):
    sketch = pipeline.job("animate", {0: PICTURE, "last": PICTURE}, **ASKED | {"frames": 9}).sketch
    canvas = pipeline.prepare_latents(sketch)
    mask = canvas.extra_channels[:, 0, 0, :4]
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]])
    assert (canvas.init_sigma == 1).all() and canvas.extra_channels.shape == (3, 4, 6, 8)
    # The picture alone is encoded as ever.
    whole = dataclasses.replace(sketch, strength=np.zeros_like(sketch.strength))
    assert pipeline.prepare_latents(whole).extra_channels is None


@pytest.mark.parametrize(
    ("load", "least", "most"), [({"weights": "int8"}, 1e-4, 0.2), ({"offload": True}, 0, 1e-5)], ids=str
)
def test_int8_and_offloaded_weights_are_nearly_the_same(folder, sampled, load, least, most):
    job, latents = sampled
    assert least <= relative_error(sora_jax.load(folder, **load).sample_latents([job])[0], latents) < most


def test_a_lora_is_merged_into_it(folder, sampled, tmp_path):
    (tmp_path / "lora.safetensors").write_bytes(golden("wan_lora")["lora"].tobytes())
    job, latents = sampled
    (changed,) = sora_jax.load(folder, lora=tmp_path / "lora.safetensors").sample_latents([job])
    assert relative_error(changed, latents) > 0.01


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda p: p.generate("a", **ASKED), "makes a video from a picture, its first frame .* use animate"),
        (lambda p: p.image("a", size=(32, 48)), "makes a video from a picture"),
        (lambda p: p.animate(PICTURE, "a", at=0.1, **ASKED), "makes a video from a picture"),
        (
            lambda p: p.edit(np.stack([PICTURE] * 5), "a", size=(32, 48), fps=16),
            "makes a video from a picture",
        ),
        (lambda p: p.animate(PICTURE, "a", **ASKED | {"frames": 82}), "up to 81 frames of 48x32 from a pict"),
        (lambda p: p.animate(PICTURE, "a", conditioning_guidance=2.0, **ASKED), "conditioning_guidance is 1"),
    ],
)
def test_what_it_was_not_made_for_is_refused(pipeline, ask, sentence):
    with pytest.raises(UserError, match=sentence):
        ask(pipeline)


def test_the_command_line_animates(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PIL.Image.fromarray(PICTURE).save("picture.png")
    words = [
        "animate",
        "picture.png",
        "a red circle",
        "--model",
        str(folder),
        "--frames",
        "5",
        "--size",
        "48x32",
    ]
    words += ["--steps", "4", "--guidance", "5", "--low-noise-guidance", "2", "-q", "-o", "out.mp4"]
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "48×32, 5 frames at 16 fps" in result.output


def test_the_originals_guidance_is_taken_by_default_unless_another_is_asked_for(folder):
    assert pretrained_summary(folder) == "Wan2.2-I2V-A14B, Apache-2.0; 2 layers of 48"
    assert read_sampling(folder, "original").low_noise_guidance == 3.5
    pipeline = sora_jax.load(folder, reference="original", lazy=True)
    assert pipeline.request_defaults({})["low_noise_guidance"] == 3.5
    assert "low_noise_guidance" not in pipeline.request_defaults({"guidance": 6.0})


def test_it_is_planned_from_its_settings(folder, pipeline):
    found = host_needs(published_config(folder, (32, 48), 5, "float32"))
    assert found.weights["transformer"] == sum(leaf.nbytes for leaf in jax.tree.leaves(pipeline.dit))
    assert found.clip.tokens == 2 * 2 * 3


def test_what_is_no_picture_in_its_channels_is_refused(folder, tmp_path):
    for change, sentence in (
        (
            {"in_channels": 8},
            "takes 4 channels beside the latent's, and a picture is given to models of Wan as 8",
        ),
        ({"in_channels": 3}, "takes 3 channels and gives 4"),
    ):
        other = tmp_path / f"{change}"
        shutil.copytree(folder, other, ignore=shutil.ignore_patterns("*.safetensors"))
        path = other / "transformer" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(UserError, match=sentence):
            read_shapes(other)


def test_ti2v_comes_under_this_name_too(tmp_path):
    given = golden("wan_pipeline_given")
    given["files"]["model_index.json"]["_class_name"] = "WanImageToVideoPipeline"
    bundle = read_shapes(write_folder(tmp_path / "ti2v", given))
    assert bundle.card["summary"].startswith("Wan2.2-TI2V") and not bundle.dit.config.extra_channels


def test_a_second_guidance_needs_a_second_transformer(tmp_path):
    single = sora_jax.load(write_folder(tmp_path / "single", golden("wan_pipeline_unipc")))
    with pytest.raises(UserError, match="has one transformer, so there is no low_noise_guidance"):
        single.generate("a", frames=1, size=(32, 32), low_noise_guidance=2.0)
