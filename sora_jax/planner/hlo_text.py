"""The text of a program, as XLA prints it before or after it is compiled, taken apart into instructions."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable

_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_SHAPE = re.compile(r"([a-z]+[0-9a-z]*)\[([0-9,]*)\](\{[^}]*\})?")


@dataclasses.dataclass(frozen=True)
class Array:
    """A shape with its type.

    Attributes:
      near: whether it is in a TPU's on-chip memory, S(1), so that reading it costs no bandwidth.
    """

    dtype: str
    dims: tuple[int, ...]
    near: bool = False

    @property
    def bytes(self) -> float:
        width = re.search(r"\d+", self.dtype)
        bits = _BITS.get(self.dtype, int(width.group()) if width else 8)
        return math.prod(self.dims) * bits / 8


def size(arrays: Iterable[Array]) -> float:
    """Bytes, near or far."""
    return sum(array.bytes for array in arrays)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program: its results, what it does, to what, and the rest of the line."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str

    @property
    def bytes(self) -> float:
        """Of its results in memory."""
        return size(array for array in self.arrays if not array.near)


Computations = dict[str, dict[str, Instruction]]


def read(text: str) -> tuple[Computations, str]:
    """Its computations by name, each of them instructions by name; and which computation is the entry."""
    computations: Computations = {}
    entry = ""
    current: dict[str, Instruction] | None = None
    for line in text.splitlines():
        if current is None:
            if header := _HEADER.match(line):
                current = computations.setdefault(header.group(2), {})
                entry = header.group(2) if header.group(1) else entry
        # Attributes of kernels have lines that begin with a bracket too.
        elif line == "}" or line.startswith("}, execution_thread="):
            current = None
        elif " = " in line and (one := _instruction(line)):
            current[one.name] = one
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    end = _closing(rest) + 1 if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, bracket, rest = rest.partition("(")
    if not bracket:
        return None
    end = _closing("(" + rest) - 1
    arrays = tuple(
        Array(dtype, tuple(int(n) for n in dims.split(",") if n), "S(1)" in (layout or ""))
        for dtype, dims, layout in _SHAPE.findall(shape)
    )
    inside = re.sub(r"/\*.*?\*/", "", rest[:end])
    if opcode in ("constant", "parameter"):  # what it holds, or which one it is, stands where operands do
        return Instruction(name.lstrip("%"), arrays, opcode, (), rest)
    names = re.findall(r"%([\w.\-]+)", inside) if "%" in inside else re.findall(r"[\w.\-]+", inside)
    return Instruction(name.lstrip("%"), arrays, opcode, tuple(names), rest[end + 1 :])


def _closing(text: str) -> int:
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place
    return len(text)
