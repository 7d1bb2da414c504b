"""Schedules and solvers against diffusers' (golden arrays of tools/parity/wan.py)."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.sampling import sample

from sora_jax.diffusion import flow
from sora_jax.diffusion.guidance import Guidance
from sora_jax.tokens.packing import Segment, pack_batch

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "wan_solvers.npz")


def velocity(x, batch, sigma_bs):
    """That of the kit: any smooth function does."""
    return jnp.sin(3 * x) + flow.gather_sigmas(sigma_bs, batch.condition_ids)[..., None] * x


def sigmas_of(solver: str, steps: int) -> np.ndarray:
    """As `checkpoints.pretrained` sets them for a scheduler of shift 3."""
    if solver == "euler":
        return np.asarray(flow.schedule(steps, 3.0, 1.0, (1.0, float(flow.shift(0.001, 3.0))), keep_end=True))
    return np.asarray(jnp.minimum(flow.schedule(steps, 3.0, 1.0, (1.0, 0.001)), 1 - 1e-6))


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("solver", ["unipc", "euler"])
def test_schedules_and_steps_are_those_of_diffusers(solver, steps):
    sigmas = sigmas_of(solver, steps)
    np.testing.assert_allclose(sigmas, GOLDEN[f"{solver}_{steps}_sigmas"], atol=2e-6)
    x = np.linspace(-2, 2, 8, dtype=np.float32)[None]
    one = Segment(
        x, np.zeros((1, 5), np.float32), np.ones(1), np.zeros(1), np.zeros((0, 4), np.float32), np.zeros(0)
    )
    batch, _ = pack_batch([[one]], 1, 1, 4, 1)
    table = np.stack([np.zeros(steps + 1, np.float32), sigmas], 1)[:, None]
    got = np.asarray(sample(jax.tree_util.Partial(velocity), batch, x[None], table, Guidance(), solver))[0]
    np.testing.assert_allclose(got, GOLDEN[f"{solver}_{steps}"][-1:], atol=2e-5)
