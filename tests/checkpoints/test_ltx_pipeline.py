"""Folders of LTX-Video: what they make is what diffusers makes of them, on the canvas of all other models."""

import dataclasses

import numpy as np
import pytest
from helpers.diffusers_folder import golden, write_folder
from helpers.parity import relative_error

import sora_jax

TEXT, GIVEN = golden("ltx_pipeline_text"), golden("ltx_pipeline_given")
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


def psnr(frames: np.ndarray, expected: np.ndarray) -> float:
    """Of uint8 frames against floats of 0 to 1."""
    return float(-10 * np.log10(np.square(frames / 255.0 - expected).mean()))


def test_a_pipeline_makes_what_diffusers_makes(pipeline):
    """Same noise, four steps of the shifted and stretched schedule, guidance; then the rest of the way to frames."""
    job = pipeline.request_job(SETTINGS["prompt"], TEXT["noise"][0], **ASKED)
    assert job.sketch.fps == SETTINGS["frame_rate"]
    (latents,) = pipeline.sample_latents([job])
    assert relative_error(latents, TEXT["latents"][0]) < 1e-3
    video = pipeline.decode_job(job, latents).whole()
    assert video.frames.shape == TEXT["frames"][0].shape
    assert psnr(video.frames, TEXT["frames"][0]) > 50


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
