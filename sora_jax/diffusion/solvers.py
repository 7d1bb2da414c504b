"""The packed solver loop: fills whatever a batch's canvases leave open, each run at its own σ, in one compiled step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.diffusion import flow
from sora_jax.diffusion.guidance import Guidance, Model, guided_clean
from sora_jax.errors import UserError
from sora_jax.tokens.packing import PackedBatch

SOLVERS = ("euler", "heun", "dpm", "unipc")


class State(NamedTuple):
    """What one step hands to the next.

    Attributes:
      x: float[B,N,P], where the tokens are.
      last_x, clean: float[B,N,P], where they were, and x₀ as seen from there.
      last_sigma: float[B,S], at which level that was; an entry that rested has its own level here, not a higher one,
        and so nothing to extrapolate from.
    """

    x: jax.Array
    last_x: jax.Array
    clean: jax.Array
    last_sigma: jax.Array


def sample(
    model: Model,
    batch: PackedBatch,
    noise_bnp: np.ndarray,
    sigmas: np.ndarray,
    guidance: Guidance,
    solver: str = "euler",
    negative: PackedBatch | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> jax.Array:
    """Walks every entry from its first σ to its last; given tokens, and those whose σ stays 0, remain as they are.

    Args:
      model: the velocity.
      batch: `patches` hold what is given and what is to be repainted; the others' content has no effect.
      noise_bnp: what σ = 1 looks like, one draw a run, so that a run's result doesn't depend on its neighbours.
      sigmas: float[steps+1, B, S], falling levels of each entry, from its `condition_init_sigma` down to 0; entry 0, of
        given tokens, is taken as 0. Where a level stays from one step to the next, tokens rest; so runs of fewer
        steps end with zeros, and tokens to be repainted wait until their run has come down to them.
      guidance: of tables float[B, S], or of numbers for all runs; how often it needs the model is compiled in.
      solver: "euler", one evaluation a step; "heun", two, of second order; "dpm", one, of second
        order from the step before (DPM-Solver++(2M)); "unipc", the same with each step corrected by the next one's
        evaluation.
      negative: the same rows with as many text slots, whose words are what guidance leads away from; a run without
        some has no word there.
      progress: called with (steps done, steps in all).

    Returns:
      Patches, float32 [B, N, P].

    Raises:
      UserError: there is no such solver.
    """
    if solver not in SOLVERS:
        raise UserError(f"There is no solver {solver!r}: choose one of {', '.join(SOLVERS)}.")
    passes = guidance.passes()
    batch, negative = jax.tree.map(jnp.asarray, (batch, negative if passes > 1 else None))
    levels = jnp.asarray(sigmas, jnp.float32).at[:, :, 0].set(0.0)
    guidance = guidance.tables(levels.shape[1:])
    start = flow.gather_sigmas(levels[0], batch.condition_ids)[..., None]
    noisy = flow.interpolate(batch.patches, jnp.asarray(noise_bnp, jnp.float32), start)
    x = jnp.where(start > 0, noisy, batch.patches)
    state, steps = State(x, x, x, levels[0]), len(levels) - 1
    for step in range(steps):
        state = solver_step(
            model, state, batch, levels[step], levels[step + 1], guidance, negative, solver, passes
        )
        if progress is not None:
            state.x.block_until_ready()
            progress(step + 1, steps)
    return state.x


@functools.partial(jax.jit, static_argnames=("solver", "passes"))
def solver_step(
    model: Model,
    state: State,
    batch: PackedBatch,
    sigma_bs: jax.Array,
    next_sigma_bs: jax.Array,
    guidance: Guidance,
    negative: PackedBatch | None,
    solver: str,
    passes: int,
) -> State:
    """One step of every entry from its σ to its next; where they are equal, its tokens rest."""
    per_token = lambda table: flow.gather_sigmas(table, batch.condition_ids)[..., None]
    denoised = lambda x, levels: guided_clean(model, x, batch, levels, guidance, passes, negative)
    sigma, next_sigma, last_sigma = map(per_token, (sigma_bs, next_sigma_bs, state.last_sigma))
    moves_bs = (next_sigma_bs < sigma_bs) & (sigma_bs <= guidance.hold)
    moved = lambda there: jnp.where(per_token(moves_bs), there, state.x)

    x, clean = state.x, denoised(state.x, sigma_bs)
    if solver == "unipc":
        x = flow.corrector(x, state.last_x, clean, state.clean, sigma, last_sigma)
    if solver in ("dpm", "unipc"):
        ahead = moved(flow.multistep(x, clean, state.clean, sigma, next_sigma, last_sigma))
    else:
        velocity = flow.velocity_at(x, clean, sigma)
        ahead = moved(flow.euler(x, velocity, sigma, next_sigma))
    if solver == "heun":
        next_velocity = flow.velocity_at(ahead, denoised(ahead, next_sigma_bs), next_sigma)
        # A step to 0 is Euler's (Karras et al. 2022, algorithm 1): training comes near σ = 0 but never there.
        better = moved(flow.heun(x, velocity, next_velocity, sigma, next_sigma))
        ahead = jnp.where(next_sigma > 0, better, ahead)
    return State(ahead, x, clean, jnp.where(moves_bs, sigma_bs, next_sigma_bs))
