"""Sequence parallelism, both ways: what is exchanged, what memory it takes, and the error. See README.md.

    python experiments/scale/sequence.py --json experiments/scale/sequence.json
    python experiments/scale/sequence.py --topology v5e:2x4 --size B --slots 8192 --rows 2 --dtype bfloat16

Counted from compiled programs, forward and gradient, on simulated devices that share a CPU's cores: nothing is timed.
With a topology TPUs' compiler takes their place, which needs libtpu, and nothing runs.
"""

from __future__ import annotations

import json
import os
import pathlib
import time
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from sora_jax.distributed.mesh import MESH_AXES, parameter_shardings, sharding
from sora_jax.models.dit import DiT
from sora_jax.models.dit_config import DiTConfig
from sora_jax.planner.hlo import Collective, Program, totals
from sora_jax.tokens.packing import PackedBatch

SHARES = (0.5, 0.3, 0.15)  # of a sequence's slots, three segments; the rest is empty
TEXT_LEN = 64


@click.command()
@click.option("--json", "out", type=click.Path(path_type=pathlib.Path), help="Where to write the figures.")
@click.option("--topology", default="", help="Compile for these TPUs instead, such as v5e:2x4.")
@click.option("--size", default="", help="Of the transformer; default: 256 wide, 2 layers, 8 heads.")
@click.option("--slots", default=2048, help="Of a sequence, text and patches.")
@click.option("--rows", default=1)
@click.option("--dtype", default="float32")
def main(out: pathlib.Path | None, topology: str, size: str, slots: int, rows: int, dtype: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    if topology:
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    else:
        jax.config.update("jax_num_cpu_devices", 8)
        devices = jax.devices()
    own = {"size": size} if size else {"size": "", "width": 256, "layers": 2, "heads": 8}
    found = []
    for ring in (False, True):
        config = DiTConfig(
            **own, channels=4, text_width=32, dtype=dtype, sequence="ring" if ring else "heads"
        )
        for parts in (2, 4, 8):
            if config.heads % parts and not ring:
                print(f"heads, sequence={parts}: {config.heads} heads can't be split so")
                continue
            found.append(compare(config, devices, parts, (rows, slots), run=not topology))
            print_row(found[-1])
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n")


def compare(config: DiTConfig, devices: Any, parts: int, shape: tuple[int, int], run: bool) -> dict[str, Any]:
    """One way on so many devices: predicted, found, memory, and the error against one device if it can run."""
    mesh = Mesh(np.array(devices[:parts]).reshape(1, 1, 1, parts), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    abstract = jax.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0)))
    kept = parameter_shardings(mesh, abstract)
    given = make_batch(config, *shape)
    on_mesh = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    arguments = (
        jax.tree.map(on_mesh, abstract, kept),
        *jax.tree.map(lambda x: on_mesh(x, sharding(mesh, "B")), given),
    )
    begin = time.perf_counter()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, kept))
        platform = devices[0].platform
        compiled = step.trace(*arguments).lower(lowering_platforms=(platform,)).compile()
    seconds = time.perf_counter() - begin
    listed = Program(compiled.as_text()).collectives
    share = shape[0] * shape[1] // parts * config.width * jnp.dtype(config.dtype).itemsize
    result = {
        "way": config.sequence,
        "parts": parts,
        "predicted": predict(config, parts, share),
        "found": measure(config, listed, share),
        "all": totals(listed),
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "seconds": seconds,
    }
    if run:
        result["error"] = error(compiled, make_model(abstract), given, (mesh, kept))
    return result


def predict(config: DiTConfig, parts: int, share: int) -> dict[str, float]:
    """By hand, of what is as wide as the model: how many exchanges a step, and bytes that leave a device.

    A share is a device's slots of all sequences, as wide as the model. By heads: q, k, v and the result forward, their
    gradients backward. By the ring: k and v forward, and backward q and what came back, parts - 1 times each; the
    gradient of q parts times in float32 and home in its own type.
    """
    if config.sequence == "heads":
        count = config.layers * 8
        return {"count": count, "sent": count * share * (parts - 1) / parts}
    wide = share // jnp.dtype(config.dtype).itemsize * 4
    often, gathered = config.layers * (4 * (parts - 1) + 1), config.layers * parts
    return {"count": often + gathered, "sent": often * share + gathered * wide}


def measure(config: DiTConfig, listed: list[Collective], share: int) -> dict[str, float]:
    kind = "all-to-all" if config.sequence == "heads" else "collective-permute"
    wide = [one for one in listed if one.kind == kind and one.bytes >= share]
    return {"count": sum(one.times for one in wide), "sent": sum(one.times * one.sent for one in wide)}


def loss(model: DiT, batch: PackedBatch, target: jax.Array, sigma: jax.Array) -> jax.Array:
    squares = jnp.square(model(batch.patches, batch, sigma) - target)
    return jnp.mean(squares * (batch.segment_ids > 0)[..., None])


def make_batch(config: DiTConfig, rows: int, slots: int) -> tuple[PackedBatch, np.ndarray, np.ndarray]:
    """Sequences of three segments and some empty slots, a target, and levels."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal((rows, *shape)).astype(np.float32)
    patches = slots - TEXT_LEN

    def ids(count: int) -> np.ndarray:
        lengths = [int(share * count) for share in SHARES]
        row = np.repeat([1, 2, 3, 0], [*lengths, count - sum(lengths)])
        return np.tile(row.astype(np.int32), (rows, 1))

    table = np.tile(np.arange(4, dtype=np.int32), (rows, 1))
    batch = PackedBatch(
        patches=normal(patches, config.patch_width),
        coords=normal(patches, 5),
        segment_ids=ids(patches),
        init_sigma=np.ones((rows, patches), np.float32),
        condition_ids=ids(patches),
        text=normal(TEXT_LEN, config.text_width),
        text_segment_ids=ids(TEXT_LEN),
        text_time=np.zeros((rows, TEXT_LEN), np.float32),
        text_condition_ids=ids(TEXT_LEN),
        condition_segment_ids=table,
        condition_caption_time=np.zeros(table.shape, np.float32),
        condition_init_sigma=np.ones(table.shape, np.float32),
    )
    sigma = np.tile(np.array([0.0, 0.9, 0.5, 0.2], np.float32), (rows, 1))
    return batch, normal(patches, config.patch_width), sigma


def make_model(abstract: Any) -> Any:
    """No parameter is zero, so that each has a gradient."""
    rng = np.random.default_rng(1)
    scale = lambda shape: 1 / np.sqrt(shape[-2] if len(shape) > 1 else 4)
    return jax.tree.map(
        lambda x: (scale(x.shape) * rng.standard_normal(x.shape)).astype(np.float32), abstract
    )


def error(compiled: Any, model: Any, given: Any, placing: tuple[Mesh, Any]) -> float:
    """The largest relative one of loss and gradients."""
    mesh, kept = placing
    expected = jax.device_get(jax.jit(jax.value_and_grad(loss))(model, *given))
    rows = jax.device_put(given, sharding(mesh, "B"))
    found = jax.device_get(compiled(jax.device_put(model, kept), *rows))
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in pairs)


def print_row(row: dict[str, Any]) -> None:
    predicted, found = row["predicted"], row["found"]
    cells = [
        row["way"],
        row["parts"],
        *(
            f"{predicted[key] * unit:.4g} / {found[key] * unit:.4g}"
            for key, unit in (("count", 1), ("sent", 1e-6))
        ),
        f"{row['temporaries'] / 1e6:.1f}",
        f"{row['error']:.1e}" if "error" in row else "",
        ", ".join(f"{count} {kind} {size / 1e6:.3g}" for kind, (count, size) in row["all"].items()),
    ]
    print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
