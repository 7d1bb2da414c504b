"""The packer: which segments of a stream share a sequence. A Grain iterator with an exact state.

Best fit over some open bins: a segment goes to the fullest bin that it fits, and where it fits none, the fullest bin
alone is closed and becomes a sequence. The others stay open for what fits them, which fills sequences better than
closing all at once (experiments/packing compares).

With many bins open from the start, those that are exactly full would close first, and the first batches would hold
mostly the lengths that fill a sequence by themselves (with toyworld's lengths and 512 open bins). So few bins are open
at first, and one more for every `GROWTH` that close.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import grain

from sora_jax.errors import UserError

Size = tuple[int, ...]
FIRST_BINS, GROWTH = 4, 4  # bins open at first, and bins closed for each one more
MAX_AGE = 8  # a bin closes, full or not, once `MAX_AGE` times `num_bins` have closed after it was opened


@dataclasses.dataclass(eq=False)
class _Bin:
    """Segments, of one kind, and their indices in the stream; what they take of the capacity; when it was opened."""

    kind: Any
    opened: int
    used: Size
    indices: list[int]
    segments: list[Any]


class BestFit(grain.IterDataset):
    """Streams sequences: lists of segments that fit a sequence together.

    Args:
      parent: the segments.
      size_of: what a segment takes of a sequence, in as many numbers as `capacity`; it refuses more than `capacity`.
      capacity: what a sequence holds.
      num_bins: the most bins that are open at a time.
      kind_of: what the segments of a sequence must have in common.

    Raises:
      UserError: there is no bin.
    """

    def __init__(
        self,
        parent: grain.IterDataset,
        size_of: Callable[[Any], Size],
        capacity: Sequence[int],
        num_bins: int,
        kind_of: Callable[[Any], Any] = lambda segment: None,
    ) -> None:
        super().__init__(parent)
        if num_bins < 1:
            raise UserError(f"A packer needs at least one open bin, not num_bins={num_bins}.")
        self.size_of, self.capacity, self.num_bins = size_of, tuple(capacity), num_bins
        self.kind_of = kind_of

    def __iter__(self) -> grain.DatasetIterator:
        return _Packing(iter(self._parent), self)


class _Packing(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, config: BestFit) -> None:
        super().__init__(parent)
        self._config = config
        self._bins: list[_Bin] = []
        self._read = self._num_closed = 0
        # The stream's state before each segment that may be in an open bin: resuming reads on from the first of them.
        self._states: deque[tuple[int, Any]] = deque()
        self._ended = False

    def __next__(self) -> list[Any]:
        while not self._ended:
            closed = self._read_one()
            if closed is not None:
                return closed.segments
        if not self._bins:
            raise StopIteration
        return self._close(self._bins[0]).segments

    def _read_one(self) -> _Bin | None:
        """Reads a segment into a bin; returns the bin that closed for it, if any did."""
        before, closed = self._parent.get_state(), None
        try:
            segment = next(self._parent)
        except StopIteration:
            self._ended = True
            return None
        size, kind = self._config.size_of(segment), self._config.kind_of(segment)
        self._states.append((self._read, before))
        fitting = [bin_ for bin_ in self._bins if bin_.kind == kind and self._fits(bin_, size)]
        if fitting:
            bin_ = max(fitting, key=_filled)
        else:
            if len(self._bins) >= min(self._config.num_bins, FIRST_BINS + self._num_closed // GROWTH):
                oldest = min(self._bins, key=lambda bin_: bin_.opened)
                aged = self._num_closed - oldest.opened >= MAX_AGE * self._config.num_bins
                closed = self._close(oldest if aged else max(self._bins, key=_filled))
            bin_ = _Bin(kind, self._num_closed, (0,) * len(size), [], [])
            self._bins.append(bin_)
        bin_.used = tuple(have + more for have, more in zip(bin_.used, size, strict=True))
        bin_.indices.append(self._read)
        bin_.segments.append(segment)
        self._read += 1
        return closed

    def _fits(self, bin_: _Bin, size: Size) -> bool:
        capacity = self._config.capacity
        return all(have + more <= most for have, more, most in zip(bin_.used, size, capacity, strict=True))

    def _close(self, bin_: _Bin) -> _Bin:
        self._bins.remove(bin_)
        self._num_closed += 1
        first = self._first()
        while self._states and self._states[0][0] < first:
            self._states.popleft()
        return bin_

    def _first(self) -> int:
        """The first index in the stream whose segment is in an open bin."""
        return min((index for bin_ in self._bins for index in bin_.indices), default=self._read)

    def get_state(self) -> dict[str, Any]:
        """The open bins, by indices in the stream, and the stream's state where the first of them was read."""
        return {
            "parent": self._states[0][1] if self._states else self._parent.get_state(),
            "first": self._first(),
            "read": self._read,
            "closed": self._num_closed,
            "ended": self._ended,
            "rows": [{"opened": bin_.opened, "places": [*bin_.indices]} for bin_ in self._bins],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._read, self._num_closed, self._ended = state["read"], state["closed"], state["ended"]
        self._states = deque()
        wanted = {index for bin_ in state["rows"] for index in bin_["places"]}
        segments: dict[int, Any] = {}
        for index in range(state["first"], state["read"]):
            self._states.append((index, self._parent.get_state()))
            segment = next(self._parent)
            if index in wanted:
                segments[index] = segment
        self._bins = []
        for bin_ in state["rows"]:
            sizes = [self._config.size_of(segments[index]) for index in bin_["places"]]
            used = tuple(map(sum, zip(*sizes, strict=True)))
            own = [segments[index] for index in bin_["places"]]
            kind = self._config.kind_of(own[0])
            self._bins.append(_Bin(kind, bin_["opened"], used, list(bin_["places"]), own))


def _filled(bin_: _Bin) -> int:
    return bin_.used[0]
