"""Run with eight simulated devices: loss and gradients of a packed transformer on every mesh, against one device.

Prints a line a mesh: its sizes, the largest relative error, and how often a step runs collectives of each kind, by the
bytes of their buffers. A folder, if one is given, gets the compiled texts.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import json
import os
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from helpers import tiny_batch
from helpers.packed import pack_segments
from helpers.tiny_batch import SEGMENTS, wave
from sora_jax.distributed.mesh import MESH_AXES, MeshConfig, make_mesh, parameter_shardings, place_batch
from sora_jax.models.dit import DiT
from sora_jax.models.dit_config import DiTConfig
from sora_jax.models.vae import VAE, VAEConfig
from sora_jax.planner.hlo import Program

CONFIG = dataclasses.replace(
    tiny_batch.CONFIG, width=48, heads=8, layers=2, reference_frames=True, attention="reference", remat="dots"
)
KERNEL = dataclasses.replace(CONFIG, attention="cpu")
RING = dataclasses.replace(CONFIG, sequence="ring")
CROSS = dataclasses.replace(CONFIG, caption="cross")
SLOTS, WORDS = 24, 8
TOKENS = SLOTS + WORDS
SIZES = (
    *({axis: 8} for axis in MESH_AXES),
    *({one: 2, other: 4} for one, other in itertools.combinations(MESH_AXES, 2)),
    *({axis: 2 for axis in MESH_AXES if axis != whole} for whole in reversed(MESH_AXES)),
)
RING_SIZES = (
    {"sequence": 8},
    {"data": 2, "sequence": 4},
    {"fsdp": 2, "tensor": 2, "sequence": 2},
)


def make_model(config: DiTConfig) -> DiT:
    """No parameter is zero, so that each has a gradient."""
    shapes = jax.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda x: wave(*x.shape) / np.sqrt(x.shape[-2] if x.ndim > 1 else 4), shapes)


def make_batch() -> tuple[Any, Any, Any]:
    """Eight sequences of every kind of segment, a target, and levels."""
    segments = [dataclasses.replace(segment, key=str(row)) for row in range(8) for segment in SEGMENTS[1:4]]
    batch, _ = pack_segments(segments, SLOTS, WORDS, 4, batch_size=8, conditions=8)
    sigma = np.linspace(0.1, 0.9, batch.condition_segment_ids.size, dtype=np.float32).reshape(
        batch.condition_segment_ids.shape
    )
    sigma[:, 0] = 0.0
    return batch, wave(*batch.patches.shape, pitch=2.0), sigma


def loss(model: DiT, batch: Any, target: Any, sigma: Any) -> jax.Array:
    squares = jnp.square(model(batch.patches, batch, sigma) - target)
    return jnp.mean(squares * (batch.segment_ids > 0)[..., None])


def vae_loss(model: VAE, clip: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(model.decode(model.encode(clip)[0]) - clip))


def main() -> None:
    batch = make_batch()
    expected = on_one_device(loss, make_model(CONFIG), batch)
    compare("dit", loss, make_model(CONFIG), batch, SIZES[:-1], expected)
    compare("dit", loss, make_model(KERNEL), batch, SIZES[-1:], expected)
    compare("ring", loss, make_model(RING), batch, RING_SIZES, expected)
    cross = make_model(CROSS)
    compare("cross", loss, cross, batch, RING_SIZES[-1:], on_one_device(loss, cross, batch))
    config = VAEConfig(channels=2, encoder_widths=(8, 8, 16), decoder_widths=(8, 8, 16))
    vae, clip = VAE(config, rngs=nnx.Rngs(0)), (wave(8, 5, 16, 16, 3),)
    compare("vae", vae_loss, vae, clip, ({"data": 2, "fsdp": 4},), on_one_device(vae_loss, vae, clip))


def on_one_device(loss: Any, model: Any, given: tuple[Any, ...]) -> Any:
    """Loss and gradients."""
    return jax.device_get(jax.jit(jax.value_and_grad(loss))(model, *given))


def compare(
    name: str,
    loss: Any,
    model: Any,
    given: tuple[Any, ...],
    every: Sequence[dict[str, int]],
    expected: Any,
) -> None:
    """Prints a line a mesh."""

    def prepare(sizes: dict[str, int]) -> tuple[Any, ...]:
        mesh = make_mesh(MeshConfig(**sizes))
        kept = parameter_shardings(mesh, model)
        with jax.set_mesh(mesh):
            placed, rows = jax.device_put(model, kept), place_batch(mesh, given)
            step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, kept))
            return sizes, step.lower(placed, *rows).compile(), placed, rows

    # Several compile at once; programs that exchange something run one by one.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for sizes, compiled, placed, rows in pool.map(prepare, every):
            found = jax.device_get(compiled(placed, *rows))
            error = max(
                float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))
                for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
            )
            text = compiled.as_text()
            if len(sys.argv) > 1:
                pathlib.Path(sys.argv[1], "_".join([name, *sizes]) + ".txt").write_text(text)
            print(json.dumps({"model": name, "sizes": sizes, "error": error} | describe(text)), flush=True)


def describe(text: str) -> dict[str, Any]:
    """How often each kind of collective runs by the bytes of its buffer, and what rows are gathered whole."""
    counts: dict[str, Any] = collections.defaultdict(collections.Counter)
    for one in Program(text).collectives:
        counts[one.kind][one.bytes] += one.times
    # A row's tokens, all of them and as wide as the model.
    whole = rf"\[\d+,{TOKENS},(?:\d+,)*(?:{CONFIG.width}|{CONFIG.mlp_ratio * CONFIG.width})\]\S* all-gather"
    return {"collectives": counts, "gathered": re.findall(whole, text)}


if __name__ == "__main__":
    main()
