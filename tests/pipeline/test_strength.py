"""`strength` is a share of the sampler's steps, however a canvas is cut: by size, aspect ratio, duration, patch."""

from __future__ import annotations

import dataclasses
import functools
import math
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_model import tiny_bundle

from sora_jax.checkpoints.components import Bundle, Limits
from sora_jax.diffusion import flow
from sora_jax.pipeline import denoise, vae_processor
from sora_jax.pipeline.job import Job
from sora_jax.pipeline.settings import Settings
from sora_jax.pipeline.vae_processor import VaeProcessor
from sora_jax.tokens.canvas import Sketch
from sora_jax.tokens.spans import FRAMES_PER_LATENT

LIMITS = Limits(tokens=96, latent_frames=6, frame_tokens=24, text=12, text_len=24)
BASE_TOKENS = 4.0  # few, so that every segment here is shifted


@functools.cache
def bundle_of(patch: tuple[int, int, int]) -> Bundle:
    return dataclasses.replace(tiny_bundle(LIMITS, patch=patch), base_tokens=BASE_TOKENS)


def first_requests(
    bundle: Bundle, sketch: Sketch, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> list[SimpleNamespace]:
    """What is asked of the sampler first for a sketch; nothing is encoded, and no step is taken."""
    taken: list[SimpleNamespace] = []

    class ContinuousBatcher(denoise.ContinuousBatcher):
        def add(self, segment, noise, sigmas, guidance, negative=None) -> int:
            taken.append(SimpleNamespace(segment=segment, sigmas=sigmas, guidance=guidance))
            return super().add(segment, noise, sigmas, guidance, negative)

        def step(self) -> dict[int, np.ndarray]:
            raise StopAsyncIteration

    def encode_stream(vae: Any, frames: np.ndarray, tiles: Any) -> list[np.ndarray]:
        _, *sides = vae.config.compression
        high, wide = (side // by for side, by in zip(frames.shape[1:3], sides, strict=True))
        return [
            np.zeros(
                (1 + (len(frames) - 1) // FRAMES_PER_LATENT, high, wide, vae.config.channels), np.float32
            )
        ]

    monkeypatch.setattr(denoise, "ContinuousBatcher", ContinuousBatcher)
    monkeypatch.setattr(vae_processor, "encode_stream", encode_stream)
    model = VaeProcessor(bundle)
    job = Job(sketch, (), Settings(**{"steps": 4, "guidance": 1.0} | settings))
    with pytest.raises(StopAsyncIteration):
        denoise.denoise(model, [job], [model.prepare_latents(sketch)])
    return taken


def share_of_the_way(request: SimpleNamespace) -> float:
    factor = flow.shift_factor(jnp.array(len(request.segment.patches)), BASE_TOKENS)
    return float(flow.unshift(jnp.array(request.sigmas[0]), factor))


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 2), (1, 1, 2)])
@pytest.mark.parametrize(
    ("frames", "height", "width", "cut"),
    [
        (9, 32, 32, False),
        (9, 64, 64, False),
        (9, 96, 96, True),  # its tokens would fit a row, but not training's frames
        (9, 176, 176, True),  # more than a row
        (9, 64, 400, True),
        (9, 400, 48, True),
        (41, 32, 32, False),  # several windows in time
        (41, 176, 176, True),
        (1, 176, 176, True),
    ],
)
def test_a_strength_is_that_share_of_the_way_of_the_segments_that_are_sampled(
    frames, height, width, cut, patch, monkeypatch
):
    bundle = bundle_of(patch)
    strength = np.full((frames, height, width), np.float32(0.3))
    sketch = Sketch(np.zeros((frames, height, width, 3), np.uint8), strength, 8.0)
    requests = first_requests(bundle, sketch, monkeypatch)
    cells = VaeProcessor(bundle).cells(height, width)
    assert (len(requests) > 1) == (math.prod(cells) // math.prod(patch[1:]) > LIMITS.frame_tokens)
    if patch == (1, 2, 2):
        assert (len(requests) > 1) == cut
    for request in requests:
        assert len(request.segment.patches) > BASE_TOKENS
        assert share_of_the_way(request) == pytest.approx(0.3, abs=1e-4)


def test_what_is_partly_painted_from_nothing_is_seen_whole_and_means_the_same(monkeypatch):
    """40 tokens a frame: two frames fit a row of 96, and none is cut, as its parts would not know of one another."""
    bundle = bundle_of((1, 2, 2))
    strength = np.full((9, 80, 128), np.float32(0.6))
    strength[:, :16, :16] = 1
    strength[:, 16:32, :16] = 0
    sketch = Sketch(np.zeros((9, 80, 128, 3), np.uint8), strength, 8.0)
    [request] = first_requests(bundle, sketch, monkeypatch)
    factor = flow.shift_factor(jnp.array(len(request.segment.patches)), BASE_TOKENS)
    shares = np.asarray(flow.unshift(jnp.asarray(np.unique(request.segment.init_sigma)), factor))
    np.testing.assert_allclose(shares, [0, 0.6, 1], atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "leaves_out"),
    [
        ({"guidance_method": "zero", "guidance": 3.0, "negative": "a ring"}, True),
        ({"guidance_method": "zero", "guidance": 3.0}, False),  # there are no words to be guided by
        ({"guidance_method": "zero", "guidance": 1.0, "conditioning_guidance": 2.0}, True),
        ({"guidance_method": "zero", "guidance": 1.0}, False),
        ({"guidance_method": "zero", "guidance": 3.0, "guidance_interval": (0.0, 0.9)}, False),
        ({"guidance": 3.0}, False),
    ],
)
def test_zero_init_belongs_to_cfg_zero_star_where_it_guides_near_noise(settings, leaves_out, monkeypatch):
    bundle = bundle_of((1, 2, 2))
    noise = Sketch(np.zeros((9, 64, 64, 3), np.uint8), np.ones((9, 64, 64), np.float32), 8.0)
    [request] = first_requests(bundle, noise, monkeypatch, **settings)
    held = request.sigmas[:-1] > request.guidance.zero_init_sigma
    assert held.tolist() == [leaves_out, False, False, False]
