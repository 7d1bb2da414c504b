"""Run with eight simulated devices: loss and gradients of Wan's transformer on meshes, against one device.

Prints a line a mesh: its sizes and the largest error, relative to the largest number of the array; and that of the
velocity with int8 weights.
"""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from helpers.tiny_batch import wave
from sora_jax.distributed.mesh import MeshConfig, make_mesh, parameter_shardings, place_batch
from sora_jax.models.int8 import to_int8
from sora_jax.models.wan import Wan, WanConfig
from sora_jax.tokens.canvas import all_noise_canvas, to_segment
from sora_jax.tokens.packing import pack_batch
from sora_jax.tokens.spans import CausalSpan

CONFIG = WanConfig(2, 4, 12, 64, 4, 4, text_width=16, text_padding=32, time_width=16, attention="reference")
SIZES = ({"fsdp": 2, "tensor": 4}, {"data": 2, "tensor": 2, "sequence": 2})


def make_batch() -> tuple[Any, Any, Any]:
    """Eight sequences of two segments, the first of which is given its first frame; a target, and levels."""
    rows = []
    for row in range(8):
        segments = []
        for frames, words in ((2, 5), (1, 3)):
            canvas = all_noise_canvas(CausalSpan(0, 1 + 4 * (frames - 1)), (4, 4), 4, 16.0)
            start = np.ones(canvas.grid, np.float32)
            start[: frames - 1] = 0
            latent = wave(*canvas.latent.shape) * (1 + row / 8)
            canvas = dataclasses.replace(canvas, latent=latent, init_sigma=start)
            text = wave(words, 16, pitch=0.3)
            segments.append(
                to_segment(canvas, CONFIG.patch, text, np.zeros(words, np.float32), CONFIG.coords)
            )
        rows.append(segments)
    batch, _ = pack_batch(rows, 8, 16, 8, 3)
    sigma = np.where(batch.condition_segment_ids > 0, np.float32(0.6), np.float32(0))
    return batch, wave(*batch.patches.shape, pitch=2.0), sigma


def loss(model: Wan, batch: Any, target: Any, sigma: Any) -> jax.Array:
    squares = jnp.square(model(batch.patches, batch, sigma) - target)
    return jnp.mean(squares * (batch.segment_ids > 0)[..., None])


def main() -> None:
    given = make_batch()
    shapes = jax.eval_shape(lambda: Wan(CONFIG, rngs=nnx.Rngs(0)))
    model = jax.tree.map(lambda x: wave(*x.shape) / np.sqrt(x.shape[-2] if x.ndim > 1 else 4), shapes)
    step = jax.jit(jax.value_and_grad(loss))
    expected = jax.device_get(step(model, *given))
    run, quantized = jax.jit(lambda model, batch, sigma: model(batch.patches, batch, sigma)), to_int8(model)
    velocity = jax.device_get(run(quantized, given[0], given[2]))
    for sizes in SIZES:
        mesh = make_mesh(MeshConfig(**sizes))
        with jax.set_mesh(mesh):
            placed = jax.device_put(quantized, parameter_shardings(mesh, quantized))
            batch, _, sigma = place_batch(mesh, given)
            of_int8 = (
                np.abs(jax.device_get(run(placed, batch, sigma)) - velocity).max() / np.abs(velocity).max()
            )
            placed = jax.device_put(model, parameter_shardings(mesh, model))
            got = jax.device_get(step(placed, *place_batch(mesh, given)))
        errors = jax.tree.map(
            lambda a, b: float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-3)), got, expected
        )
        print(
            json.dumps({"sizes": sizes, "error": max(jax.tree.leaves(errors)), "int8": float(of_int8)}),
            flush=True,
        )


if __name__ == "__main__":
    main()
