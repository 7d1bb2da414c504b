"""Devices: the mesh, and the one table that maps axis letters to its axes.

Model code names axes by letter and knows no device; on one device every sharding here is trivial.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sora_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor", "sequence")

# A letter that is absent here is whole on every device.
LETTER_AXES: dict[str, str | tuple[str, ...]] = {
    "B": ("data", "fsdp"),
    "N": "sequence",
    "H": "tensor",
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis of the mesh; one of them may be -1: the rest of the devices.

    Attributes:
      data: copies of the model, each with rows of its own.
      fsdp: rows are split over it too, and so is each parameter (ZeRO-3).
      tensor: attention heads and hidden widths are to be split over it; no model does so yet.
      sequence: the token slots of a row are to be split over it; no model does so yet.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Lays the devices (default: all) out as a mesh.

    Raises:
      UserError: the sizes don't multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    written = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 for size in sizes.values() if size != -1):
        raise UserError(
            f"The mesh ({written}) needs positive sizes, at most one of which may be -1 (the rest)."
        )
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    if free and len(devices) % known == 0:
        sizes[free[0]] = len(devices) // known
    if int(np.prod(list(sizes.values()))) != len(devices):
        raise UserError(
            f"The mesh ({written}) asks for {'a multiple of ' if free else ''}{known} devices and this "
            f"machine has {len(devices)}: change config.mesh, for example data=-1 for all that are left."
        )
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, (AxisType.Auto,) * len(MESH_AXES), devices=devices)


def spec(letters: str) -> PartitionSpec:
    """The partition of an array whose axes are named by `letters`, such as "BND"."""
    return PartitionSpec(*(LETTER_AXES.get(letter) for letter in letters))


def sharding(mesh: Mesh, letters: str) -> NamedSharding:
    """How an array whose axes are named by `letters` lies on `mesh`; "" is a copy on every device."""
    return NamedSharding(mesh, spec(letters))


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """Pins `x` to the sharding of its letters, inside jit; does nothing where no mesh is set."""
    if len(letters) != x.ndim:
        raise ValueError(f"{letters!r} names {len(letters)} axes and the array has {x.ndim}.")
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(letters))


def by_rows(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """`function` of arrays whose first axis is B, each device with rows of its own; plainly where no mesh is set.

    For what the compiler can't split by itself (kernels), or splits badly (loops over what rows hold). Nothing may
    pass from row to row. Rows that can't be dealt out evenly are done by every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return function(*arrays)
    even = arrays[0].shape[0] % math.prod(mesh.shape[axis] for axis in LETTER_AXES["B"]) == 0
    rows = spec("B") if even else PartitionSpec()
    return jax.shard_map(function, in_specs=(rows,) * len(arrays), out_specs=rows, check_vma=False)(*arrays)


def parameter_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Splits a parameter over `fsdp` along its longest axis that divides evenly; otherwise copies it."""
    parts = mesh.shape["fsdp"]
    axes = [axis for axis, size in enumerate(shape) if size % parts == 0 and size >= parts]
    if parts == 1 or not axes:
        return NamedSharding(mesh, PartitionSpec())
    longest = max(axes, key=lambda axis: shape[axis])
    return NamedSharding(
        mesh, PartitionSpec(*(["fsdp" if axis == longest else None for axis in range(longest + 1)]))
    )


def place_rows(mesh: Mesh, batch: Any) -> Any:
    """Puts this process's rows (numpy leaves, first axis B) on its devices, as one global array each.

    Raises:
      UserError: the rows don't divide over the devices.
    """
    rows, parts = sharding(mesh, "B"), mesh.shape["data"] * mesh.shape["fsdp"]

    def place(leaf: np.ndarray) -> jax.Array:
        count = leaf.shape[0] * jax.process_count()
        if count % parts:
            raise UserError(
                f"A batch of {count} rows doesn't divide over data x fsdp = {parts} devices: make the rows "
                "a multiple of it, or change config.mesh."
            )
        return jax.make_array_from_process_local_data(rows, leaf)

    return jax.tree.map(place, batch)
