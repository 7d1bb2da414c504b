"""Averages of the parameters whose length is chosen after training (Karras et al. 2024, EDM2, section 3).

An average with a power-function profile weighs the parameters of step s as s^γ: it reaches over the same share of
training however long that is. Its relative length σ_rel is the profile's standard deviation, as a share of training.
Two averages are tracked, and snapshots of them kept; the average of another length is the sum of snapshots whose
profile is nearest to its own. With snapshots each twentieth of training, lengths of 0.05 and 0.1 give those from 0.04
to 0.2 within 1% of how far an average lies behind the parameters (tests/train/test_averages.py).
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.checkpoints.bundle import load_bundle
from sora_jax.checkpoints.components import Bundle
from sora_jax.checkpoints.store import named_leaves, restore_into
from sora_jax.errors import UserError, user_path
from sora_jax.models.weights import read_weights, write_weights

Tree = TypeVar("Tree")
MAX_MISS = 0.1  # of a profile: what least squares leave, as a share of it
_CELLS = 4096  # into which profiles of longer trainings are divided


def exponent(length: float) -> float:
    """γ of a relative length: σ_rel = √((γ + 1) / ((γ + 2)² (γ + 3))); it is a cubic's root."""
    inverse = length**-2
    return float(np.roots([1.0, 7.0, 16 - inverse, 12 - inverse]).real.max())


def power_update(average: Tree, params: Tree, length: float, step: jax.typing.ArrayLike) -> Tree:
    """The average after one more step, of decay (1 − 1/t)^(γ + 1) at the t-th.

    Args:
      average: so far, float32; the parameters after the first step replace what it begins with.
      params: the parameters now.
      length: σ_rel.
      step: steps done before this one, from 0.
    """
    rate = -jnp.expm1((exponent(length) + 1) * jnp.log1p(-1 / (jnp.asarray(step, jnp.float32) + 1)))
    return jax.tree.map(lambda kept, now: kept + rate * (now.astype(jnp.float32) - kept), average, params)


def profile(length: float, step: int, steps: int) -> np.ndarray:
    """The weights of the parameters after each of `steps` ≥ `step` steps in the average at `step`: together 1.

    They are exactly those that `power_update` gives: a step's is the integral of the power function over it. Of more
    than 4,096 steps several share a number.
    """
    edges = np.linspace(0.0, steps / step, min(steps, _CELLS) + 1)
    return np.diff(np.minimum(edges, 1.0) ** (exponent(length) + 1))


def coefficients(kept: Sequence[tuple[float, int]], length: float, step: int) -> np.ndarray:
    """The share of each snapshot, a (length, step), in the average of `length` at `step`, by least squares.

    They are scaled to add up to 1, so that parameters that don't change come out as they are, however few snapshots
    there are.

    Raises:
      UserError: the snapshots don't span an average of that length.
    """
    basis = np.stack([profile(own, at, step) for own, at in kept], axis=1)
    wanted = profile(length, step, step)
    shares = np.linalg.lstsq(basis, wanted, rcond=None)[0]
    miss = np.linalg.norm(basis @ shares - wanted) / np.linalg.norm(wanted)
    if not miss < MAX_MISS:
        raise UserError(
            f"An average of length {length:g} at step {step} can't be made of {len(kept)} snapshots: they miss its "
            f"profile by {miss:.0%}; take a length nearer to {min(kept)[0]:g} or {max(kept)[0]:g}."
        )
    return shares / shares.sum()


def save_snapshot(workdir: str | os.PathLike[str], average: Any, length: float, step: int) -> None:
    """Writes an average's parameters to workdir/averages/<length>/<step>.safetensors, in float16."""
    path = pathlib.Path(workdir) / "averages" / f"{length}" / f"{step}.safetensors"
    leaves = {name.replace("/", "."): leaf for name, leaf in named_leaves(average).items()}
    write_weights(leaves, path, "float16")


def load_average(workdir: str | os.PathLike[str], length: float, step: int = 0) -> dict[str, np.ndarray]:
    """The parameters' average of relative length `length`, float32 by name, made of a run's snapshots.

    Args:
      workdir: of a run with `optim.ema_lengths`.
      length: σ_rel.
      step: at which the average ends, that of a snapshot; 0: the last.

    Raises:
      UserError: the run has no such snapshots, or they don't span an average of that length.
    """
    paths = (user_path(workdir) / "averages").glob("*/*.safetensors")
    files = {(float(path.parent.name), int(path.stem)): path for path in sorted(paths)}
    steps = sorted({at for _, at in files})
    if not files or (step and step not in steps):
        there = f"of step {step}, only of {', '.join(map(str, steps))}" if files else "of averages"
        raise UserError(f"{workdir} has no snapshot {there}: train with config.optim.ema_lengths=0.05,0.1.")
    step = step or steps[-1]
    kept = [key for key in files if key[1] <= step]
    total: dict[str, np.ndarray] = {}
    for key, share in zip(kept, coefficients(kept, length, step), strict=True):
        for name, tensor in read_weights(files[key]).items():
            total[name] = total.get(name, 0.0) + share * tensor.astype(np.float64)
    return {name.replace(".", "/"): leaf.astype(np.float32) for name, leaf in total.items()}


def load_average_bundle(workdir: str | os.PathLike[str], length: float, step: int = 0) -> Bundle:
    """A run's model, as `load_bundle` gives it, whose weights are `load_average`'s."""
    bundle = load_bundle(workdir)
    part = "vae" if bundle.dit is None else "dit"
    leaves = {name: jnp.asarray(leaf) for name, leaf in load_average(workdir, length, step).items()}
    return dataclasses.replace(bundle, **{part: restore_into(getattr(bundle, part), leaves)})
