"""The packer: which runs of a stream share a row. An iterator of Grain's, with an exact state.

Best fit over some open rows: a run takes the fullest row that it fits, and where it fits none, the fullest row alone
closes. The others go on waiting for what fits them, which fills rows better than closing all at once (experiments/
packing compares).

What is open was left behind by what closed: were all rows of a large window opened first, those that are exactly full
would close first, and a run's first batches would hold mostly the lengths that fill a row by themselves (with
toyworld's lengths and 512 open rows). So a window begins small and grows by a row for every `GROWTH` that close.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import grain

from sora_jax.errors import UserError

Size = tuple[int, ...]
FIRST_WINDOW, GROWTH = 4, 4  # rows open at first, and rows closed for each one more
AGE = 8  # a row closes, full or not, once so many times the open rows' number have closed after it was opened


@dataclasses.dataclass(eq=False)
class _Row:
    """Runs, by their places in the stream, that lie together; how much of a row they take; when it was opened."""

    opened: int
    taken: Size
    places: list[int]
    runs: list[Any]


class BestFit(grain.IterDataset):
    """Streams rows: lists of elements that fit a row together.

    Args:
      parent: the elements.
      size_of: what an element takes of a row, in as many numbers as `room`; more than `room` is refused there.
      room: what a row holds.
      window: rows that are open at a time, once so many have been.

    Raises:
      UserError: the window has no row, or (from an iterator's `set_state`) a state is an older packer's.
    """

    def __init__(
        self, parent: grain.IterDataset, size_of: Callable[[Any], Size], room: Sequence[int], window: int
    ) -> None:
        super().__init__(parent)
        if window < 1:
            raise UserError(f"A packer needs at least one open row, not window={window}.")
        self.size_of, self.room, self.window = size_of, tuple(room), window

    def __iter__(self) -> grain.DatasetIterator:
        return _Packing(iter(self._parent), self)


class _Packing(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, config: BestFit) -> None:
        super().__init__(parent)
        self._config = config
        self._rows: list[_Row] = []
        self._read = self._closed_rows = 0
        # The stream's states before each run that may lie in an open row: from the first of them it is read again.
        self._states: deque[tuple[int, Any]] = deque()
        self._ended = False

    def __next__(self) -> list[Any]:
        while not self._ended:
            closed = self._take()
            if closed is not None:
                return closed.runs
        if not self._rows:
            raise StopIteration
        return self._close(self._rows[0]).runs

    def _take(self) -> _Row | None:
        """Reads a run and lays it into a row; returns the one that closed for it, if any did."""
        before, closed = self._parent.get_state(), None
        try:
            run = next(self._parent)
        except StopIteration:
            self._ended = True
            return None
        size = self._config.size_of(run)
        self._states.append((self._read, before))
        fitting = [row for row in self._rows if self._fits(row, size)]
        if fitting:
            row = max(fitting, key=_filled)
        else:
            if len(self._rows) >= min(self._config.window, FIRST_WINDOW + self._closed_rows // GROWTH):
                oldest = min(self._rows, key=lambda row: row.opened)
                aged = self._closed_rows - oldest.opened >= AGE * self._config.window
                closed = self._close(oldest if aged else max(self._rows, key=_filled))
            row = _Row(self._closed_rows, (0,) * len(size), [], [])
            self._rows.append(row)
        row.taken = tuple(have + more for have, more in zip(row.taken, size, strict=True))
        row.places.append(self._read)
        row.runs.append(run)
        self._read += 1
        return closed

    def _fits(self, row: _Row, size: Size) -> bool:
        room = self._config.room
        return all(have + more <= most for have, more, most in zip(row.taken, size, room, strict=True))

    def _close(self, row: _Row) -> _Row:
        self._rows.remove(row)
        self._closed_rows += 1
        first = self._first()
        while self._states and self._states[0][0] < first:
            self._states.popleft()
        return row

    def _first(self) -> int:
        """The first place in the stream whose run lies in an open row."""
        return min((place for row in self._rows for place in row.places), default=self._read)

    def get_state(self) -> dict[str, Any]:
        """What is open, by places in the stream, and the stream's state where the first of them was read."""
        return {
            "parent": self._states[0][1] if self._states else self._parent.get_state(),
            "first": self._first(),
            "read": self._read,
            "closed": self._closed_rows,
            "ended": self._ended,
            "rows": [{"opened": row.opened, "places": [*row.places]} for row in self._rows],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        if "rows" not in state:
            raise UserError(
                "This checkpoint's data were packed in another way, by an older version: go on from its weights alone, "
                "in a new workdir with config.init_from."
            )
        self._parent.set_state(state["parent"])
        self._read, self._closed_rows, self._ended = state["read"], state["closed"], state["ended"]
        self._states = deque()
        wanted = {place for row in state["rows"] for place in row["places"]}
        runs: dict[int, Any] = {}
        for place in range(state["first"], state["read"]):
            self._states.append((place, self._parent.get_state()))
            run = next(self._parent)
            if place in wanted:
                runs[place] = run
        self._rows = []
        for row in state["rows"]:
            sizes = [self._config.size_of(runs[place]) for place in row["places"]]
            taken = tuple(map(sum, zip(*sizes, strict=True)))
            own = [runs[place] for place in row["places"]]
            self._rows.append(_Row(row["opened"], taken, list(row["places"]), own))


def _filled(row: _Row) -> int:
    return row.taken[0]
