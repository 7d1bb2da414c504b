"""Run with eight simulated devices: loss and gradients of a packed transformer on every mesh, against one device.

Prints a line a mesh: its sizes, the largest relative error, and how many collectives of each kind the program has.
"""

import collections
import dataclasses
import itertools
import json
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny_batch
from flax import nnx
from tiny_batch import RUNS, pack_rows, wave

from sora_jax.mesh import MESH_AXES, MeshConfig, make_mesh, parameter_sharding, place_rows
from sora_jax.models.dit import DiT
from sora_jax.models.vae import VAE, VAEConfig

CONFIG = dataclasses.replace(
    tiny_batch.CONFIG, width=48, heads=8, layers=2, hints=True, attention="cpu", remat="dots"
)
SLOTS, WORDS = 28, 8
TOKENS = SLOTS + WORDS
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
SIZES = (
    *({axis: 8} for axis in MESH_AXES),
    *({one: 2, other: 4} for one, other in itertools.combinations(MESH_AXES, 2)),
    *({axis: 2 for axis in MESH_AXES if axis != whole} for whole in MESH_AXES),
)


def make_model() -> DiT:
    """No parameter is zero, so that each has a gradient."""
    shapes = jax.eval_shape(lambda: DiT(CONFIG, rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda x: wave(*x.shape) / np.sqrt(x.shape[-2] if x.ndim > 1 else 4), shapes)


def make_batch() -> tuple[Any, Any, Any]:
    """Eight rows of whatever kinds of runs there are, a target, and levels."""
    runs = [dataclasses.replace(run, key=str(row)) for row in range(8) for run in RUNS[1:4]]
    batch, _ = pack_rows(runs, SLOTS, WORDS, 4, rows=8, conditions=8)
    sigma = np.linspace(0.1, 0.9, batch.condition_runs.size, dtype=np.float32).reshape(
        batch.condition_runs.shape
    )
    sigma[:, 0] = 0.0
    return batch, wave(*batch.patches.shape, pitch=2.0), sigma


def loss(model: DiT, batch: Any, target: Any, sigma: Any) -> jax.Array:
    squares = jnp.square(model(batch.patches, batch, sigma) - target)
    return jnp.mean(squares * (batch.segment_ids > 0)[..., None])


def vae_loss(model: VAE, clip: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(model.decode(model.encode(clip)[0]) - clip))


def main() -> None:
    compare("dit", loss, make_model(), make_batch(), SIZES)
    config = VAEConfig(channels=2, encoder_widths=(8, 8, 16), decoder_widths=(8, 8, 16))
    vae = VAE(config, rngs=nnx.Rngs(0))
    compare("vae", vae_loss, vae, (wave(8, 5, 16, 16, 3),), ({"data": 2, "fsdp": 4},))


def compare(
    name: str, loss: Any, model: Any, given: tuple[Any, ...], every: Sequence[dict[str, int]]
) -> None:
    """Prints a line a mesh."""
    expected = jax.device_get(jax.jit(jax.value_and_grad(loss))(model, *given))
    for sizes in every:
        mesh = make_mesh(MeshConfig(**sizes))
        kept = jax.tree.map(lambda leaf: parameter_sharding(mesh, leaf.shape), model)  # noqa: B023
        with jax.set_mesh(mesh):
            placed, rows = jax.device_put(model, kept), place_rows(mesh, given)
            step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, kept))
            compiled = step.lower(placed, *rows).compile()
            found = jax.device_get(compiled(placed, *rows))
        error = max(
            float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
        )
        if len(sys.argv) > 1:
            pathlib.Path(sys.argv[1], "_".join([name, *sizes]) + ".txt").write_text(compiled.as_text())
        text = compiled.as_text()
        names = re.findall(rf" ({'|'.join(KINDS)})(?:-start)?\(", text)
        # A row's tokens, all of them and as wide as the model.
        whole = (
            rf"\[\d+,{TOKENS},(?:\d+,)*(?:{CONFIG.width}|{CONFIG.mlp_ratio * CONFIG.width})\]\S* all-gather"
        )
        told = {"collectives": collections.Counter(names), "gathered": re.findall(whole, text)}
        print(json.dumps({"model": name, "sizes": sizes, "error": error} | told), flush=True)


if __name__ == "__main__":
    main()
