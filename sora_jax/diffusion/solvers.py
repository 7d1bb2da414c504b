"""Solvers: one compiled step of a packed batch, each segment at its own σ; the loop is `pipeline/batching.py`.

"euler" evaluates the model once a step; "heun" twice, of second order; "dpm" once, of second order by the step before
(DPM-Solver++(2M)); "unipc" is "dpm" with each step corrected by the evaluation of the next one (UniPC-2);
"sde" goes from the predicted x₀ to the next sigma with new noise each step, as few-step models do that were trained by
distribution matching (Yin et al. 2024, arXiv:2405.14867). A flow map (`models.dit_config.DiTConfig.flow_map`)
integrates by itself, its guidance learned: one evaluation a step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sora_jax.diffusion import flow
from sora_jax.diffusion.guidance import Guidance, VelocityFn, guided_clean
from sora_jax.models.step_cache import StepCache
from sora_jax.tokens.packing import PackedBatch

ODE_SOLVERS = ("euler", "heun", "dpm", "unipc")
SOLVERS = (*ODE_SOLVERS, "sde")


def is_flow_map(model: VelocityFn) -> bool:
    """Whether a model gives the mean velocity over a step: then the step is the model's, whatever solver is named."""
    return getattr(getattr(model, "config", None), "flow_map", False)


class State(NamedTuple):
    """What one step passes to the next.

    Attributes:
      x: float[B,N,P], the tokens now.
      last_x, clean: float[B,N,P], the tokens before the last step, and the x₀ predicted from them.
      earlier_clean: float[B,N,P], the x₀ predicted before the step before that.
      last_sigma: float[B,S], the σ of `last_x`; that of a condition which the last step left alone is its present σ,
        not a higher one, so there is nothing to extrapolate from.
      earlier_sigma: float[B,S], the σ of `earlier_clean`, likewise.
      cache: of the model's layers; None: every evaluation is whole.
    """

    x: jax.Array
    last_x: jax.Array
    clean: jax.Array
    earlier_clean: jax.Array
    last_sigma: jax.Array
    earlier_sigma: jax.Array
    cache: StepCache | None = None

    @classmethod
    def begin(cls, x: Any, sigma_bs: Any, cache: StepCache | None = None) -> State:
        """Before the first step: there is no step before it."""
        return cls(x, x, x, x, sigma_bs, sigma_bs, cache)


@functools.partial(jax.jit, static_argnames=("solver", "passes"))
def solver_step(
    model: VelocityFn,
    state: State,
    batch: PackedBatch,
    sigma_bs: jax.Array,
    next_sigma_bs: jax.Array,
    guidance: Guidance,
    negative_batch: PackedBatch | None,
    solver: str,
    passes: int,
    fresh_noise: jax.Array | None = None,
) -> State:
    """One step of every condition from its σ to its next.

    Where they are equal, or σ is above `guidance.zero_init_sigma`, its tokens stay bit for bit: so conditioning tokens
    (condition 0, whose σ is 0), partially noised ones that wait until their segment's σ has come down to theirs, and
    segments of fewer steps are all served by one step.

    Args:
      model: the velocity.
      batch: of which `patches` aren't used.
      sigma_bs, next_sigma_bs: float[B,S].
      guidance: of tables float[B,S].
      negative_batch: the same batch with the negative prompts, see `guidance.without_caption`.
      solver: a name of `SOLVERS`.
      passes: of `Guidance.passes`, or more.
      fresh_noise: float[B,N,P], this step's own, for "sde".
    """
    per_token = lambda table: flow.gather_sigmas(table, batch.condition_ids)[..., None]
    denoised = lambda x, sigmas, cache: guided_clean(
        model, x, batch, sigmas, guidance, passes, negative_batch, cache
    )
    sigma, next_sigma, last_sigma = map(per_token, (sigma_bs, next_sigma_bs, state.last_sigma))
    earlier_sigma = per_token(state.earlier_sigma)
    active_bs = (next_sigma_bs < sigma_bs) & (sigma_bs <= guidance.zero_init_sigma)
    masked = lambda new: jnp.where(per_token(active_bs), new, state.x)
    before = lambda sigma_bs: jnp.where(active_bs, sigma_bs, next_sigma_bs)
    after = lambda next_x, x, clean, cache: State(
        next_x, x, clean, state.clean, before(sigma_bs), before(state.last_sigma), cache
    )

    if is_flow_map(model):
        velocity = model(state.x, batch, sigma_bs, next_sigma_bs)
        next_x = masked(flow.euler(state.x, velocity, sigma, next_sigma))
        return after(next_x, state.x, flow.predict_x0(state.x, velocity, sigma), state.cache)
    x = state.x
    clean, cache = denoised(x, sigma_bs, state.cache)
    if solver == "unipc":
        cleans = clean, state.clean, state.earlier_clean
        x = flow.corrector(x, state.last_x, *cleans, sigma, last_sigma, earlier_sigma)
    if solver == "sde":
        assert fresh_noise is not None
        next_x = masked(flow.interpolate(clean, fresh_noise, next_sigma))
    elif solver in ("dpm", "unipc"):
        next_x = masked(flow.multistep(x, clean, state.clean, sigma, next_sigma, last_sigma))
    else:
        velocity = flow.velocity_at(x, clean, sigma)
        next_x = masked(flow.euler(x, velocity, sigma, next_sigma))
    if solver == "heun":
        next_clean, cache = denoised(next_x, next_sigma_bs, cache)
        next_velocity = flow.velocity_at(next_x, next_clean, next_sigma)
        # A step to 0 is Euler's (Karras et al. 2022, algorithm 1): training sees no σ of exactly 0.
        corrected = masked(flow.heun(x, velocity, next_velocity, sigma, next_sigma))
        next_x = jnp.where(next_sigma > 0, corrected, next_x)
    return after(next_x, x, clean, cache)


def step_of(model: VelocityFn) -> Callable[..., State]:
    """`solver_step`: compiled, or as it is for a model whose blocks come one by one, which no program can hold."""
    return solver_step.__wrapped__ if getattr(model, "offloaded", False) else solver_step
