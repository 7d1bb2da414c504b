"""Sigmas of LTX-Video against diffusers' (golden arrays of tools/parity/ltx.py)."""

import json
import pathlib

import numpy as np
import pytest

from sora_jax.diffusion import flow
from sora_jax.diffusion.ltx_schedule import DISTILLED, DISTILLED_SECOND_PASS, DynamicShift, linear_quadratic
from sora_jax.errors import UserError

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "ltx_schedules.npz")


@pytest.mark.parametrize("steps", [2, 8, 50])
@pytest.mark.parametrize("tokens", [64, 1024, 7392, 20000])
def test_sigmas_are_those_of_diffusers(tokens, steps):
    for kind, shift in {"stretched": DynamicShift(), "plain": DynamicShift(terminal=0)}.items():
        sigmas = shift.sigmas(steps, tokens)
        np.testing.assert_allclose(sigmas, GOLDEN[f"{kind}_{tokens}_{steps}"], atol=1e-6)
    ours = flow.schedule(steps, shift.factor(tokens), ends=(1.0, 1 / steps), keep_end=True)
    np.testing.assert_allclose(ours, sigmas, atol=1e-5)  # the same shift as everywhere


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 50])
def test_linear_quadratic_sigmas_are_those_of_diffusers(steps):
    np.testing.assert_allclose(linear_quadratic(steps), GOLDEN[f"linear_{steps}"], atol=1e-6)


def test_the_settings_are_those_of_the_kit():
    settings, shift = json.loads(str(GOLDEN["config"])), DynamicShift()
    assert shift.tokens == (settings["base_image_seq_len"], settings["max_image_seq_len"])
    assert shift.shifts == (settings["base_shift"], settings["max_shift"])
    assert shift.terminal == settings["shift_terminal"]


def test_one_step_goes_from_noise_to_data():
    np.testing.assert_array_equal(DynamicShift().sigmas(1, 2048), [1, 0])
    for schedule in (lambda: DynamicShift().sigmas(0, 2048), lambda: linear_quadratic(0)):
        with pytest.raises(UserError, match="0 steps"):
            schedule()


@pytest.mark.parametrize("init_sigma", [0.05, 0.5, 0.97])
def test_what_starts_late_goes_the_same_way_to_the_terminal_sigma(init_sigma):
    shift = DynamicShift()
    sigmas = shift.sigmas(6, 2048, init_sigma)
    assert sigmas[0] == np.float32(init_sigma) and sigmas[-1] == 0 and (np.diff(sigmas) < 0).all()
    plain = np.asarray(flow.schedule(6, shift.factor(2048), init_sigma))
    if init_sigma > shift.terminal:
        assert sigmas[-2] == pytest.approx(shift.terminal, abs=1e-6)
        stretch = (sigmas[0] - sigmas[:-1])[1:] / (plain[0] - plain[:-1])[1:]
        np.testing.assert_allclose(stretch, stretch[0], rtol=1e-4)
    else:
        np.testing.assert_allclose(sigmas, plain, atol=1e-6)


def test_distilled_sigmas_fall():
    assert DISTILLED[0] == 1 and (np.diff(DISTILLED) < 0).all()
    # The second pass goes on from where the first one's big steps begin.
    assert DISTILLED_SECOND_PASS[:2] == DISTILLED[-2:] and DISTILLED_SECOND_PASS[2] < DISTILLED[-1]
