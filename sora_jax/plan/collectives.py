"""What devices exchange, read from the text of a compiled program (`compiled.as_text()`).

Counted is what the compiler wrote down, not what was measured: each collective with the bytes of its buffer on one
device, times how often the program runs it. A loop's trips are those that XLA prints (`known_trip_count`), or the bound
that its condition compares with, counting from 0 by 1 as `jax.lax.scan` does; of a loop that ends by what it computes
one trip is counted, and `known` is False. Of a conditional every branch is counted. A collective that TPUs run beside
other work is written several times, at its begin, middle and end, under one `chain_id`: it is counted once.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_OPERATION = re.compile(rf"^\s+(?:ROOT )?%?\S+ = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_CALLED = re.compile(r"(calls|body|condition|\w+_computations?|to_apply)=(\{[^}]*\}|%?[\w.-]+)")
_ARRAY = re.compile(r"\b([a-z]+\d*)\w*\[([\d,]*)\]")
_BITS = {"pred": 8, "token": 0, "opaque": 0}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of `KINDS`.
      bytes: of its buffer on one device: what is gathered, what is to be scattered, else what goes in.
      devices: that take part together: the size of a group, the length of a ring.
      times: how often a step runs it.
      known: whether `times` is; else it lies in a loop whose trips are counted as one.
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
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.bytes * (self.devices - 1) / self.devices


def collectives(hlo_text: str) -> list[Collective]:
    """All collectives of a compiled program."""
    computations = dict(_computations(hlo_text))
    entry = next(name for name, (first, _) in computations.items() if first)
    everyone = math.prod(
        int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", hlo_text.partition("\n")[0])
    )
    found, chains = [], set()
    for name, (times, known) in _times(computations, entry).items():
        for line in computations[name][1]:
            if not (match := _OPERATION.match(line)):
                continue
            written, kind, start = match.groups()
            if "chain_id=" in line:
                chain = tuple(re.findall(r'(?:chain_id="|channel_id=)(\d+)', line))
                if chain in chains:
                    continue
                chains.add(chain)
            devices = _group(line, everyone)
            size = _size(written)
            if kind == "collective-permute" and start:
                size //= 2  # what goes in and what comes out
            elif kind == "all-gather" and start:
                size = size * devices // (devices + 1)
            elif kind == "reduce-scatter":
                size *= devices
            elif kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # as TPUs write it: a sum of which each keeps a part
            found.append(Collective(kind, size, devices, times, known))
    return found


def totals(found: Iterable[Collective]) -> dict[str, tuple[int, int]]:
    """Of each kind that occurs, how many a step runs and the bytes of their buffers."""
    sums = dict.fromkeys(KINDS, (0, 0))
    for one in found:
        count, size = sums[one.kind]
        sums[one.kind] = count + one.times, size + one.times * one.bytes
    return {kind: total for kind, total in sums.items() if total[0]}


def _computations(text: str) -> Iterator[tuple[str, tuple[bool, list[str]]]]:
    """By name, whether it is the entry, and its lines."""
    lines: list[str] | None = None
    for line in text.splitlines():
        if lines is None:
            if match := _COMPUTATION.match(line):
                lines = []
                yield match[2], (bool(match[1]), lines)
        elif line == "}":  # alone: attributes of kernels have lines that begin with one
            lines = None
        else:
            lines.append(line)


def _times(computations: dict[str, tuple[bool, list[str]]], entry: str) -> dict[str, tuple[int, bool]]:
    """How often a step runs each computation that it reaches, and whether all trips are known."""
    calls: dict[str, list[tuple[str, int, bool]]] = collections.defaultdict(list)
    for name, (_, lines) in computations.items():
        for line in lines:
            if re.search(r" async-(?:done|update)\(", line):  # named again, begun once
                continue
            called = {key: re.findall(r"[\w.-]+", value) for key, value in _CALLED.findall(line)}
            trips = _trips(line, computations[called["condition"][0]][1]) if "body" in called else 1
            for other in itertools.chain(*called.values()):
                if other in computations:
                    calls[name].append((other, trips or 1, bool(trips)))
    order: dict[str, None] = {}

    def visit(name: str) -> None:
        if name not in order:
            for other, *_ in calls[name]:
                visit(other)
            order[name] = None

    visit(entry)
    times = dict.fromkeys(order, (0, True))
    times[entry] = 1, True
    for name in reversed(order):
        own, own_known = times[name]
        for other, trips, known in calls[name]:
            so_far, so_far_known = times[other]
            times[other] = so_far + own * trips, so_far_known and own_known and known
    return times


def _trips(line: str, condition: list[str]) -> int | None:
    """Of a loop; None if only its run can tell."""
    if match := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(match[1])
    constants = {
        m[1]: int(m[2])
        for text in condition
        if (m := re.search(r"%(\S+) = s32\[\]\S* constant\((\d+)\)", text))
    }
    root = next((text for text in condition if text.lstrip().startswith("ROOT")), "")
    bound = re.search(r" compare\(%\S+, %(\S+)\), direction=LT", root)
    return constants.get(bound[1]) if bound else None


def _group(line: str, everyone: int) -> int:
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        following = {int(a): int(b) for a, b in re.findall(r"(\d+),(\d+)", pairs[1])}
        at = begin = next(iter(following))
        for length in itertools.count(1):
            at = following.get(at, begin)
            if at == begin:
                return length
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        # A part of an axis is written 'axis':(before)size.
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if tiles := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
        return int(tiles[2])
    if groups := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return groups[1].count(",") + 1
    return everyone


def _size(written: str) -> int:
    """Bytes of a type such as "(f32[2,3]{1,0}, bf16[4])"; scalars are a start's own affair where arrays stand too."""
    arrays = [(kind, [int(n) for n in shape.split(",") if n]) for kind, shape in _ARRAY.findall(written)]
    arrays = [array for array in arrays if array[1]] or arrays
    return sum(_bits(kind) * math.prod(shape) // 8 for kind, shape in arrays)


def _bits(kind: str) -> int:
    return _BITS[kind] if kind in _BITS else int(re.sub(r"\D", "", kind))
