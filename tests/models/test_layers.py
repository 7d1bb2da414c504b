"""The transformer's pieces, held against formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_jax.models import layers

PERIODS = ((64.0, 0.25), (8.0, 0.125))
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def test_a_linear_layer_keeps_the_variance_and_the_dtype():
    linear = layers.Linear(400, 300, rngs=nnx.Rngs(0))
    x = normal(50, 400)
    out = linear(x)
    np.testing.assert_allclose(out, x @ np.asarray(linear.kernel[...]), atol=1e-4)
    assert float(out.std()) == pytest.approx(1.0, abs=0.05)
    assert linear(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
    assert linear.kernel[...].dtype == jnp.float32


def test_a_linear_layer_of_scale_zero_gives_its_bias():
    linear = layers.Linear(4, 3, 0.0, rngs=nnx.Rngs(0))
    linear.bias[...] = jnp.array([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(linear(normal(2, 4)), [[1, 2, 3]] * 2)


def test_rms_norm_divides_by_the_root_mean_square():
    x, scale = 7 * normal(5, 16), normal(16)
    expected = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True))
    np.testing.assert_allclose(layers.rms_norm(x), expected, rtol=1e-5)
    np.testing.assert_allclose(layers.rms_norm(x, scale), expected * scale, rtol=1e-5)
    half = layers.rms_norm(jnp.asarray(300 * x, jnp.float16))  # its squares overflow float16
    assert half.dtype == jnp.float16
    np.testing.assert_allclose(half, expected, atol=5e-3)


def test_rms_norm_of_an_empty_slot_is_zero_with_a_finite_gradient():
    value, gradient = jax.value_and_grad(lambda x: layers.rms_norm(x).sum())(jnp.zeros(8))
    assert value == 0
    assert np.isfinite(gradient).all()


def test_frequencies_fall_geometrically_between_the_named_periods():
    periods = 2 * np.pi / np.asarray(layers.frequencies(5, 16.0, 0.25))
    np.testing.assert_allclose(periods, 16.0 * (1 / 64) ** (np.arange(5) / 4), rtol=1e-5)


def test_fourier_is_cosines_then_sines():
    value = np.array([[0.0, 0.3]], np.float32)
    features = np.asarray(layers.fourier(value, 8, longest=4.0, shortest=0.5))
    angles = 2 * np.pi * value[..., None] / np.array([4.0, 2.0, 1.0, 0.5])
    np.testing.assert_allclose(features, np.concatenate([np.cos(angles), np.sin(angles)], -1), atol=1e-5)


def test_fourier_tells_neighbouring_noise_levels_apart():
    levels = np.linspace(0, 1, 201, dtype=np.float32)
    features = np.asarray(layers.fourier(levels, 256, longest=4.0, shortest=2e-3))
    distances = np.linalg.norm(features[:, None] - features[None], axis=-1) + 99 * np.eye(201)
    assert distances.min() > 1


def _logits(q: np.ndarray, k: np.ndarray, coords_q: np.ndarray, coords_k: np.ndarray) -> np.ndarray:
    """Rotated q [N,F] against rotated k [N,F], token by token: [N]."""
    turn = lambda x, coords: layers.rotate(
        jnp.asarray(x)[None, :, None], layers.rotary_angles(jnp.asarray(coords)[None], x.shape[-1], PERIODS)
    )
    return np.asarray((turn(q, coords_q) * turn(k, coords_k)).sum(-1)[0, :, 0])


Q, K = normal(6, 16), normal(6, 16)
# Multiples of 1/64 up to 4: sums of them are exact, and so is what is left to see.
place = st.integers(-256, 256).map(lambda n: n / 64)


@settings(max_examples=30)
@given(shift=st.tuples(place, place, place))
def test_attention_sees_only_differences_of_coordinates(shift):
    coords_q, coords_k = (np.round(64 * normal(6, 3)) / 64 for _ in range(2))
    shift = np.array(shift, np.float32)
    here = _logits(Q, K, coords_q, coords_k)
    np.testing.assert_allclose(_logits(Q, K, coords_q + shift, coords_k + shift), here, atol=2e-3)
    np.testing.assert_allclose(_logits(Q, K, coords_q - coords_k, 0 * coords_k), here, atol=2e-3)


@pytest.mark.parametrize("axis", range(3))
def test_attention_sees_every_coordinate(axis):
    zero, moved = np.zeros((6, 3), np.float32), np.zeros((6, 3), np.float32)
    moved[:, axis] = 0.4
    assert np.abs(_logits(Q, K, moved, zero) - _logits(Q, K, zero, zero)).min() > 1e-3
    assert np.abs(_logits(Q, K, moved, zero) - _logits(Q, K, -moved, zero)).min() > 1e-3


def test_turning_keeps_lengths_and_nothing_turns_at_the_origin():
    x, coords = normal(2, 5, 3, 16), normal(2, 5, 3)
    turned = layers.rotate(x, layers.rotary_angles(coords, 16, PERIODS))
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(layers.rotate(x, layers.rotary_angles(0 * coords, 16, PERIODS)), x)


@pytest.mark.parametrize(("head_width", "in_time", "in_space"), [(64, 8, 12), (72, 10, 13), (16, 2, 3)])
def test_a_quarter_of_the_pairs_turn_with_time_and_the_rest_with_y_and_x_equally(
    head_width, in_time, in_space
):
    _, sines = layers.rotary_angles(jnp.eye(3)[None] * 0.01, head_width, PERIODS)
    assert sines.shape == (1, 3, head_width // 2)
    assert (np.asarray(sines[0]) != 0).sum(axis=1).tolist() == [in_time, in_space, in_space]


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_each_token_gets_its_conditions_row_and_gives_it_its_gradient(platform, monkeypatch):
    monkeypatch.setattr(layers, "platform", lambda: platform)
    table, weights = normal(2, 3, 5), normal(2, 4, 5)
    index = np.array([[0, 2, 2, 1], [1, 0, 0, 0]])
    gathered = lambda table: layers.gather_conditions(table, jnp.asarray(index))
    expected = np.take_along_axis(table, index[..., None], axis=1)
    np.testing.assert_array_equal(gathered(table), expected)
    gradient = jax.grad(lambda table: (gathered(table) * weights).sum())(jnp.asarray(table))
    scattered = np.zeros_like(table)
    for row in range(2):
        np.add.at(scattered[row], index[row], weights[row])
    np.testing.assert_allclose(gradient, scattered, rtol=1e-5, atol=1e-6)
