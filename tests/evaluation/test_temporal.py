"""Motion, flicker, warping and consistency of clips whose truth is known."""

import numpy as np
import pytest
from helpers.drifting import drifting, texture

from sora_jax.errors import UserError
from sora_jax.evaluation import temporal
from sora_jax.evaluation.optical_flow import optical_flow


def moved(shift: tuple[float, float], side: int = 64) -> np.ndarray:
    """The texture read at a place: uint8[side,side,3]; what is at p in the first is at p + shift here."""
    whole = np.fft.fft2(texture(), axes=(0, 1))
    phase = np.fft.fftfreq(256)[:, None] * shift[0] + np.fft.fftfreq(256) * shift[1]
    frame = np.fft.ifft2(whole * np.exp(-2j * np.pi * phase)[..., None], axes=(0, 1)).real
    return np.clip(frame[64 : 64 + side, 64 : 64 + side], 0, 255).round().astype(np.uint8)


def test_flow_is_the_shift():
    shifts = [(0.0, 0.0), (0.5, 0.25), (2.3, -1.7), (-5.0, 3.0), (11.0, -9.0)]
    flow = optical_flow(np.stack([moved((0, 0))] * 5), np.stack([moved(shift) for shift in shifts]))
    assert flow.shape == (5, 64, 64, 2)
    np.testing.assert_allclose(np.median(flow[:, 12:-12, 12:-12], (1, 2)), shifts, atol=0.15, rtol=0.08)
    assert np.abs(flow[0]).max() == 0


def test_the_flow_of_a_pair_does_not_depend_on_the_others():
    clips = drifting(0, 1, 5, 32)[0]
    together = optical_flow(clips[:-1], clips[1:])
    assert (optical_flow(clips[2:3], clips[3:4])[0] == together[2]).all()


def test_flicker():
    still = np.full((3, 8, 8, 3), 100, np.uint8)
    assert temporal.temporal_flicker(still) == 1
    blinking = still.copy()
    blinking[1] += 51  # a fifth of the range, there and back
    assert temporal.temporal_flicker(blinking) == pytest.approx(0.8)
    with pytest.raises(UserError, match="at least 2 frames, and one has 1"):
        temporal.temporal_flicker(still[:1])


def error_of(clip: np.ndarray) -> float:
    return temporal.warping_error(clip, optical_flow(clip[:-1], clip[1:]), optical_flow(clip[1:], clip[:-1]))


def test_what_only_moves_has_a_small_error_of_warping():
    clip = np.stack([moved((2.0 * t, -1.0 * t)) for t in range(4)])
    plain = float((np.diff(clip / 255.0, axis=0) ** 2).mean())
    flickering = np.clip(clip * np.array([1, 0.8, 1, 0.8])[:, None, None, None], 0, 255).astype(np.uint8)
    assert error_of(clip) < 0.05 * plain
    assert error_of(flickering) > 5 * error_of(clip)
    assert error_of(clip[[0, 0, 0]]) == 0


def test_hidden_pixels_are_left_out_of_the_error_of_warping():
    clip = np.stack([moved((0, 0))] * 2)
    clip[1, 20:40, 20:40] = 255  # appears
    nothing = np.zeros((1, 64, 64, 2), np.float32)
    seen = temporal.warping_error(clip, nothing, nothing)
    there = nothing.copy()
    there[:, 18:42, 18:42] = 5  # flow back that disagrees with flow there
    assert temporal.warping_error(clip, nothing, there) == 0 < seen


def test_motion_is_in_short_sides_a_second():
    flow = np.zeros((3, 40, 80, 2), np.float32)
    flow[..., 0], flow[..., 1] = 3, 4
    assert temporal.motion_magnitude(flow, 8.0) == pytest.approx(1.0)  # 5 pixels of 40, 8 times a second


@pytest.mark.parametrize(
    ("fps", "pixels", "moving_pairs", "wanted"),
    [
        (8, 1.6, 4, True),
        (8, 1.4, 15, False),
        (8, 1.6, 3, False),
        (4, 2.9, 15, False),
        (4, 3.1, 4, True),
        (24, 1.6, 4, True),
    ],
)
def test_dynamic_degree_has_vbenchs_threshold(fps, pixels, moving_pairs, wanted):
    # 6 pixels of 256 are 1.5 of 64, and twice that at 4 a second; of 16 frames 4 pairs must reach it.
    flow = np.zeros((15, 64, 96, 2), np.float32)
    flow[:moving_pairs, :16, :32, 1] = pixels  # a twelfth of the pixels
    assert temporal.dynamic_degree(flow, fps) is wanted


def test_consistency_is_vbenchs():
    rows = np.random.default_rng(0).normal(1, 1, (5, 7))
    total, unit = 0.0, [row / np.linalg.norm(row) for row in rows]
    for t in range(1, 5):
        total += (max(0.0, unit[t - 1] @ unit[t]) + max(0.0, unit[0] @ unit[t])) / 2
    assert temporal.consistency(rows) == pytest.approx(total / 4)
    assert temporal.consistency(np.ones((3, 4))) == pytest.approx(1)
    assert temporal.consistency(np.array([[1.0, 0], [-1, 0]])) == 0
