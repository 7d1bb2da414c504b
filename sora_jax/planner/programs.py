"""The real programs, compiled for machines that aren't attached: a training step, a step of the sampler.

For a TPU slice they are compiled by the TPU's own compiler, libtpu, which runs on any Linux machine; for simulated
devices by XLA for this machine's processor. Nothing is run and no array is allocated.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh
from ml_collections import ConfigDict

from sora_jax.checkpoints.pretrained import pretrained_folder
from sora_jax.config import component
from sora_jax.diffusion.guidance import Guidance
from sora_jax.diffusion.solvers import State, solver_step
from sora_jax.distributed.chips import Topology
from sora_jax.distributed.mesh import MeshConfig, make_mesh, on_host, parameter_sharding, sharding
from sora_jax.errors import UserError
from sora_jax.planner.hlo import Program
from sora_jax.planner.published import OBJECTIVE, PublishedSampler, stored_zeros
from sora_jax.tokens.packing import PackedBatch
from sora_jax.train.finetune import FinetuneObjective
from sora_jax.train.loop import make_steps
from sora_jax.train.loop_config import read_loop_config
from sora_jax.train.objectives import make_objective
from sora_jax.train.target import target_of

STEPS = ("train", "sample")


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """A step and the chips to run it on.

    Attributes:
      config: of a training run.
      step: of `STEPS`.
      topology: the chips.
      batch_size: sequences of the global batch; of a sampler one video for each part of data x fsdp.
      mesh: sizes of the mesh's axes, by name.
    """

    config: ConfigDict
    step: str
    topology: Topology
    batch_size: int
    mesh: dict[str, int]

    @property
    def passes(self) -> int:
        """Model evaluations a step: two for a sampler with guidance, unless `config.video` says otherwise."""
        target = target_of(self.config)
        return 1 if self.step == "train" else target.passes if target else 2


@dataclasses.dataclass(frozen=True)
class Built:
    """A compiled program and its compiler's statistics.

    Attributes:
      spec: the step whose program it is.
      seconds: that compiling took.
      memory: bytes on one chip by kind: "parameters", "base" (a model below a LoRA), "average", "optimizer", "batch",
        "activations", "temporaries", "code". All but activations are the compiler's; those are what the backward pass
        saves of the forward one, by shape, and temporaries are the rest.
      fits: whether it fits the memory.
      program: its parsed text; None where it didn't fit.
    """

    spec: StepSpec
    seconds: float
    memory: dict[str, float]
    fits: bool
    program: Program | None


def objective_of(config: ConfigDict) -> Any:
    """The objective without `init_from`: initial weights have no effect here, and may not exist yet.

    Of an open model its sampler.
    """
    if config.objective == OBJECTIVE:
        return PublishedSampler(config)
    if config.objective == "finetune":
        objective: Any = make_objective(config, "")
        objective.folder = pretrained_folder(config.pretrained, weights=False)
        return objective
    return make_objective(ConfigDict(config.to_dict() | {"init_from": ""}), "")


def frozen_shapes(objective: Any) -> tuple[Any, ...]:
    """Of what a training step takes besides and nothing changes (`train.loop.place_frozen`): a model below a LoRA."""
    if not isinstance(objective, FinetuneObjective):
        return ()
    frozen = {"uncaptioned": jax.ShapeDtypeStruct((1, objective.dit.text_width), jnp.float32)}
    if objective.lora.rank:
        weights = jnp.dtype(objective.transformer.weights)
        frozen["model"] = jax.eval_shape(lambda: stored_zeros(objective.template, weights))
    return (frozen,)


def positions_of(spec: StepSpec) -> int:
    """Positions of a transformer's sequence, those of text among them where it is in the sequence."""
    row = spec.config.pipeline
    return row.seq_len + objective_of(spec.config).dit.text_positions(row.text_len)


def make_step_spec(config: ConfigDict, step: str, topology: Topology) -> StepSpec:
    """A configuration's step on a topology; -1 in config.mesh is the rest of its chips.

    Raises:
      UserError: the mesh doesn't divide the chips, or there is no such program.
    """
    if config.objective == OBJECTIVE:
        # A video on as many chips as its heads allow; where that leaves some, several videos.
        heads = objective_of(config).dit.heads
        own = {"data": -1, "sequence": math.gcd(heads, topology.count, config.pipeline.seq_len)}
        mesh = component(MeshConfig, own | {"fsdp": 1, "tensor": 1} | config.mesh.to_dict(), "mesh")
        return _sampler_spec(config, mesh, topology)
    loop = read_loop_config(config)
    if loop.objective == "distill":
        raise UserError(
            "Distillation can't be planned: plan the training of its teacher's architecture, of which a step takes "
            "about three fifths as much."
        )
    if loop.objective == "finetune_vae":
        raise UserError(
            "Training an open model's autoencoder can't be planned yet: try a step of it, --config.steps=1."
        )
    if loop.objective == "finetune" and step == "sample":
        raise UserError(f"Of sampling an open model, plan --model {config.pretrained or 'FOLDER'}.")
    if step == "sample" and loop.objective != "dit":
        raise UserError("An autoencoder has no sampler: plan its training, or a transformer's --step sample.")
    if step == "sample":
        return _sampler_spec(config, dataclasses.replace(loop.mesh, data=-1, fsdp=1), topology)
    sizes = loop.mesh.sizes(topology.count)
    parts = sizes["data"] * sizes["fsdp"]
    part = "loss" if loop.objective == "vae" else "pipeline"
    batch_size = config[part].batch_size
    if batch_size < 1 or batch_size % parts:
        field = f"config.{part}.batch_size"
        raise UserError(
            f"A batch of {batch_size} doesn't divide over data x fsdp = {parts} chips of {topology.name}: make {field} "
            "a multiple of it, or change config.mesh."
        )
    return StepSpec(config, step, topology, batch_size, sizes)


def _sampler_spec(config: ConfigDict, mesh: MeshConfig, topology: Topology) -> StepSpec:
    """As many videos at once as the axes that cut one leave chips for."""
    sizes = mesh.sizes(topology.count)
    return StepSpec(config, "sample", topology, sizes["data"] * sizes["fsdp"], sizes)


def build(spec: StepSpec) -> Built:
    """Compiles the step's program.

    Raises:
      UserError: libtpu or simulated devices are missing, heads that the mesh doesn't divide.
    """
    begun = time.perf_counter()
    traced, parts, platform = trace(spec)
    try:
        compiled = traced.lower(lowering_platforms=(platform,)).compile()
    except jax.errors.JaxRuntimeError as error:
        used = _overflow(str(error))
        if used is None:
            raise
        known = sum(parts.values()) - parts["activations"]
        parts["temporaries"] = max(used - known - parts["activations"], 0.0)
        return Built(spec, time.perf_counter() - begun, parts, False, None)
    stats: Any = compiled.memory_analysis()
    kept = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    parts["activations"] = min(parts["activations"], stats.temp_size_in_bytes)
    parts["temporaries"] = stats.temp_size_in_bytes - parts["activations"]
    parts["temporaries"] += max(kept - sum(parts[name] for name in _KEPT), 0.0)
    parts["code"] = stats.generated_code_size_in_bytes
    # A TPU's compiler refuses what doesn't fit; simulated devices share this machine's memory.
    fits = spec.topology.is_tpu or sum(parts.values()) * spec.topology.count <= host_memory()
    program = Program(compiled.as_text())
    return Built(spec, time.perf_counter() - begun, parts, fits, program)


def trace(spec: StepSpec) -> tuple[Any, dict[str, float], str]:
    """The step's program, traced for its mesh (`jax.stages.Traced`); its arguments' bytes by kind; its platform."""
    mesh = make_mesh(MeshConfig(**spec.mesh), _devices(spec.topology))
    # Devices that aren't attached can't be set as those to run on; tracing needs no more than their shape.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return *_trace(spec, mesh), mesh.devices.flat[0].platform


def estimate_memory(spec: StepSpec) -> Built:
    """The same without a compiler: arguments are exact, activations are what the backward pass saves, and
    temporaries are gradients, two layers' gathered weights and one layer's widest arrays.
    """
    begun = time.perf_counter()
    axis_types = (AxisType.Auto,) * len(spec.mesh)
    mesh = AbstractMesh(tuple(spec.mesh.values()), tuple(spec.mesh), axis_types=axis_types)
    with jax.sharding.use_abstract_mesh(mesh):
        _, parts = _trace(spec, mesh)
    if spec.config.objective != "vae":
        dit, sizes = objective_of(spec.config).dit, spec.mesh
        positions = spec.batch_size * positions_of(spec)
        own = positions / (sizes["data"] * sizes["fsdp"] * sizes["sequence"])
        own *= spec.passes  # of a sampler all are one call
        number = 4 if dit.dtype == "float32" else 2
        widest = 2 * number * own * dit.hidden / sizes["tensor"]
        parts["temporaries"] = 2 * 2 * 12 * dit.width**2 + widest + 4 * 4 * own * dit.width
    if spec.step == "train":
        parts["temporaries"] += parts["parameters"]
    chip = spec.topology.chip
    fits = chip is None or sum(parts.values()) <= chip.memory
    return Built(spec, time.perf_counter() - begun, parts, fits, None)


def host_memory() -> float:
    """Bytes of this machine's memory."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


_KEPT = ("parameters", "base", "average", "optimizer", "batch")


def _trace(spec: StepSpec, mesh: Mesh | AbstractMesh) -> tuple[Any, dict[str, float]]:
    """The traced program, and the bytes of its arguments on each chip."""
    objective = objective_of(spec.config)
    batch = _placed(objective.shapes(spec.batch_size), lambda leaf: sharding(mesh, "B"))
    key = _placed(jax.eval_shape(lambda: jax.random.key(0)), lambda leaf: sharding(mesh, ""))
    keep = lambda leaf: parameter_sharding(mesh, leaf.shape)
    parts = dict.fromkeys((*_KEPT, "activations", "temporaries", "code"), 0.0)
    parts["batch"] = _bytes(batch)
    if spec.step == "sample":
        return _trace_sampler(spec, objective, batch, mesh, parts)

    loop = read_loop_config(spec.config)
    init, step = make_steps(objective, loop.optim)
    frozen = _placed(frozen_shapes(objective), keep)
    state = _placed(jax.eval_shape(init, key), keep)
    if loop.optim.offload:
        host_shardings = on_host(jax.tree.map(lambda leaf: leaf.sharding, state.opt_state))
        moved = jax.tree.map(lambda leaf, kept: leaf.update(sharding=kept), state.opt_state, host_shardings)
        state = dataclasses.replace(state, opt_state=moved)
    parts |= {
        "parameters": _bytes(state.params),
        "base": _bytes(frozen),
        "average": _bytes((state.ema, state.long_ema)),
        "optimizer": 0.0 if loop.optim.offload else _bytes(state.opt_state),
        "activations": _saved(objective, state.params, batch, key, frozen, spec),
    }
    kept = jax.tree.map(lambda leaf: leaf.sharding, state)
    update = jax.jit(step, donate_argnums=0, out_shardings=(kept, sharding(mesh, "")))
    return update.trace(state, batch, key, *frozen), parts


def _trace_sampler(
    spec: StepSpec, objective: Any, batch: PackedBatch, mesh: Mesh | AbstractMesh, parts: dict[str, float]
) -> tuple[Any, dict[str, float]]:
    model = jax.eval_shape(objective.init, jax.random.key(0))
    model = _placed(model, lambda leaf: parameter_sharding(mesh, leaf.shape))
    sigmas = batch.condition_init_sigma
    guidance = Guidance(**{field.name: sigmas for field in dataclasses.fields(Guidance)})
    state = State.begin(batch.patches, sigmas)
    parts["parameters"] = _bytes(model)
    parts["batch"] += _bytes(state) + _bytes(guidance)
    traced = solver_step.trace(
        model, state, batch, sigmas, sigmas, guidance, None, solver="euler", passes=spec.passes
    )
    return traced, parts


def _saved(objective: Any, params: Any, batch: Any, key: Any, frozen: Any, spec: StepSpec) -> float:
    """Bytes on a chip of what the forward pass saves for the backward one, by shape."""

    def residuals(params: Any, batch: Any, key: Any, frozen: Any) -> Any:
        loss = lambda params: objective.loss(params, batch, key, *frozen)
        return jax.tree.leaves(jax.vjp(loss, params, has_aux=True)[1])

    own = {leaf.shape for leaf in jax.tree.leaves((params, frozen))}
    sizes = spec.mesh
    positions = 0 if spec.config.objective == "vae" else positions_of(spec)
    total = 0.0
    for leaf in jax.eval_shape(residuals, params, batch, key, frozen):
        if leaf.shape in own or spec.batch_size not in leaf.shape:
            continue
        cut = sizes["data"] * sizes["fsdp"]
        if spec.config.objective != "vae":
            config = objective.dit
            of_heads = {config.heads, 3 * config.heads, config.hidden}
            cut *= sizes["sequence"] if positions in leaf.shape else 1
            cut *= sizes["tensor"] if of_heads & set(leaf.shape[2:]) else 1
        total += math.prod(leaf.shape) * leaf.dtype.itemsize / cut
    return total


def _placed(tree: Any, place: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(leaf)), tree)


def _bytes(tree: Any) -> float:
    """On one chip."""

    def size(leaf: Any) -> int:
        width = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * width

    return float(sum(size(leaf) for leaf in jax.tree.leaves(tree)))


def _overflow(message: str) -> float | None:
    """Bytes that the compiler would have needed, from its message that memory doesn't suffice."""
    for pattern in (
        r"Used ([0-9.]+)([KMGT]?) of [0-9.]+[KMGT]? hbm",
        r"total memory required[^(]*\(([0-9.]+)([KMGT]?)\)",
    ):
        if used := re.search(pattern, message):
            return float(used.group(1)) * 2.0 ** (10 * " KMGT".index(used.group(2) or " "))
    return None


def _devices(topology: Topology) -> list[Any]:
    if topology.is_tpu:
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(
                f"The TPU's compiler is not installed, so nothing can be compiled for {topology.name}: pip install "
                "libtpu (best into a virtual environment of its own), or plan for --devices 8 simulated ones."
            )
        from jax.experimental import topologies

        assert topology.chip is not None
        layout = {"chip_config_name": topology.chip.layout} if topology.chip.layout else {}
        return list(topologies.get_topology_desc(topology.name, platform="tpu", **layout).devices)
    if topology.kind != "cpu":
        raise UserError(
            f"Nothing can be compiled for {topology.name} without such a chip: estimate it by arithmetic."
        )
    found = jax.devices("cpu")
    if len(found) < topology.count:
        raise UserError(
            f"{topology.count} simulated devices were asked for and JAX had started with {len(found)}: set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={topology.count} first."
        )
    return found[: topology.count]
