"""PSNR and SSIM agree with scikit-image, and with what their definitions say of simple cases."""

import numpy as np
import pytest

from sora_jax.errors import UserError
from sora_jax.evaluation.metrics import ms_ssim, ms_ssim_scales, psnr, ssim


def pair() -> tuple[np.ndarray, np.ndarray]:
    """A noisy clip and the clean one: uint8[3,40,52,3]."""
    t, y, x = np.mgrid[:3, :40, :52].astype(float)
    clean = [128 + 100 * np.sin(x / 5 + t), 128 + 100 * np.cos(y / 7 - t), 128 + 60 * np.sin((x + y) / 9)]
    clean = np.stack(clean, -1).round().astype(np.uint8)
    noise = 20 * np.sin(12.9898 * np.arange(clean.size)).reshape(clean.shape)
    return np.clip(clean + noise, 0, 255).round().astype(np.uint8), clean


def test_values_are_those_of_scikit_image():
    noisy, clean = pair()
    # scikit-image 0.26: peak_signal_noise_ratio, and structural_similarity on luma frame by frame with
    # gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255.
    assert psnr(noisy, clean) == pytest.approx(25.108154736436607, abs=1e-9)
    assert ssim(noisy, clean) == pytest.approx(0.5904643990205383, abs=1e-6)


def test_the_range_of_the_data_does_not_matter():
    noisy, clean = pair()
    for scale, shift, data_range in ((255, 0, 1), (127.5, -1, 2)):
        a, b = noisy / scale + shift, clean / scale + shift
        assert psnr(a, b, data_range) == pytest.approx(psnr(noisy, clean))
        if shift == 0:
            assert ssim(a, b, data_range) == pytest.approx(ssim(noisy, clean))


def test_a_batch_is_each_clip_alone():
    noisy, clean = pair()
    batch, references = np.stack([noisy, clean, noisy[::-1]]), np.stack([clean, clean, clean])
    for measure, best in ((psnr, np.inf), (ssim, 1.0)):
        values = measure(batch, references)
        assert values.shape == (3,) and values[1] == best
        assert values[0] == measure(noisy, clean) and values[2] == measure(noisy[::-1], clean)
        assert values[2] < values[0] < best


def test_known_values():
    flat = np.full((1, 16, 16, 3), 100, np.uint8)
    # A shift by 16 everywhere: the error is 256, and only the brightness term of SSIM sees it.
    assert psnr(flat, flat + 16) == pytest.approx(10 * np.log10(255**2 / 256))
    c1 = (0.01 * 255) ** 2
    assert ssim(flat, flat + 16) == pytest.approx((2 * 100 * 116 + c1) / (100**2 + 116**2 + c1))


def test_what_can_not_be_compared_is_refused():
    noisy, clean = pair()
    with pytest.raises(UserError, match="one shape"):
        psnr(noisy, clean[:2])
    with pytest.raises(UserError, match="one shape"):
        ssim(noisy[0], clean[0])
    with pytest.raises(UserError, match="11 x 11"):
        ssim(noisy[:, :10], clean[:, :10])


def test_ms_ssim_is_a_product_over_scales():
    noisy, clean = pair()
    weights = ms_ssim_scales(40, 52)
    assert len(weights) == 2 and sum(weights) == pytest.approx(1)
    # Of the coarsest scale alone it is SSIM of means of 2 x 2 pixels.
    halves = [clip.reshape(3, 20, 2, 26, 2, 3).mean((2, 4)) for clip in (noisy, clean)]
    assert ms_ssim(noisy, clean, weights=(0.0, 1.0)) == pytest.approx(ssim(*halves), abs=1e-6)
    assert ms_ssim(clean, clean, weights=weights) == 1
    assert [len(ms_ssim_scales(*size)) for size in ((11, 99), (22, 22), (175, 300), (176, 176))] == [
        1,
        2,
        4,
        5,
    ]


def test_too_small_frames_name_the_size_that_is_needed():
    noisy, clean = pair()
    with pytest.raises(UserError, match="MS-SSIM needs frames of at least 176 x 176 pixels for 5 scales"):
        ms_ssim(noisy, clean)


def test_numbers_that_are_none_are_refused():
    noisy, clean = pair()
    broken = clean.astype(float)
    broken[2, 0, 0, 0] = np.nan
    for measure in (psnr, ssim):
        with pytest.raises(UserError, match=r"NaN or infinity\) in 1 of its frames, first in frame 2"):
            measure(noisy, broken)
