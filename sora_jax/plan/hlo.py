"""A compiled program, read and counted: operations, bytes of memory, collectives; each as often as its loops run it.

XLA's own `cost_analysis` counts the body of a loop once, and a transformer's layers are a loop. So the program's text
is read: its computations, who calls whom how often, and what each instruction costs by XLA's own conventions. What
kernels written by hand (Pallas) do can't be read there: they are named, and their caller counts them.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

from sora_jax.plan.hlo_text import Instruction, read, size

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# These move nothing by themselves.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
    *("after-all", "opt-barrier", "partition-id", "replica-id", "async-update", "iota"),
}
_CALLED = re.compile(
    r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)|"
    r"(?:branch_computations|called_computations)=\{([^}]*)\}"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a program, and what it costs each device.

    Attributes:
      kind: of `COLLECTIVES`.
      devices: that take part together.
      bytes: that a device sends, once, where devices form a ring: of an all-gather of n bytes among p devices
        n (p - 1) / p, of an all-reduce twice that.
      times: how often the program runs it.
    """

    kind: str
    devices: int
    bytes: float
    times: int


class Program:
    """What the text of a program (`Compiled.as_text()`) says, for one device.

    Args:
      text: of the program, as XLA prints it, before or after it is compiled.
      devices: in all, for collectives that name no groups.
    """

    def __init__(self, text: str, devices: int = 1) -> None:
        self.devices = devices
        self.computations, self.entry = read(text)
        self.times: collections.Counter[str] = collections.Counter()
        self.fused: set[str] = set()
        self._count(self.entry, 1)

    def _count(self, name: str, times: int) -> None:
        self.times[name] += times
        for one in self.computations[name].values():
            if one.opcode in (
                "all-reduce",
                "reduce-scatter",
                "reduce",
                "scatter",
                "sort",
                "reduce-window",
                "map",
            ):
                continue  # what they apply to pairs of numbers is part of them
            for called in _called(one):
                if called not in self.computations:
                    continue
                if one.opcode == "fusion" or name in self.fused:
                    self.fused.add(called)
                self._count(called, times * (self._trips(one) if one.opcode == "while" else 1))

    def _trips(self, loop: Instruction) -> int:
        """How often a loop runs: told by XLA, or the constant that its condition compares with; else 1."""
        told = re.search(r'known_trip_count[^0-9]*"?n"?[^0-9]*(\d+)', loop.rest)
        if told:
            return int(told.group(1))
        condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
        lines = self.computations.get(condition.group(1), {}) if condition else {}
        numbers = [
            int(one.rest.split(")")[0])
            for one in lines.values()
            if one.opcode == "constant"
            and one.arrays[0].dtype in ("s32", "u32", "s64")
            and not one.arrays[0].dims
        ]
        return numbers[0] if len(numbers) == 1 else 1

    def _every(self) -> Iterator[tuple[str, dict[str, Instruction], Instruction]]:
        for name in self.times:
            for one in self.computations[name].values():
                yield name, self.computations[name], one

    @functools.cached_property
    def flops(self) -> float:
        """Of matrix products and convolutions, two for each multiplication and addition."""
        return sum(
            self.times[name] * _flops(one, where)
            for name, where, one in self._every()
            if one.opcode in ("dot", "convolution")
        )

    @functools.cached_property
    def bytes(self) -> float:
        """Read from memory and written to it: what each instruction or fusion of them takes and gives."""
        return sum(
            self.times[name] * self._traffic(one, where)
            for name, where, one in self._every()
            if name not in self.fused
        )

    @functools.cached_property
    def collectives(self) -> list[Collective]:
        """All of them, those inside of fusions too."""
        found, seen = [], set()
        for name, where, one in self._every():
            kind = one.opcode.removesuffix("-start")
            if kind not in COLLECTIVES or one.opcode.endswith("-done"):
                continue
            channel = re.search(r"channel_id=(\d+)", one.rest)
            if name in self.fused and channel:
                # A TPU's asynchronous collective stands in each of the fusions that run while it is under way.
                if (kind, channel.group()) in seen:
                    continue
                seen.add((kind, channel.group()))
            given = size(
                array for operand in one.operands if operand in where for array in where[operand].arrays
            )
            group = _group(one.rest) or self.devices
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # a TPU's: an all-reduce of which each device keeps its part
            share = (group - 1) / group
            moved = {
                "all-reduce": 2 * given * share,
                "all-gather": given * (group - 1),
                "collective-permute": given,
            }
            cost = moved.get(kind, given * share)
            if group > 1:
                found.append(Collective(kind, group, cost, self.times[name]))
        return found

    @functools.cached_property
    def kernels(self) -> dict[str, int]:
        """How often each kind of kernel that isn't XLA's own runs."""
        found: collections.Counter[str] = collections.Counter()
        for name, _, one in self._every():
            target = re.search(r'custom_call_target="([^"]*)"', one.rest)
            if (
                one.opcode == "custom-call"
                and target
                and target.group(1) in ("tpu_custom_call", "__gpu$xla.gpu.triton")
            ):
                found[target.group(1)] += self.times[name]
        return dict(found)

    def _traffic(self, one: Instruction, where: dict[str, Instruction]) -> float:
        if (
            one.opcode in _FREE
            or one.opcode.endswith("-done")
            or one.opcode.removesuffix("-start") in COLLECTIVES
        ):
            return 0.0
        if one.opcode == "custom-call" and "tpu_custom_call" not in one.rest:
            return 0.0
        operands = [where[operand] for operand in one.operands if operand in where]
        if one.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * one.bytes
        if one.opcode in ("dynamic-update-slice", "scatter"):
            return 2 * operands[-1 if one.opcode == "scatter" else 1].bytes
        called = next(iter(_called(one)), None)
        if one.opcode != "fusion" or called not in self.computations:
            return one.bytes + sum(operand.bytes for operand in operands)
        inside = self.computations[called]
        read = [min(operand.bytes, _read_of(inside, place)) for place, operand in enumerate(operands)]
        return min(one.bytes, _written(inside)) + sum(read)


def _called(one: Instruction) -> list[str]:
    names = []
    for single, several in _CALLED.findall(one.rest):
        names += [single] if single else re.findall(r"[\w.\-]+", several.replace("%", ""))
    return names


def _group(rest: str) -> int | None:
    """Devices that take part in a collective together, as its line says."""
    if listed := re.search(r"replica_groups=\{\{([0-9,]*)\}", rest):
        return listed.group(1).count(",") + 1
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(tiled.group(2))
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named.group(2)) if axis in sizes)
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", rest)
    return pairs.group(1).count("{") if pairs else None


def _flops(one: Instruction, where: dict[str, Instruction]) -> float:
    left, right = (where[operand].arrays[0].dims for operand in one.operands[:2])
    out = one.arrays[0].dims
    if one.opcode == "dot":
        named = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", one.rest)
        axes = [int(axis) for axis in named.group(1).split(",") if axis] if named else []
        return 2.0 * math.prod(out) * math.prod(left[axis] for axis in axes)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    assert labels, one.rest
    of_input, of_kernel, of_output = labels.groups()
    taps = 1.0  # valid pairs of a place of the result and a tap, over all axes of space
    for axis in (letter for letter in of_output if letter.isdigit()):
        sizes = (
            dims[names.index(axis)]
            for dims, names in ((out, of_output), (right, of_kernel), (left, of_input))
        )
        taps *= _valid(one.rest, int(axis), *sizes)
    plain = out[of_output.index("b")] * out[of_output.index("f")] * right[of_kernel.index("i")]
    groups = re.search(r"batch_group_count=(\d+)", one.rest)
    return 2.0 * plain * taps / (int(groups.group(1)) if groups else 1)


def _valid(rest: str, axis: int, out: int, kernel: int, given: int) -> int:
    """How many pairs of a place and a tap meet a number of the input, not padding nor the gaps of a dilation."""
    window = re.search(r"window=\{([^}]*)\}", rest)
    settings = dict(part.split("=") for part in window.group(1).split()) if window else {}

    def setting(name: str, default: str) -> str:
        return settings[name].split("x")[axis] if name in settings else default

    low = int(setting("pad", "0_0").split("_")[0])
    stride, between, spread = (int(setting(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    if stride == between == spread == 1 and low == 0 and kernel == 1:
        return out
    place = np.arange(out)[:, None] * stride + np.arange(kernel) * spread - low
    return int(((place >= 0) & (place <= (given - 1) * between) & (place % between == 0)).sum())


def _through(inside: dict[str, Instruction], name: str) -> list[tuple[Instruction, str]]:
    """Who uses a value, looking through those that only rename it; and under which name."""
    users = []
    for one in inside.values():
        if name in one.operands:
            users += _through(inside, one.name) if one.opcode == "bitcast" else [(one, name)]
    return users


def _read_of(inside: dict[str, Instruction], place: int) -> float:
    """Bytes that a fusion reads of its operand at `place`: only the slices, where it takes slices alone."""
    own = next(
        (one for one in inside.values() if one.opcode == "parameter" and one.rest.startswith(f"{place})")),
        None,
    )
    users = _through(inside, own.name) if own else []
    read = 0.0
    for one, name in users:
        if one.opcode in ("dynamic-slice", "slice", "gather") and one.operands[0] == name:
            read += size(one.arrays)
        elif one.opcode == "dynamic-update-slice" and one.operands[0] == name:
            read += 0.0  # written in place, see `_written`
        else:
            return math.inf
    return read if users else math.inf


def _written(inside: dict[str, Instruction]) -> float:
    """Bytes that a fusion writes: only the updates, where its results are arrays updated in place."""
    written = 0.0
    last = list(inside.values())[-1]
    results = [inside[name] for name in last.operands] if last.opcode == "tuple" else [last]
    for one in results:
        while one.opcode == "bitcast" and one.operands:
            one = inside[one.operands[0]]
        if one.opcode == "dynamic-update-slice" and one.operands[1] in inside:
            one = inside[one.operands[1]]
        written += one.bytes
    return written
