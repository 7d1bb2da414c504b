"""Devices: the mesh, and the one table that maps axis letters to its axes.

Model code names axes by letter, never devices; on one device every sharding here is trivial.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sora_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor", "sequence")

# A letter that is absent here is whole on every device.
LETTER_AXES: dict[str, str | tuple[str, ...]] = {
    "B": ("data", "fsdp"),
    "N": "sequence",
    "H": "tensor",
    "W": "tensor",
}
# In attention sequences are whole and a device has some of the heads instead (DeepSpeed-Ulysses, Jacobs et al. 2023),
# by all-to-alls; or sequences stay split, and keys are exchanged in a ring (`models/attention/ring.py`).
HEADS = ("tensor", "sequence")
# Parameters, their averages and the optimizer's moments are sharded over all of these (ZeRO-3).
PARAM_AXES = ("tensor", "fsdp", "sequence")
HOST_MEMORY = "pinned_host"


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis of the mesh; one of them may be -1: the rest of the devices.

    Attributes:
      data: copies of the model, each with its own part of the batch.
      fsdp: the batch is split over it too, and so is each parameter (ZeRO-3).
      tensor: attention heads and the hidden widths of MLPs are split over it.
      sequence: the token positions of a sequence are split over it.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1

    def sizes(self, devices: int) -> dict[str, int]:
        """The size of each axis with so many devices.

        Raises:
          UserError: the sizes don't multiply to that.
        """
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        written = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        free = [axis for axis, size in sizes.items() if size == -1]
        if len(free) > 1 or any(size < 1 for size in sizes.values() if size != -1):
            raise UserError(
                f"The mesh ({written}) needs positive sizes, at most one of which may be -1 (the rest)."
            )
        known = math.prod(size for size in sizes.values() if size != -1)
        if free and devices % known == 0:
            sizes[free[0]] = devices // known
        if math.prod(sizes.values()) != devices:
            raise UserError(
                f"The mesh ({written}) needs {'a multiple of ' if free else ''}{known} devices and there are "
                f"{devices}: change config.mesh, for example data=-1 for all that are left."
            )
        return sizes


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Arranges the devices (default: all) as a mesh.

    Raises:
      UserError: the sizes don't multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = tuple(config.sizes(len(devices)).values())
    # Not jax.make_mesh: that refuses sizes that divide an axis of the chips' own torus.
    array = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(array, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def platform() -> str:
    """What programs are for, "cpu", "gpu" or "tpu": the devices of the current mesh, which may not be attached."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def spec(letters: str) -> PartitionSpec:
    """The partition of an array whose axes are named by `letters`, such as "BND"."""
    return PartitionSpec(*(LETTER_AXES.get(letter) for letter in letters))


def sharding(mesh: Mesh, letters: str) -> NamedSharding:
    """The sharding on `mesh` of an array whose axes are named by `letters`; "" is replicated."""
    return NamedSharding(mesh, spec(letters))


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """Constrains `x` to the sharding of its letters, inside jit; does nothing where no mesh is set."""
    if len(letters) != x.ndim:
        raise ValueError(f"{letters!r} names {len(letters)} axes and the array has {x.ndim}.")
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(letters))


def gather_kernel(kernel: jax.Array, shape: tuple[int, ...], letters: str) -> jax.Array:
    """A matrix [in, out], from its `parameter_sharding` to `shape`, sharded as its letters say."""
    split = any(LETTER_AXES.get(letter) == PARAM_AXES[0] for letter in letters)
    if split and not jax.sharding.get_abstract_mesh().empty:
        # First over that axis alone: from there any other letter takes one collective.
        kernel = jax.lax.with_sharding_constraint(kernel, PartitionSpec(PARAM_AXES[0]))
    return constrain(kernel.reshape(shape), letters)


def ulysses(function: Callable[..., jax.Array], *given: jax.Array) -> jax.Array:
    """`function` of these under `shard_map`, each device with sequences and heads of its own; as it is without a mesh.

    For what the compiler can't partition (kernels), or partitions badly (loops over the contents of sequences). It must
    not mix sequences or heads. A batch that can't be split evenly is computed by every device.

    Args:
      given: what it takes: queries, keys and values [B,N,H,F], segment ids [B,N].

    Raises:
      UserError: tensor x sequence devices don't divide the heads.
    """
    return _shard_attention(function, None, HEADS, given)


def ring_parallel(function: Callable[..., jax.Array], *given: jax.Array) -> jax.Array:
    """As `ulysses`, but each device has positions of its own, with some of the heads where `tensor` splits them.

    `function` communicates with the other devices along `sequence`.

    Raises:
      UserError: `tensor` devices don't divide the heads.
    """
    return _shard_attention(function, LETTER_AXES["N"], LETTER_AXES["H"], given)


def _shard_attention(
    function: Callable[..., jax.Array],
    positions: str | tuple[str, ...] | None,
    heads: str | tuple[str, ...],
    given: tuple[jax.Array, ...],
) -> jax.Array:
    mesh, q_bnhf = jax.sharding.get_abstract_mesh(), given[0]
    if mesh.size <= 1:
        return function(*given)
    check_heads(q_bnhf.shape[2], heads)
    batch_axes = LETTER_AXES["B"] if q_bnhf.shape[0] % _parts(mesh, LETTER_AXES["B"]) == 0 else None
    split, ids = PartitionSpec(batch_axes, positions, heads), PartitionSpec(batch_axes, positions)
    dealt = jax.shard_map(function, in_specs=(split, split, split, ids), out_specs=split, check_vma=False)
    return dealt(*given)


def sequence_is_split() -> bool:
    """Whether the mesh that is set splits sequences over devices."""
    return _parts(jax.sharding.get_abstract_mesh(), LETTER_AXES["N"]) > 1


def check_heads(heads: int, over: str | tuple[str, ...] = HEADS) -> None:
    """Raises UserError where the mesh that is set can't split so many heads over these of its axes."""
    mesh, axes = jax.sharding.get_abstract_mesh(), _axes(over)
    parts = _parts(mesh, axes)
    if heads % parts:
        fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        product = " x ".join(f"config.mesh.{axis}" for axis in axes)
        others = ", or set dit.sequence='ring', which splits heads over tensor alone" if over == HEADS else ""
        raise UserError(
            f"A model of {heads} heads can't be split over {' x '.join(axes)} = {parts} devices: make {product} "
            f"one of {fitting}{others}."
        )


def check_sequence_split(patches: int, text: int) -> None:
    """Raises UserError where the mesh that is set can't split a sequence of so many positions for patches and text."""
    parts = _parts(jax.sharding.get_abstract_mesh(), LETTER_AXES["N"])
    if patches % parts or text % parts:
        raise UserError(
            f"Sequences of {patches} positions for patches and {text} for text can't be split over sequence = "
            f"{parts} devices: make both multiples of {parts}, such as {_round_up(patches, parts)} and "
            f"{_round_up(text, parts)} (config.pipeline.seq_len and text_len), or change config.mesh.sequence."
        )


def _round_up(count: int, parts: int) -> int:
    return -(-count // parts) * parts


def parameter_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """The stored sharding of a parameter: one of its axes split over as many axes of `PARAM_AXES` as divide it.

    Of a matrix that is the input axis, where possible: from it the compiler gathers what the result's letters split.
    """

    def over(size: int) -> tuple[str, ...]:
        found: tuple[str, ...] = ()
        for name in PARAM_AXES:
            if mesh.shape[name] > 1 and size % _parts(mesh, (*found, name)) == 0:
                found = (*found, name)
        return found

    worth = [
        (_parts(mesh, over(size)), axis == len(shape) - 2, size, axis) for axis, size in enumerate(shape)
    ]
    parts, _, size, axis = max(worth, default=(1, False, 0, 0))
    if parts == 1:
        return NamedSharding(mesh, PartitionSpec())
    names = over(size)
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, names if len(names) > 1 else names[0]))


def parameter_shardings(mesh: Mesh, tree: Any) -> Any:
    """`parameter_sharding` of each leaf of a pytree of arrays, or of shapes."""
    return jax.tree.map(lambda leaf: parameter_sharding(mesh, leaf.shape), tree)


def _axes(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _parts(mesh: Any, axes: str | tuple[str, ...]) -> int:
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in _axes(axes))


def on_host(shardings: Any) -> Any:
    """The same shardings in the memory of the devices' host, from where `to_device` copies arrays inside jit.

    Raises:
      UserError: these devices have no such memory.
    """
    device = jax.local_devices()[0]
    if HOST_MEMORY not in {memory.kind for memory in device.addressable_memories()}:
        raise UserError(
            f"The optimizer's state can't be kept on the host: devices of kind {device.device_kind!r} have no "
            f"{HOST_MEMORY} memory; set config.optim.offload=False."
        )
    return jax.tree.map(lambda kept: kept.with_memory_kind(HOST_MEMORY), shardings)


def to_device(tree: Any) -> Any:
    """Arrays in the devices' own memory, inside jit; those already there are returned unchanged."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), tree)


@dataclasses.dataclass(frozen=True)
class Share:
    """Which part of the batch each process has on its devices; by default one process has all of it.

    Attributes:
      held: for each process, which of `parts` equal parts of the batch; several may hold the same ones.
      parts: into how many the mesh splits the batch.
      process: this process's index in `held`.
    """

    held: tuple[tuple[int, ...], ...] = ((0,),)
    parts: int = 1
    process: int = 0

    @property
    def copies(self) -> float:
        """How many processes hold each sequence."""
        return sum(map(len, self.held)) / self.parts

    def assign(self, shards: int, name: str = "shards") -> tuple[int, ...]:
        """This process's of `shards` equal shards of the batch: those that make up what its devices hold.

        Args:
          name: the configuration's key, for the error.

        Raises:
          UserError: some process holds a piece of a shard.
        """
        assigned = [self._within(held, shards) for held in self.held]
        if any(len(own) * self.parts != len(held) * shards for own, held in zip(assigned, self.held)):
            fit = [str(count) for count in range(1, shards + 1) if shards % count == 0]
            raise UserError(
                f"The data of this run are in {name}={shards} shards, which can't be split over the {len(self.held)} "
                f"hosts of this mesh: use {' or '.join(fit)} of them, each with a part of data x fsdp of its "
                f"own; or start another run with {name} a multiple of {self._fewest()}."
            )
        return assigned[self.process]

    def _fewest(self) -> int:
        def fits(shards: int) -> bool:
            return all(
                len(self._within(held, shards)) * self.parts == len(held) * shards for held in self.held
            )

        return next(shards for shards in range(1, self.parts + 1) if fits(shards))

    def _within(self, held: tuple[int, ...], shards: int) -> tuple[int, ...]:
        """The shards that are wholly in the parts `held`."""

        def parts(shard: int) -> range:
            return range(shard * self.parts // shards, -(-(shard + 1) * self.parts // shards))

        return tuple(shard for shard in range(shards) if set(parts(shard)) <= set(held))


WHOLE = Share()


def batch_share(mesh: Mesh) -> Share:
    """Which parts of a batch are on which process's devices."""
    parts = _parts(mesh, LETTER_AXES["B"])
    owners = [{device.process_index for device in row} for row in mesh.devices.reshape(parts, -1)]
    processes = sorted(set().union(*owners))
    held = tuple(tuple(part for part in range(parts) if process in owners[part]) for process in processes)
    return Share(held, parts, processes.index(jax.process_index()))


def place_batch(mesh: Mesh, batch: Any) -> Any:
    """Puts this process's part of a batch (numpy leaves, first axis B) on its devices, as one global array each.

    Args:
      batch: the part that `batch_share` says this process holds, in its order in the global batch.

    Raises:
      UserError: the batch doesn't divide over the devices.
    """
    share, batch_axes = batch_share(mesh), sharding(mesh, "B")
    own = share.held[share.process]

    def place(leaf: np.ndarray) -> jax.Array:
        count, rest = divmod(leaf.shape[0] * share.parts, len(own))
        if rest or count % share.parts:
            raise UserError(
                f"A batch of {count} doesn't divide over data x fsdp = {share.parts} devices: make batch_size "
                "a multiple of it, or change config.mesh."
            )
        if len(own) == share.parts:
            return jax.make_array_from_process_local_data(batch_axes, leaf, leaf.shape)
        a_part = count // share.parts

        def piece(index: tuple[slice, ...]) -> np.ndarray:
            first = own.index((index[0].start or 0) // a_part) * a_part
            return leaf[first : first + a_part]

        return jax.make_array_from_callback((count, *leaf.shape[1:]), batch_axes, piece)

    return jax.tree.map(place, batch)
