"""Chips and the slices that are offered, for the planner and the log of a run.

Speeds, memory and links of TPUs are Google's (docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and /tpu7x), of GPUs
NVIDIA's (data sheets of the A100 80GB SXM, H100 SXM and H200 SXM), read in November 2026. Between GPUs' machines a
network card of 400 Gbit/s a GPU is taken, of 200 for the A100. Prices change and differ by region and contract:
`--price` overrides them.

Slices: the pages of v5e and v6e list theirs. Those of v4 say AxBxC with A <= B <= C, each up to four or a multiple of
four; v5p's and tpu7x's list the same up to the largest job. libtpu 0.0.52 accepts more (v5e:32x32) and sees v4 and
tpu7x as two devices a chip; v4's machines join its two cores to one device, which libtpu calls "megacore".
"""

from __future__ import annotations

import dataclasses
import itertools
import math

from sora_jax.errors import UserError, nearest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of chip. All figures but `dollars` are those of a device, which is what programs see: a chip or a part.

    Attributes:
      kinds: how `jax.Device.device_kind` begins.
      flops: dense bfloat16 multiply-adds at best, times two, a second.
      memory: bytes that programs may use.
      bandwidth: bytes a second between memory and chip.
      network: bytes a second to other chips, out of a chip, over all its links (a torus' links, NVLink).
      dollars: an hour of a chip.
      price: where that is from.
      slices: that are offered, AxB or AxBxC, by number of chips; empty: any number of chips.
      machine, across: of GPUs, how many share those links, and bytes a second out of a chip to other machines.
      devices: of a chip.
      layout: libtpu's name for how a chip's cores are joined, where it isn't the default.
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
    devices: int = 1
    layout: str = ""

    def links(self, count: int) -> float:
        """Bytes a second out of a device, among so many."""
        return self.across if self.machine and count > self.machine else self.network


def _cubes(most: int) -> tuple[str, ...]:
    """Slices of a 3-D torus of at most so many chips; of those with as many chips the nearest to a cube first."""
    sides = range(4, most // 16 + 1, 4)
    whole = [
        (a, b, c)
        for a, b in itertools.combinations_with_replacement(sides, 2)
        if a * b * b <= most
        for c in range(b, most // (a * b) + 1, 4)
    ]
    whole.sort(key=lambda one: (math.prod(one), sum(one)))
    return *_SMALL, *("x".join(map(str, one)) for one in whole)


_GOOGLE = "about Google Cloud's list price on demand, us regions, 2025: not looked up again, so look it up"
_UNKNOWN = "a guess: no list price was found, so look it up"
_CLOUDS = "about what GPU clouds asked on demand in 2025; they differ by half"
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
CHIPS = {
    "v4": Chip(("TPU v4",), 275e12, 32 * GIB, 1200e9, 300e9, 3.22, _GOOGLE, _cubes(4096), layout="megacore"),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 16 * GIB, 819e9, 200e9, 1.20, _GOOGLE, _SQUARES),
    "v5p": Chip(("TPU v5",), 459e12, 95 * GIB, 2765e9, 600e9, 4.20, _GOOGLE, _cubes(6144)),
    "v6e": Chip(("TPU v6",), 918e12, 32 * GIB, 1638e9, 400e9, 2.70, _GOOGLE, _SQUARES),
    # 2,307 TFLOP/s, 192 GiB, 7,380 GB/s and 600 GB/s out of a chip of two devices.
    "tpu7x": Chip(
        ("TPU7x", "TPU v7x"), 1153.5e12, 96 * GIB, 3690e9, 300e9, 12.00, _UNKNOWN, _cubes(9216), devices=2
    ),
    "a100": Chip(("NVIDIA A100",), 312e12, 80 * GIB, 2039e9, 300e9, 1.80, _CLOUDS, (), 8, 25e9),
    "h100": Chip(("NVIDIA H100 80GB HBM3",), 989e12, 80 * GIB, 3350e9, 450e9, 3.00, _CLOUDS, (), 8, 50e9),
    "h200": Chip(("NVIDIA H200",), 989e12, 141e9, 4800e9, 450e9, 3.80, _CLOUDS, (), 8, 50e9),
}
TPUS = tuple(name for name, chip in CHIPS.items() if chip.slices)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind: a TPU slice ("v5p:8x8x8"), so many GPUs ("h100:64"), or devices simulated here ("cpu:8").

    Attributes:
      name: as it is written.
      kind: a name of `CHIPS`, or "cpu".
      count: of devices, which are what programs see; most chips are one, tpu7x is two.
    """

    name: str
    kind: str
    count: int

    @property
    def chip(self) -> Chip | None:
        """Its kind of chip; None for simulated devices."""
        return CHIPS.get(self.kind)

    @property
    def chips(self) -> int:
        """Their number."""
        return self.count // (self.chip.devices if self.chip else 1)

    @property
    def is_tpu(self) -> bool:
        return self.kind in TPUS

    def of(self, count: int) -> Topology:
        """The first of its kind of at least so many devices; the largest, where there is none."""
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
        near = nearest(kind, CHIPS, 0.4)
        hint = f"did you mean {near}? " if near else ""
        raise UserError(
            f"No chip is called {kind!r}: {hint}There are {', '.join(CHIPS)}, written as v5p:8x8x8 or h100:64."
        )
    chip = CHIPS.get(kind)
    slices = chip.slices if chip else ()
    if slices and shape not in slices:
        raise UserError(
            f"There is no slice {shape or 'without a shape'} of {kind} chips: {_nearest(kind, shape)}; sora-jax plan "
            "--chips lists what there is."
        )
    if not slices and not (shape.isdecimal() and int(shape) > 0):
        raise UserError(f"{text!r} names no number of chips: write {kind}:8 for eight.")
    count = math.prod(int(side) for side in shape.split("x"))
    return Topology(f"{kind}:{shape}", kind, count * (chip.devices if chip else 1))


def describe_slices(chip: Chip) -> str:
    """Its slices, as text."""
    if not chip.slices:
        return "any number"
    if chip.slices == _SQUARES:
        return ", ".join(chip.slices)
    most = max(math.prod(map(int, shape.split("x"))) for shape in chip.slices)
    return f"{', '.join(_SMALL)}, and AxBxC of multiples of four, A <= B <= C, to {most:,} chips"


def _nearest(kind: str, shape: str) -> str:
    """The existing slices of fewer and of more chips nearest to one that doesn't exist."""
    slices, sides = CHIPS[kind].slices, shape.split("x")
    if not all(side.isdecimal() and 0 < int(side) < 10**6 for side in sides):
        return f"write one as {kind}:{slices[2]}"
    chips = lambda shape: math.prod(map(int, shape.split("x")))
    fewer = [one for one in slices if chips(one) <= chips(shape)]
    more = [one for one in slices if chips(one) >= chips(shape)]
    # Of those with as many chips the first, which is nearest to a cube.
    both = max(fewer, key=chips, default=""), min(more, key=chips, default="")
    near = dict.fromkeys(filter(None, both))
    return f"the nearest {'are' if len(near) > 1 else 'is'} {' and '.join(f'{kind}:{one}' for one in near)}"


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a device kind, if it is known."""
    return next((chip for chip in CHIPS.values() if device_kind.startswith(chip.kinds)), None)
