"""Slow motion: a clip's own frames stay, at their rate, with generated ones between."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.tiny_model import tiny_bundle

from sora_jax.errors import UserError
from sora_jax.media.video import Video
from sora_jax.pipeline.pipeline import Pipeline

CLIP = Video(np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8), 8.0)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(tiny_bundle())


@pytest.mark.parametrize("factor", [2, 3])
def test_own_frames_stay_and_those_between_are_generated(pipeline, factor):
    video = pipeline.slow(CLIP, factor, "a ring", steps=2)
    assert video.fps == CLIP.fps and len(video) == 1 + 4 * factor
    # Each own frame is coded alone, as that of a picture.
    for own, made in zip(CLIP.frames, video.frames[::factor], strict=True):
        picture = pipeline.reconstruct(Video(own[None], 8.0)).frames[0]
        assert np.abs(picture.astype(int) - made).max() <= 1
    other = pipeline.slow(CLIP, factor, "a ring", steps=2, seed=1)
    differs = (other.frames != video.frames).any((1, 2, 3))
    np.testing.assert_array_equal(differs, np.arange(len(video)) % factor > 0)


def test_a_duration_is_the_results(pipeline):
    assert len(pipeline.job("slow", CLIP, 2, duration=0.5).sketch.frames) == 3  # of two frames of the clip
    assert len(pipeline.job("slow", CLIP, 2, frames=6).sketch.frames) == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((CLIP, 1), "factor=1"), ((CLIP, 2.5), "factor=2.5"), ((CLIP.frames[:1], 2), "nothing between")],
    ids=str,
)
def test_what_can_not_be_slowed_is_refused(pipeline, arguments, words):
    with pytest.raises(UserError, match=words):
        pipeline.slow(*arguments)
