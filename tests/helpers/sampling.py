"""The shortest loop around the solver's step, against which the batcher of `pipeline/batching.py` is held."""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.diffusion import flow
from sora_jax.diffusion.guidance import Guidance, VelocityFn
from sora_jax.diffusion.solvers import State, solver_step
from sora_jax.tokens.packing import PackedBatch, Placement


def sample(
    model: VelocityFn,
    batch: PackedBatch,
    noise_bnp: np.ndarray,
    sigmas: np.ndarray,
    guidance: Guidance,
    solver: str = "euler",
    negative: PackedBatch | None = None,
) -> jax.Array:
    """Steps every entry from its first σ to its last; returns patches, float32 [B, N, P].

    Args:
      noise_bnp: one draw a segment, so that its result doesn't depend on its neighbours.
      sigmas: float[steps+1, B, S], falling; where one stays the same from step to step, tokens stay.
      guidance: of tables float[B, S], or of numbers for all segments.
    """
    passes = guidance.passes()
    batch, negative = jax.tree.map(jnp.asarray, (batch, negative if passes > 1 else None))
    sigmas = jnp.asarray(sigmas, jnp.float32).at[:, :, 0].set(0.0)
    guidance = guidance.tables(sigmas.shape[1:])
    sigma = flow.gather_sigmas(sigmas[0], batch.condition_ids)[..., None]
    noisy = flow.interpolate(batch.patches, jnp.asarray(noise_bnp, jnp.float32), sigma)
    x = jnp.where(sigma > 0, noisy, batch.patches)
    state = State.begin(x, sigmas[0])
    for now, then in itertools.pairwise(sigmas):
        state = solver_step(model, state, batch, now, then, guidance, negative, solver, passes)
    return state.x


def tabulate(
    settings: Sequence[Guidance], places: Sequence[Placement], segment_ids_bs: np.ndarray
) -> Guidance:
    """Tables float32[B, S] of settings by segment, in the order of `pack_segments`; the rest is unguided."""
    tables = {}
    for field in dataclasses.fields(Guidance):
        table = np.full(segment_ids_bs.shape, field.default, np.float32)
        for guidance, place in zip(settings, places, strict=True):
            table[place.row, segment_ids_bs[place.row] == place.segment_id] = getattr(guidance, field.name)
        tables[field.name] = table
    return Guidance(**tables)
