"""Rectified flow as pure functions (Liu et al. 2022; Lipman et al. 2022; Esser et al. 2024).

A straight path leads from data at σ = 0 to noise at σ = 1: x_σ = (1 − σ) x₀ + σ ε. The model learns its velocity
dx/dσ = ε − x₀, and a solver walks from σ = 1 back to 0. Another objective is another function here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def interpolate(clean: jax.Array, noise: jax.Array, sigma: jax.Array) -> jax.Array:
    """x_σ = (1 − σ) x₀ + σ ε; `sigma` broadcasts against both."""
    return (1.0 - sigma) * clean + sigma * noise


def velocity(clean: jax.Array, noise: jax.Array) -> jax.Array:
    """The target dx/dσ = ε − x₀."""
    return noise - clean


def denoise(x: jax.Array, velocity: jax.Array, sigma: jax.Array) -> jax.Array:
    """The clean data that a velocity points to: x₀ = x_σ − σ v."""
    return x - sigma * velocity


def draw_sigma(
    key: jax.Array, shape: tuple[int, ...], mean: float = 0.0, deviation: float = 1.0
) -> jax.Array:
    """Noise levels whose logit is normal (Esser et al. 2024, equation 19)."""
    return jax.nn.sigmoid(mean + deviation * jax.random.normal(key, shape))


def shift(sigma: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Moves levels towards noise, s σ / (1 + (s − 1) σ): a longer run hides less per token (ibid., equation 23)."""
    return sigma / (sigma + (1.0 - sigma) / factor)  # the same, and exactly 1 at σ = 1


def shift_factor(tokens: jax.Array, base_tokens: float) -> jax.Array:
    """s = √(n / n₀) for a run of n tokens, at least 1."""
    return jnp.sqrt(jnp.maximum(tokens / base_tokens, 1.0))


def schedule(steps: int, factor: jax.Array | float = 1.0) -> jax.Array:
    """`steps` + 1 levels from 1 to 0, evenly spaced and then shifted."""
    return shift(jnp.linspace(1.0, 0.0, steps + 1), factor)


def guide(conditional: jax.Array, unconditional: jax.Array, weight: jax.Array | float) -> jax.Array:
    """Classifier-free guidance (Ho and Salimans 2022): u + w (c − u)."""
    return unconditional + weight * (conditional - unconditional)


def euler(x: jax.Array, slope: jax.Array, sigma: jax.Array, next_sigma: jax.Array) -> jax.Array:
    """One first-order step from σ to σ′."""
    return x + (next_sigma - sigma) * slope


def heun(
    x: jax.Array, slope: jax.Array, next_slope: jax.Array, sigma: jax.Array, next_sigma: jax.Array
) -> jax.Array:
    """One second-order step: the mean of the slopes at both ends (Karras et al. 2022, algorithm 1)."""
    return x + (next_sigma - sigma) * 0.5 * (slope + next_slope)
