"""Turns a transformer into one of finer patches that starts where it stood: every token into the tokens inside it.

    python experiments/bundled_model/repatch.py runs/dit runs/fine --patch 1,1,1

A cell's numbers then enter by the sum of its old patch's projections (as if the patch were constant, after FlexiViT's
resizing, Beyer et al. 2023, section 3.4), and leave by their mean. Everything else is kept: RoPE and Fourier features
count in sides of the frame, not in patches.
"""

from __future__ import annotations

import dataclasses
import math

import click
import jax
import numpy as np
from flax import nnx

from sora_jax.checkpoints.bundle import load_bundle, save_bundle
from sora_jax.checkpoints.store import named_leaves, restore_into
from sora_jax.models.dit import DiT


@click.command()
@click.argument("model")
@click.argument("folder", type=click.Path())
@click.option("--patch", default="1,1,1", help="Latent frames, rows and columns of the new patch.")
def main(model: str, folder: str, patch: str) -> None:
    """Writes MODEL with another patch to FOLDER, to go on training from (`--config.init_from`)."""
    bundle = load_bundle(model)
    assert bundle.dit is not None
    old = bundle.dit.config
    sides = tuple(int(side) for side in patch.split(","))
    if len(sides) != 3 or any(a % b for a, b in zip(old.patch, sides, strict=True)):
        raise click.BadParameter(f"--patch {patch} must divide the old one, {old.patch}.")
    new = dataclasses.replace(old, patch=sides)
    leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(bundle.dit).items()}
    for name, leaf in leaves.items():
        part, _, kind = name.partition("/")
        if part == "patch_in" and kind == "kernel":
            leaves[name] = _inside(leaf, old.patch, sides).sum(0)
        elif part == "reference_in" and kind == "kernel":  # twice a patch and its nearness
            each = leaf.reshape(2, -1, leaf.shape[-1])
            own = np.stack([_inside(side[:-1], old.patch, sides).sum(0) for side in each])
            leaves[name] = np.concatenate([own, each[:, -1:]], axis=1).reshape(-1, leaf.shape[-1])
        elif part == "patch_out":
            leaves[name] = np.moveaxis(_inside(np.moveaxis(leaf, -1, 0), old.patch, sides).mean(0), 0, -1)
    dit = restore_into(jax.eval_shape(lambda: DiT(new, rngs=nnx.Rngs(0))), leaves)
    tokens = math.prod(old.patch) / math.prod(sides)
    base = dataclasses.replace(bundle, dit=dit, base_tokens=bundle.base_tokens * tokens)
    save_bundle(base, folder, dtype="float32")


def _inside(rows: np.ndarray, old: tuple[int, ...], new: tuple[int, ...]) -> np.ndarray:
    """[P, …] of an old patch as [new patches inside it, P′, …]."""
    pairs = [side for a, b in zip(old, new, strict=True) for side in (a // b, b)]
    split = rows.reshape(*pairs, -1, *rows.shape[1:])
    split = np.moveaxis(split, (0, 2, 4), (0, 1, 2))
    return split.reshape(math.prod(pairs[::2]), -1, *rows.shape[1:])


if __name__ == "__main__":
    main()
