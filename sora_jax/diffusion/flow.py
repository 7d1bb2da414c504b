"""Rectified flow as pure functions (Liu et al. 2022; Lipman et al. 2022; Esser et al. 2024).

A straight path leads from data at σ = 0 to noise at σ = 1: x_σ = (1 − σ) x₀ + σ ε. The model learns its velocity
dx/dσ = ε − x₀, and a solver integrates it from σ = 1 back to 0. Another objective is another function here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sora_jax.axes import ConditionIds, PerCondition, PerToken


def interpolate(clean: jax.Array, noise: jax.Array, sigma: jax.Array) -> jax.Array:
    """x_σ = (1 − σ) x₀ + σ ε; `sigma` broadcasts against both."""
    return (1.0 - sigma) * clean + sigma * noise


def velocity(clean: jax.Array, noise: jax.Array) -> jax.Array:
    """The target dx/dσ = ε − x₀."""
    return noise - clean


def predict_x0(x: jax.Array, velocity: jax.Array, sigma: jax.Array) -> jax.Array:
    """The clean data that a velocity points to: x₀ = x_σ − σ v."""
    return x - sigma * velocity


def draw_sigma(
    key: jax.Array, shape: tuple[int, ...], mean: float = 0.0, deviation: float = 1.0
) -> jax.Array:
    """σ whose logit is normal (Esser et al. 2024, equation 19)."""
    return jax.nn.sigmoid(mean + deviation * jax.random.normal(key, shape))


def shift(sigma: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Timestep shifting towards noise, s σ / (1 + (s − 1) σ): noise hides less of more tokens (ibid., equation 23)."""
    return sigma / (sigma + (1.0 - sigma) / factor)  # the same, and exactly 1 at σ = 1


def shift_factor(tokens: jax.Array, base_tokens: float) -> jax.Array:
    """s = √(n / n₀) for a segment of n tokens, at least 1."""
    return jnp.sqrt(jnp.maximum(tokens / base_tokens, 1.0))


def unshift(sigma: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Undoes `shift`."""
    return shift(sigma, 1.0 / factor)


def schedule(
    steps: int,
    factor: jax.Array | float = 1.0,
    init_sigma: jax.Array | float = 1.0,
    ends: tuple[float, float] = (1.0, 0.0),
    keep_end: bool = False,
) -> jax.Array:
    """`steps` + 1 sigmas from `init_sigma` to 0, evenly spaced before they are shifted.

    Args:
      ends: between which they are spaced before. Libraries differ in these: diffusers' UniPC has (1, 0.001), Wan's
        original code (0.999, 0).
      keep_end: whether the last step begins at the second of them, instead of ending there: the last sigma is 0.
    """
    init_sigma = jnp.asarray(init_sigma, jnp.float32)
    even = jnp.linspace(*ends, steps if keep_end else steps + 1)[:steps]
    sigmas = jnp.append(shift(unshift(init_sigma, factor) * even, factor), 0.0)
    # Without the rounding of there and back.
    return sigmas.at[0].set(init_sigma) if ends[0] == 1 else sigmas


def gather_sigmas(table_bs: PerCondition, ids_bn: ConditionIds) -> PerToken:
    """The condition's value for each token, [B, S] and [B, N] → [B, N]."""
    return jnp.take_along_axis(table_bs, ids_bn, axis=1, mode="promise_in_bounds")


def velocity_at(x: jax.Array, clean: jax.Array, sigma: jax.Array) -> jax.Array:
    """The velocity that points to `clean`, (x_σ − x₀) / σ: undoes `predict_x0`; at σ = 0 a number without meaning."""
    return (x - clean) / jnp.maximum(sigma, 1e-8)


def euler(x: jax.Array, velocity: jax.Array, sigma: jax.Array, next_sigma: jax.Array) -> jax.Array:
    """One first-order step from σ to σ′."""
    return x + (next_sigma - sigma) * velocity


def heun(
    x: jax.Array, velocity: jax.Array, next_velocity: jax.Array, sigma: jax.Array, next_sigma: jax.Array
) -> jax.Array:
    """One second-order step: the mean of the velocities at both ends (Karras et al. 2022, algorithm 1)."""
    return x + (next_sigma - sigma) * 0.5 * (velocity + next_velocity)


def multistep(
    x: jax.Array,
    clean: jax.Array,
    last_clean: jax.Array,
    sigma: jax.Array,
    next_sigma: jax.Array,
    last_sigma: jax.Array,
) -> jax.Array:
    """One second-order step of one evaluation: DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2).

    With α = 1 − σ its λ is log((1 − σ) / σ), and its first-order step is Euler's. It is that one where a segment
    begins, and where λ is infinite: after a step from σ = 1, and in one to σ′ = 0. Its order is two but for a
    logarithm, since steps in λ don't get shorter near the ends.

    Args:
      clean, last_clean: the denoised at σ and at the σ of the step before.
      last_sigma: that σ; where it isn't above σ there was no such step.
    """
    half_log_snr = lambda sigma: jnp.log1p(-sigma) - jnp.log(sigma)
    ahead = half_log_snr(next_sigma) - half_log_snr(sigma)
    # Infinite after a step from σ = 1: no extrapolation.
    behind = half_log_snr(sigma) - half_log_snr(last_sigma)
    usable = (last_sigma > sigma) & (next_sigma > 0)
    ratio = jnp.where(usable, ahead / (2 * behind), 0.0)
    target = clean + ratio * (clean - last_clean)
    return euler(x, velocity_at(x, target, sigma), sigma, next_sigma)


def corrector(
    x: jax.Array,
    last_x: jax.Array,
    clean: jax.Array,
    last_clean: jax.Array,
    earlier_clean: jax.Array,
    sigma: jax.Array,
    last_sigma: jax.Array,
    earlier_sigma: jax.Array,
) -> jax.Array:
    """The step that led to `x` repeated with the denoised at its end: UniC (Zhao et al. 2023, B(h) = e^h − 1).

    Before `multistep` it makes UniPC-2, a predictor and corrector of one evaluation, as Wan's original code and
    diffusers have it. Of first order where the step before the last isn't known: the mean of the denoised at both ends.

    Args:
      x, clean: at σ, where the step ended.
      last_x, last_clean: at `last_sigma`, where it began; where that isn't above σ there was no step, and `x` stays.
      earlier_clean: at `earlier_sigma`, where the step before it began; where that isn't above `last_sigma` there was
        none.
    """
    half_log_snr = lambda sigma: jnp.log1p(-sigma) - jnp.log(sigma)
    ahead = half_log_snr(sigma) - half_log_snr(last_sigma)
    second = (last_sigma > sigma) & (earlier_sigma > last_sigma)
    h = jnp.where(second, ahead, 1.0)
    # The two conditions of order for the weights of the denoised's differences (ibid., equation 5).
    phi = jnp.expm1(-h)
    rest = -phi / h - 1
    of_first, of_second = rest / phi, 2 * (-rest / h - 0.5) / phi
    inverse = h / jnp.where(second, half_log_snr(earlier_sigma) - half_log_snr(last_sigma), -1.0)
    earlier_weight = (of_second - of_first) * inverse / (1 - inverse)
    target = last_clean + (of_first - earlier_weight) * (clean - last_clean)
    target += earlier_weight * inverse * (earlier_clean - last_clean)
    target = jnp.where(second, target, 0.5 * (clean + last_clean))
    corrected = euler(last_x, velocity_at(last_x, target, last_sigma), last_sigma, sigma)
    return jnp.where(last_sigma > sigma, corrected, x)
