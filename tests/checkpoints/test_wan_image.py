"""Wan's image-to-video folders: what they make of a picture is what diffusers makes; what they can't do is said."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy
from click.testing import CliRunner
from helpers.diffusers_folder import golden, write_folder
from helpers.parity import psnr, relative_error
from helpers.tiny_finetune import tiny_config

import sora_jax
from sora_jax.checkpoints.lora import merge_loras
from sora_jax.checkpoints.pretrained import pretrained_summary, read_sampling, read_shapes
from sora_jax.cli.main import cli
from sora_jax.diffusion.solvers import solver_step
from sora_jax.distributed.chips import read_topology
from sora_jax.errors import UserError
from sora_jax.models.wan_weights import PUBLISHED_WAN, diffusers_names, wan_config
from sora_jax.planner.counts import estimate_counts, host_needs
from sora_jax.planner.programs import make_step_spec
from sora_jax.planner.published import published_config
from sora_jax.train.objectives import make_objective

PAIR, CLIP, ENDS = (golden(f"wan_image_{name}") for name in ("pair", "clip", "ends"))
ASKED = {"frames": 5, "size": (32, 48), "steps": 4, "fps": 16.0}
PICTURE = PAIR["picture"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("models") / "tiny-i2v", PAIR)


@pytest.fixture(scope="module")
def pipeline(folder):
    return sora_jax.load(folder)


def job_of(pipeline, kept, last=False, **fields):
    settings = kept["settings"]
    pictures = {"first": kept["picture"]} | ({"last": kept["last_picture"]} if last else {})
    own = {"guidance": settings["guidance_scale"], "negative": settings["negative_prompt"]}
    job = pipeline.job("animate", pictures, settings["prompt"], **ASKED | own | fields)
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


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """Wan2.1-I2V's kind: an image encoder's states are attended to."""
    return write_folder(tmp_path_factory.mktemp("models") / "tiny-i2v-2.1", CLIP)


def test_a_picture_is_seen_by_an_image_encoder_too(seeing):
    pipeline = sora_jax.load(seeing)
    assert pretrained_summary(seeing) == "Wan2.1-I2V, Apache-2.0; 2 layers of 48"
    job = job_of(pipeline, CLIP)
    (latents,) = pipeline.sample_latents([job])
    assert relative_error(latents, CLIP["latents"][0]) < 1e-3
    assert psnr(pipeline.decode_job(job, latents).whole().frames, CLIP["frames"][0] / 255.0) > 50
    before = solver_step._cache_size()
    other = pipeline.job("animate", PICTURE[:, 16:], "a", **ASKED | {"frames": 9, "size": (32, 32)})
    (alone,) = pipeline.sample_latents([other])
    for got, wanted in zip(pipeline.sample_latents([other, job]), (alone, latents), strict=True):
        assert relative_error(got, wanted) < 1e-5
    assert solver_step._cache_size() == before
    with pytest.raises(UserError, match="from its first frame alone, not from 2"):
        pipeline.sample_latents([job_of(pipeline, CLIP, last=True)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("load", "least", "most"), [({"weights": "int8"}, 1e-4, 0.3), ({"offload": True}, 0, 1e-3)], ids=str
)
def test_of_pictures_states_int8_and_offloaded_weights_are_nearly_the_same(seeing, load, least, most):
    pipeline = sora_jax.load(seeing, **load)
    (latents,) = pipeline.sample_latents([job_of(pipeline, CLIP)])
    assert least <= relative_error(latents, CLIP["latents"][0]) < most


@pytest.mark.slow
def test_a_first_and_a_last_picture_are_animated_as_diffusers_does(tmp_path):
    """Wan2.1-FLF2V's kind: the states of both have a position each."""
    pipeline = sora_jax.load(write_folder(tmp_path / "ends", ENDS))
    own = read_sampling(tmp_path / "ends", "original")
    assert (own.steps, own.shift) == (50, 16.0)
    (latents,) = pipeline.sample_latents([job_of(pipeline, ENDS, last=True)])
    assert relative_error(latents, ENDS["latents"][0]) < 1e-3
    with pytest.raises(UserError, match="from two pictures, its first frame and its last, not from 1"):
        pipeline.sample_latents([job_of(pipeline, ENDS)])


def test_an_image_encoder_of_another_model_is_refused(seeing, tmp_path):
    for part, change, sentence in (
        ("model_index.json", {"image_encoder": [None, None]}, "model_index.json has no image_encoder"),
        ("image_encoder/config.json", {"hidden_size": 32}, "gives 5 states of 32 numbers a picture"),
        ("transformer/config.json", {"pos_embed_seq_len": 9}, "they are of different models"),
    ):
        other = shutil.copytree(seeing, tmp_path / part.replace("/", "-"))
        path = other / part
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(UserError, match=sentence):
            read_shapes(other)


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


def test_words_alone_are_refused_before_weights_are_read(folder, tmp_path):
    settings = shutil.copytree(folder, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UserError, match="makes a video from a picture"):
        sora_jax.load(settings, lazy=True).generate("a", **ASKED)


def test_it_is_not_trained_on(folder, seeing, tmp_path):
    for model, sentence in (
        (folder, "has two transformers"),
        (seeing, "makes videos from a picture, and such"),
    ):
        run = tiny_config(tmp_path, 2, pretrained=str(model))
        with pytest.raises(UserError, match=sentence):
            assert make_objective(run, tmp_path / "objective").base


def test_a_lora_may_change_what_is_seen_of_pictures(tmp_path):
    """In the spelling of lightx2v and of Kohya."""
    config = wan_config(CLIP["config"]["transformer"])
    tensors = {name: np.zeros(shape, np.float32) for name, shape in PUBLISHED_WAN.shapes(config)}
    halves = {"lora_down": np.ones((1, 48), np.float32), "lora_up": np.ones((48, 1), np.float32)}
    for module in ("diffusion_model.blocks.1.cross_attn.k_img", "lora_unet_blocks_1_cross_attn_k_img"):
        lora = {f"{module}.{half}.weight": array for half, array in halves.items()}
        safetensors.numpy.save_file(lora, file := tmp_path / "lora.safetensors")
        merged = merge_loras(tensors, [(str(file), 1.0)], diffusers_names)
        assert [name for name in merged if merged[name].any()] == ["blocks.1.attn2.add_k_proj.weight"]


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


@pytest.mark.parametrize("kind", ["folder", "seeing"])
def test_it_is_planned_from_its_settings(kind, request):
    folder = request.getfixturevalue(kind)
    config = published_config(folder, (32, 48), 5, "float32")
    found, dit = host_needs(config), sora_jax.load(folder).dit
    assert found.weights["transformer"] == sum(leaf.nbytes for leaf in jax.tree.leaves(dit))
    assert found.clip.tokens == 2 * 2 * 3
    assert estimate_counts(make_step_spec(config, "sample", read_topology("v5e:1x1"))).products > 0


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
