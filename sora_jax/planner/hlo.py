"""A compiled program, read and counted: operations, bytes of memory, collectives; each as often as its loops run it.

XLA's own `cost_analysis` counts the body of a loop once, and a transformer's layers are a loop. So the program's text
is read: its computations, which calls which how often, and what each instruction costs by XLA's own conventions. What
kernels written by hand (Pallas) do can't be read there: they are named, and their caller counts them.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator

import numpy as np

from sora_jax.planner.hlo_text import Computations, Instruction, read, size

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# These move nothing by themselves.
KERNELS = ("tpu_custom_call", "__gpu$xla.gpu.triton")
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
    *("after-all", "opt-barrier", "partition-id", "replica-id", "async-start", "async-update", "iota"),
}
_APPLYING = ("all-reduce", "reduce", "scatter", "sort", "map")
_CALLED = re.compile(
    r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)|"
    r"(?:branch_computations|called_computations)=\{([^}]*)\}"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a program.

    Attributes:
      kind: of `COLLECTIVES`.
      bytes: of its buffer on one device: what is gathered, what is to be scattered, else what goes in.
      devices: that take part together: the size of a group, the length of a ring.
      times: how often a step runs it.
      known: whether `times` is; else it is in a loop of unknown length, counted as one round.
    """

    kind: str
    bytes: int
    devices: int
    times: int
    known: bool = True

    @property
    def sent(self) -> float:
        """Bytes that leave a device each time, by the algorithms that send least (rings)."""
        if self.kind == "collective-permute":
            return float(self.bytes)
        return (2 if self.kind == "all-reduce" else 1) * self.bytes * (self.devices - 1) / self.devices


def totals(found: Iterable[Collective]) -> dict[str, tuple[int, int]]:
    """Of each kind that occurs, how many a step runs and the bytes of their buffers."""
    sums = dict.fromkeys(COLLECTIVES, (0, 0))
    for one in found:
        count, size = sums[one.kind]
        sums[one.kind] = count + one.times, size + one.times * one.bytes
    return {kind: total for kind, total in sums.items() if total[0]}


class Program:
    """What the text of a program (`Compiled.as_text()`) says, for one device.

    Args:
      text: of the program, as XLA prints it, before or after it is compiled.
    """

    def __init__(self, text: str) -> None:
        first = text.partition("\n")[0]
        counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", first)
        self.devices = math.prod(int(count) for count in counts)
        self.computations, self.entry = read(text)
        self.times: collections.Counter[str] = collections.Counter()
        self.fused: set[str] = set()
        self.guessed: set[str] = set()  # in loops whose trip count is unknown
        self._count(self.entry, 1, True)

    def _count(self, name: str, times: int, known: bool) -> None:
        self.times[name] += times
        if not known:
            self.guessed.add(name)
        for one in self.computations[name].values():
            # The functions of reductions are part of them; a "-done" names the computation of its "-start" again.
            if one.opcode.startswith(_APPLYING) or one.opcode in ("async-done", "async-update"):
                continue
            rounds = self._rounds(one) if one.opcode == "while" else 1
            for called in _called(one):
                if called not in self.computations:
                    continue
                if one.opcode == "fusion" or name in self.fused:
                    self.fused.add(called)
                self._count(called, times * (rounds or 1), known and rounds is not None)

    def _rounds(self, loop: Instruction) -> int | None:
        """Trip count of a loop: XLA's, or the bound that its condition compares with; else None."""
        if match := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(match.group(1))
        condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
        lines = self.computations.get(condition.group(1), {}) if condition else {}
        for one in lines.values():
            if one.opcode == "compare" and "direction=LT" in one.rest and one.operands[1] in lines:
                bound = lines[one.operands[1]]
                if bound.opcode == "constant":
                    return int(bound.rest.split(")")[0])
        return None

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
        """Read from memory and written to it: operands and results of each instruction or fusion."""
        return sum(
            self.times[name] * self._traffic(one, where)
            for name, where, one in self._every()
            if name not in self.fused
        )

    @functools.cached_property
    def collectives(self) -> list[Collective]:
        """All of them, also inside of fusions."""
        found, chains = [], set()
        for name, _, one in self._every():
            kind = one.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            if "chain_id=" in one.rest:
                # A TPU's asynchronous collective is listed at its begin, in its middle and at its end.
                chain = tuple(re.findall(r'(?:chain_id="|channel_id=)(\d+)', one.rest))
                if chain in chains:
                    continue
                chains.add(chain)
            devices = _group(one.rest) or self.devices
            buffer = size(array for array in one.arrays if array.dims) or size(one.arrays)
            if one.opcode == "collective-permute-start":
                buffer /= 2  # what goes in and what comes out
            elif one.opcode == "all-gather-start":
                buffer *= devices / (devices + 1)
            elif kind == "reduce-scatter":
                buffer *= devices
            elif kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # as TPUs write it: a sum of which each keeps a part
            found.append(Collective(kind, round(buffer), devices, self.times[name], name not in self.guessed))
        return found

    @functools.cached_property
    def kernels(self) -> dict[str, int]:
        """How often each kind of kernel that isn't XLA's own runs."""
        found: collections.Counter[str] = collections.Counter()
        for name, _, one in self._every():
            target = re.search(r'custom_call_target="([^"]*)"', one.rest)
            if one.opcode == "custom-call" and target and target.group(1) in KERNELS:
                found[target.group(1)] += self.times[name]
        return dict(found)

    def _traffic(self, one: Instruction, where: dict[str, Instruction]) -> float:
        is_collective = one.opcode.removesuffix("-start") in COLLECTIVES
        if is_collective or one.opcode in _FREE or one.opcode.endswith("-done"):
            return 0.0
        if one.opcode == "custom-call" and "tpu_custom_call" not in one.rest:
            return 0.0
        operands = [where[operand] for operand in one.operands if operand in where]
        if one.opcode == "copy-start":  # a TPU's, between its memories: into the first of its results
            return size(array for array in (one.arrays[0], operands[0].arrays[0]) if not array.near)
        if one.opcode in ("slice-start", "dynamic-slice-start"):  # what is taken stands second
            taken = one.arrays[1]
            return taken.bytes * ((not taken.near) + (not operands[0].arrays[0].near))
        if one.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * one.bytes
        if one.opcode in ("dynamic-update-slice", "scatter"):
            return 2 * operands[-1 if one.opcode == "scatter" else 1].bytes
        called = next(iter(_called(one)), None)
        if one.opcode != "fusion" or called not in self.computations:
            return one.bytes + sum(operand.bytes for operand in operands)
        inside = self.computations[called]
        read = [
            min(operand.bytes, _read_of(self.computations, inside, place))
            for place, operand in enumerate(operands)
        ]
        return min(one.bytes, _written(inside)) + sum(read)


def _called(one: Instruction) -> list[str]:
    names = []
    for single, several in _CALLED.findall(one.rest):
        names += [single] if single else re.findall(r"[\w.\-]+", several.replace("%", ""))
    return names


def _group(rest: str) -> int | None:
    """Devices that take part in a collective together, as its line says."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        following = dict(re.findall(r"(\d+),(\d+)", pairs.group(1)))
        begin = at = next(iter(following))
        for length in itertools.count(1):
            at = following.get(at, begin)
            if at == begin:
                return length
    if named := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named.group(1)))
        # A part of an axis is written 'axis':(before)size.
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named.group(2))
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
        return int(tiled.group(2))
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    return listed.group(1).count(",") + 1 if listed else None


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
    """Users of a value, looking through those that only rename it; and under which name."""
    users = []
    for one in inside.values():
        if name in one.operands:
            users += _through(inside, one.name) if one.opcode == "bitcast" else [(one, name)]
    return users


def _read_of(computations: Computations, inside: dict[str, Instruction], place: int) -> float:
    """Bytes that a fusion reads of its operand at `place`: only the slices, where it takes slices alone."""
    parameters = (one for one in inside.values() if one.opcode == "parameter")
    own = next((one for one in parameters if one.rest.startswith(f"{place})")), None)
    users = _through(inside, own.name) if own else []
    read = 0.0
    for one, name in users:
        if one.opcode in ("dynamic-slice", "slice", "gather") and one.operands[0] == name:
            read += size(one.arrays)
        elif one.opcode == "dynamic-update-slice" and one.operands[0] == name:
            read += 0.0  # written in place, see `_written`
        elif one.opcode == "fusion":
            read += _read_of(computations, computations[_called(one)[0]], one.operands.index(name))
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
