"""Latents become tokens and come back; each token knows the box it covers and what is given at its place."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_jax.errors import UserError
from sora_jax.tokens.patches import CoordinateMode, coordinates, patchify, reference_patches, unpatchify


@given(*[st.integers(1, 3)] * 7)
@settings(max_examples=40, deadline=None)
def test_unpatchify_undoes_patchify(t, y, x, pt, py, px, c):
    grid, patch = (t * pt, y * py, x * px), (pt, py, px)
    latent = np.arange(np.prod(grid) * c).reshape(*grid, c)
    patches = patchify(latent, patch)
    assert patches.shape == (t * y * x, pt * py * px * c)
    np.testing.assert_array_equal(patches[0], latent[:pt, :py, :px].reshape(-1))
    np.testing.assert_array_equal(unpatchify(patches, grid, patch), latent)


def test_patches_must_divide_the_latent():
    with pytest.raises(UserError, match="A latent of 3×5×4 .* can't be cut into patches of 1×2×2"):
        patchify(np.zeros((3, 5, 4, 2)), (1, 2, 2))


@pytest.mark.parametrize("mode", get_args(CoordinateMode))
@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 2)])
def test_coordinates_follow_patchify(mode, patch):
    """Cut a latent that holds its own positions: the patches must agree with the coordinates."""
    grid = (4, 4, 6)
    positions = np.stack(np.meshgrid(*[np.arange(n) for n in grid], indexing="ij"), axis=-1).astype(
        np.float32
    )
    patches = patchify(positions, patch)
    centre = patches.reshape(len(patches), -1, 3).mean(axis=1)
    coords = coordinates(grid, patch, fps=8.0, mode=mode)
    assert coords.dtype == np.float32 and coords.shape == (len(patches), 5)
    counted = (centre - (np.array(patch) - 1) / 2) / patch  # patches before it, along each axis
    np.testing.assert_allclose(coords[:, 0], counted[:, 0] if mode == "latent" else centre[:, 0] * 4 / 8)
    centred = centre[:, 1:] + 0.5 - [2, 3]
    units = {"fractional": centred / 4, "normalized": centred / [4, 6]}
    np.testing.assert_allclose(coords[:, 1:3], units.get(mode, counted[:, 1:]), rtol=1e-6)
    # From the first to the last video frame a patch shows; the first latent frame shows one alone.
    first = np.where(centre[:, 0] < patch[0] - 0.5, 4, 0)
    np.testing.assert_allclose(coords[:, 3], (4 * patch[0] - first) / 8)
    np.testing.assert_allclose(coords[:, 4], 1 if mode in ("absolute", "latent") else 2 / 4)


@pytest.mark.parametrize("mode", get_args(CoordinateMode))
def test_a_window_has_the_coordinates_of_its_place(mode):
    """What `ends`, `first`, `corner` and `frame` say of a part is what the whole says there."""
    whole = coordinates((5, 6, 8), (1, 2, 2), 8.0, mode=mode).reshape(5, 3, 4, 5)
    part = coordinates(
        (2, 4, 4),
        (1, 2, 2),
        8.0,
        mode=mode,
        ends=[8, 12],
        first=[False, False],
        corner=(2, 4),
        frame=(6, 8),
    )
    np.testing.assert_allclose(part.reshape(2, 2, 2, 5), whole[2:4, 1:3, 2:4], atol=1e-6)


def test_a_latent_frame_may_show_a_single_frame_anywhere():
    coords = coordinates((3, 2, 2), (1, 2, 2), 8.0, ends=[0, 4, 6], first=[True, False, True])
    np.testing.assert_allclose(coords[:, 0], [0, 0.5, 0.75])
    np.testing.assert_allclose(coords[:, 3], [0, 0.5, 0])


def test_fractional_coordinates_know_the_picture_not_the_resolution():
    small, large = (coordinates((2, size, size * 2), (1, 2, 2), 8.0) for size in (4, 8))
    assert small[:, 1].max() == 0.25 and small[:, 2].max() == 0.75
    # Every small patch covers 2×2 large ones, and lies at their mean.
    large = large.reshape(2, 2, 2, 4, 2, 5).mean(axis=(2, 4)).reshape(-1, 5)
    np.testing.assert_allclose(large[:, :4], small[:, :4], atol=1e-6)
    np.testing.assert_allclose(large[:, 4] * 2, small[:, 4])
    square = coordinates((1, 4, 4), (1, 2, 2), 8.0)
    wide = coordinates((1, 4, 8), (1, 2, 2), 8.0)
    assert {tuple(c) for c in square[:, 1:2]} == {tuple(c) for c in wide[:, 1:2]}
    assert np.ptp(wide[:, 2]) > np.ptp(square[:, 2])


def test_coordinates_refuse_what_they_do_not_know():
    with pytest.raises(UserError, match='"fractional", "absolute", "normalized" or "latent"'):
        coordinates((1, 2, 2), (1, 2, 2), 8.0, mode="polar")
    with pytest.raises(UserError, match="frames per second"):
        coordinates((1, 2, 2), (1, 2, 2), 0.0)


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_a_hint_is_the_nearest_given_patch_at_the_same_place_on_either_side(t, m, seed):
    rng = np.random.default_rng(seed)
    patches, start = rng.normal(size=(t, m, 3)), rng.integers(2, size=(t, m)).astype(float)
    time = np.cumsum(rng.uniform(0.1, 1.0, t))
    reference = reference_patches(patches, start, time).reshape(t, m, 2, 4)
    for j, place in np.ndindex(t, m):
        given = [i for i in range(t) if start[i, place] == 0 and i != j]
        sides = [i for i in given if i < j][-1:], [i for i in given if i > j][:1]
        for side, found in enumerate(sides):
            if start[j, place] == 0 or not found:
                assert not reference[j, place, side].any()
            else:
                np.testing.assert_allclose(reference[j, place, side, :3], patches[found[0], place], rtol=1e-6)
                near = np.exp(-abs(time[j] - time[found[0]]))
                np.testing.assert_allclose(reference[j, place, side, 3], near, rtol=1e-6)
