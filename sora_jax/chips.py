"""Chips and the slices of them that can be had: what the planner and the log of a run know of machines.

Speeds and memory are the vendors' (docs.cloud.google.com/tpu/docs/v5e, /v5p and /v6e; NVIDIA's data sheets of the
A100, H100 and H200; read in November 2026). Between GPUs' machines a network card of 400 Gbit/s a GPU is taken, of 200
for the A100. Prices change and differ by region and contract: `--price` overrides them.
"""

from __future__ import annotations

import dataclasses
import difflib
import math

from sora_jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, as programs see it: a device.

    Attributes:
      kinds: how `jax.Device.device_kind` begins.
      flops: dense bfloat16 multiply-adds at best, times two, a second.
      memory: bytes that programs may use.
      bandwidth: bytes a second between memory and chip.
      network: bytes a second to other chips, out of a chip, over all its links (a torus' links, NVLink).
      dollars: an hour.
      price: where that is from.
      slices: that can be had, AxB or AxBxC; empty: any number of chips.
      machine, across: of GPUs, how many share those links, and bytes a second out of a chip to other machines.
    """

    kinds: tuple[str, ...]
    flops: float
    memory: float
    bandwidth: float
    network: float
    dollars: float
    price: str
    slices: tuple[str, ...] = ()
    machine: int = 0
    across: float = 0.0

    def links(self, count: int) -> float:
        """Bytes a second out of a chip, among so many."""
        return self.across if self.machine and count > self.machine else self.network


_GOOGLE = "about Google Cloud's list price on demand, us regions, 2025: not looked up again, so look it up"
_CLOUDS = "about what GPU clouds asked on demand in 2025; they differ by half"
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    *("8x8x16", "8x16x16", "16x16x16", "16x16x24"),
)
CHIPS = {
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 16 * GIB, 819e9, 200e9, 1.20, _GOOGLE, _SQUARES),
    "v5p": Chip(("TPU v5",), 459e12, 95 * GIB, 2765e9, 600e9, 4.20, _GOOGLE, _CUBES),
    "v6e": Chip(("TPU v6",), 918e12, 32 * GIB, 1638e9, 400e9, 2.70, _GOOGLE, _SQUARES),
    "a100": Chip(("NVIDIA A100",), 312e12, 80 * GIB, 2039e9, 300e9, 1.80, _CLOUDS, (), 8, 25e9),
    "h100": Chip(("NVIDIA H100 80GB HBM3",), 989e12, 80 * GIB, 3350e9, 450e9, 3.00, _CLOUDS, (), 8, 50e9),
    "h200": Chip(("NVIDIA H200",), 989e12, 141e9, 4800e9, 450e9, 3.80, _CLOUDS, (), 8, 50e9),
}
# Measured against, and not planned for.
_OLDER = {"v4": Chip(("TPU v4",), 275e12, 32 * GIB, 1228e9, 300e9, 3.22, _GOOGLE)}
TPUS = tuple(name for name, chip in CHIPS.items() if chip.slices)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind: a TPU slice ("v5p:8x8x8"), so many GPUs ("h100:64"), or devices simulated here ("cpu:8").

    Attributes:
      name: as it is written.
      kind: a name of `CHIPS`, or "cpu".
      count: of chips.
    """

    name: str
    kind: str
    count: int

    @property
    def chip(self) -> Chip | None:
        """What is known of its chips; nothing of simulated ones."""
        return CHIPS.get(self.kind)

    @property
    def is_tpu(self) -> bool:
        return self.kind in TPUS

    def of(self, count: int) -> Topology:
        """The first of its kind of at least so many chips; the largest, where there is none."""
        chip = self.chip
        names = [f"{self.kind}:{shape}" for shape in chip.slices] if chip else []
        if not names:
            return Topology(f"{self.kind}:{count}", self.kind, count)
        every = [read_topology(name) for name in names]
        return next((one for one in every if one.count >= count), every[-1])


def read_topology(text: str) -> Topology:
    """A topology from how it is written.

    Raises:
      UserError: there is no such chip or slice; the sentence lists those that there are.
    """
    kind, _, shape = text.strip().lower().partition(":")
    if kind != "cpu" and kind not in CHIPS:
        near = difflib.get_close_matches(kind, CHIPS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"No chip is called {kind!r}: {hint}There are {', '.join(CHIPS)}, written as v5p:8x8x8 or h100:64."
        )
    slices = CHIPS[kind].slices if kind in CHIPS else ()
    if slices and shape not in slices:
        raise UserError(
            f"There is no slice {shape or 'without a shape'} of {kind} chips: those that there are are "
            f"{', '.join(f'{kind}:{one}' for one in slices)}."
        )
    if not slices and not (shape.isdecimal() and int(shape) > 0):
        raise UserError(f"{text!r} names no number of chips: write {kind}:8 for eight.")
    return Topology(f"{kind}:{shape}", kind, math.prod(int(side) for side in shape.split("x")))


def chip_of(device_kind: str) -> Chip | None:
    """What is known of a device, by its kind."""
    return next((chip for chip in (CHIPS | _OLDER).values() if device_kind.startswith(chip.kinds)), None)
