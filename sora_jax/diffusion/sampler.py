"""The packed solver loop: fills whatever a batch's canvases leave open, each run at its own σ, in one compiled step."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.data.packing import PackedBatch
from sora_jax.diffusion import flow
from sora_jax.errors import UserError
from sora_jax.models.dit import DiT

SOLVERS = ("euler", "heun")


def sample(
    model: DiT,
    batch: PackedBatch,
    noise_bnp: np.ndarray,
    sigmas: np.ndarray,
    guidance_bs: np.ndarray,
    solver: str = "euler",
    progress: Callable[[int, int], None] | None = None,
) -> jax.Array:
    """Walks every run from its first σ to its last; given tokens stay as they are.

    Args:
      model: the velocity.
      batch: `patches` hold the given tokens; the others' content is overwritten by noise.
      noise_bnp: what σ = 1 looks like, one draw a run, so that a run's result doesn't depend on its neighbours.
      sigmas: float[steps+1, B, S]; entry [:, b, k] is the schedule of run k of row b, entry [:, b, 0] is unused.
      guidance_bs: weight of classifier-free guidance by run.
      solver: "euler", one evaluation a step, or "heun", two.
      progress: called with (steps done, steps in all).

    Returns:
      Patches, float32 [B, N, P].

    Raises:
      UserError: there is no such solver.
    """
    if solver not in SOLVERS:
        raise UserError(f"There is no solver {solver!r}: choose one of {', '.join(SOLVERS)}.")
    batch = jax.tree.map(jnp.asarray, batch)
    levels = jnp.asarray(sigmas, jnp.float32).at[:, :, 0].set(0.0)
    start = gather_levels(levels[0], condition_ids(batch))
    x = flow.interpolate(batch.patches, jnp.asarray(noise_bnp, jnp.float32), start[..., None])
    steps = len(levels) - 1
    for step in range(steps):
        x = solver_step(model, x, batch, levels[step], levels[step + 1], jnp.asarray(guidance_bs), solver)
        if progress is not None:
            x.block_until_ready()
            progress(step + 1, steps)
    return x


@functools.partial(jax.jit, static_argnames="solver")
def solver_step(
    model: DiT,
    x_bnp: jax.Array,
    batch: PackedBatch,
    sigma_bs: jax.Array,
    next_sigma_bs: jax.Array,
    guidance_bs: jax.Array,
    solver: str,
) -> jax.Array:
    """One step of every run from its σ to its next; a run whose two levels are equal rests."""
    ids = condition_ids(batch)
    sigma, next_sigma = (gather_levels(level, ids)[..., None] for level in (sigma_bs, next_sigma_bs))
    slope = guided_velocity(model, x_bnp, batch, sigma_bs, guidance_bs)
    ahead = flow.euler(x_bnp, slope, sigma, next_sigma)
    if solver == "heun":
        next_slope = guided_velocity(model, ahead, batch, next_sigma_bs, guidance_bs)
        ahead = flow.heun(x_bnp, slope, next_slope, sigma, next_sigma)
    return jnp.where(batch.given[..., None], batch.patches, ahead)


def guided_velocity(
    model: DiT, x_bnp: jax.Array, batch: PackedBatch, sigma_bs: jax.Array, guidance_bs: jax.Array
) -> jax.Array:
    """Velocity with classifier-free guidance: rows with their words and rows without, in one pass."""
    ids = condition_ids(batch)
    twice = functools.partial(jnp.concatenate, axis=0)
    both = model(
        twice([x_bnp, x_bnp]),
        twice([batch.coords, batch.coords]),
        twice([batch.segment_ids, batch.segment_ids]),
        twice([ids, ids]),
        twice([sigma_bs, sigma_bs]),
        twice([batch.text, batch.text]),
        twice([batch.text_segment_ids, jnp.zeros_like(batch.text_segment_ids)]),
        twice([batch.text_time, batch.text_time]),
    )
    conditional, unconditional = jnp.split(both, 2)
    return flow.guide(conditional, unconditional, gather_levels(guidance_bs, ids)[..., None])


def condition_ids(batch: PackedBatch) -> jax.Array:
    """Which condition a token holds: its run's, or 0 where it is given; int [B, N]."""
    return jnp.where(batch.given, 0, batch.segment_ids)


def gather_levels(table_bs: jax.Array, ids_bn: jax.Array) -> jax.Array:
    """The table's entry for each token, [B, S] and [B, N] → [B, N]."""
    return jnp.take_along_axis(table_bs, ids_bn, axis=1)
