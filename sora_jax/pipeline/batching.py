"""Continuous batching: requests of any shape and number of steps share rows, and join and leave between steps.

Every run has its own σ, so runs at different steps of their denoising may lie in one row: whoever is finished makes
room at once, and whoever waits takes it, in the sampler's compiled step. Whenever somebody comes or leaves, everybody
is laid anew, in the smallest room that holds them. What a server stands on; a batch is the case where all are there
from the beginning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.diffusion import flow
from sora_jax.diffusion.guidance import Guidance, Model
from sora_jax.diffusion.solvers import SOLVERS, State, solver_step
from sora_jax.errors import UserError
from sora_jax.tokens.packing import PackedBatch, Placement, Segment, check_fits, pack_batch

PATIENCE = 16  # steps that smaller ones may overtake the first in line


@dataclasses.dataclass(frozen=True)
class Room:
    """What the rows hold.

    Attributes:
      rows: B.
      tokens: N, slots a row.
      text: M, slots a row for words; as many again for words that are not to be seen.
      runs: K, the most a row may hold.
      conditions: S - 1, levels and words in force over a row's runs.
    """

    rows: int
    tokens: int
    text: int
    runs: int
    conditions: int

    def holds(self, requests: Sequence[Request]) -> bool:
        """Whether they fit one of its rows."""
        sums = np.sum([request.size for request in requests], axis=0)
        most = self.tokens, self.text, self.text, self.conditions
        return len(requests) <= self.runs and bool((sums <= most).all())


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A run to be filled.

    Attributes:
      run: what is given, and where σ starts.
      noise: float[n,P], what σ = 1 looks like.
      levels: float[steps+1], falling, from where the run starts to 0; tokens that start lower wait for their level.
      guidance: of numbers.
      negative: float[m,E], states of words that are not to be seen; None is none.
      size: what it takes of a row: tokens, words, words not to be seen, conditions.
    """

    run: Segment
    noise: np.ndarray
    levels: np.ndarray
    guidance: Guidance
    negative: np.ndarray | None = None
    size: tuple[int, int, int, int] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        unwanted = 0 if self.negative is None else len(self.negative)
        size = len(self.run.patches), len(self.run.text), unwanted, self.run.conditions
        object.__setattr__(self, "size", size)


@dataclasses.dataclass(eq=False)
class _Seat:
    """Somebody who is under way: where the run lies, its entries of the row's table, and how far it has come."""

    ticket: int
    request: Request
    row: int
    place: Placement | None = None
    entries: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, int))
    done: int = 0

    @property
    def slots(self) -> tuple[int, slice]:
        assert self.place is not None
        return self.row, slice(self.place.start, self.place.start + self.place.length)


class Queue:
    """Requests in, finished latents out. `add` at any time; `step` until it isn't `busy`.

    Results are those of each request alone, up to rounding. One model evaluation a step serves all that are seated.
    What is compiled depends on the room, the solver, and the most that any request so far has asked for: how many
    passes its guidance takes, whether it has negative words.

    Args:
      rooms: from small to large, of as many rows each: a step costs what the smallest one costs that holds all who
        are seated, and the largest says how many those may be.
    """

    def __init__(self, model: Model, rooms: Sequence[Room], solver: str = "euler") -> None:
        if solver not in SOLVERS:
            raise UserError(f"There is no solver {solver!r}: choose one of {', '.join(SOLVERS)}.")
        self.model, self.rooms, self.solver = model, tuple(rooms), solver
        self.room = self.rooms[0]
        self.passes = 1
        self.walked = 0  # runs that the last step took further
        self._avoids = False
        self._line: list[tuple[int, Request]] = []
        self._waited = 0
        self._changed = False  # since everybody was laid: somebody came or left
        self._seats: list[_Seat] = []
        self._tickets = 0
        self._batch: tuple[PackedBatch, PackedBatch | None, Guidance] | None = None
        self._starts: np.ndarray | None = None
        self._state: State | None = None

    @property
    def busy(self) -> bool:
        return bool(self._line or self._seats)

    @property
    def filled(self) -> float:
        """The share of slots that hold tokens now."""
        taken = sum(seat.request.size[0] for seat in self._seats)
        return taken / (self.room.rows * self.room.tokens)

    def add(self, request: Request) -> int:
        """Takes a request into the line; returns its ticket.

        Raises:
          UserError: it is larger than a row.
        """
        largest = self.rooms[-1]
        check_fits(request.run, largest.tokens, largest.text, largest.conditions)
        if request.negative is not None and len(request.negative) > largest.text:
            raise UserError(
                f"The negative prompt has {len(request.negative)} tokens, but a row holds {largest.text}: shorten it."
            )
        self._tickets += 1
        self._line.append((self._tickets, request))
        self._changed = True
        return self._tickets

    def step(self) -> dict[int, np.ndarray]:
        """Seats who fits, walks everyone one step, and returns whoever is finished: {ticket: float32[n,P]}."""
        self._admit()
        self.walked = len(self._seats)
        if not self._seats:
            return {}
        assert self._batch is not None and self._starts is not None and self._state is not None
        now, then = np.zeros_like(self._starts), np.zeros_like(self._starts)
        for seat in self._seats:
            starts = self._starts[seat.row, seat.entries]
            for table, place in ((now, seat.done), (then, seat.done + 1)):
                table[seat.row, seat.entries] = np.minimum(seat.request.levels[place], starts)
            seat.done += 1
        batch, negative, guidance = self._batch
        self._state = solver_step(
            self.model, self._state, batch, now, then, guidance, negative, self.solver, self.passes
        )
        finished = [seat for seat in self._seats if seat.done == len(seat.request.levels) - 1]
        if not finished:
            return {}
        x = np.asarray(self._state.x)
        for seat in finished:
            self._seats.remove(seat)
        self._changed = True
        return {seat.ticket: x[seat.slots] for seat in finished}

    def _admit(self) -> None:
        """Seats the line in order; where the first doesn't fit, others may go before it for a while."""
        first = self._line[0] if self._line else None
        if self._changed:
            for ticket, request in list(self._line):
                row = self._find(request)
                if row is not None:
                    self._line.remove((ticket, request))
                    self._seats.append(_Seat(ticket, request, row))
                elif self._waited >= PATIENCE:
                    break
            if self._seats:
                self._lay()
            self._changed = False
        self._waited = self._waited + 1 if first is not None and first in self._line else 0

    def _find(self, request: Request) -> int | None:
        """The fullest row that has room."""
        rows = self._rows()
        fitting = [row for row, there in enumerate(rows) if self.rooms[-1].holds([*there, request])]
        return max(fitting, key=lambda row: sum(one.size[0] for one in rows[row]), default=None)

    def _rows(self) -> list[list[Request]]:
        rows = range(self.rooms[-1].rows)
        return [[seat.request for seat in self._seats if seat.row == row] for row in rows]

    def _lay(self) -> None:
        """Everybody in the smallest room that holds them: the batch, and the state of those who are under way."""
        rows = self._rows()
        self.room = room = next(room for room in self.rooms if all(map(room.holds, rows)))
        runs = [[request.run for request in there] for there in rows]
        batch, places = pack_batch(runs, room.rows, room.tokens, room.text, room.conditions)
        self._seats.sort(key=lambda seat: seat.row)  # as they are laid
        old = None if self._state is None else State(*map(np.asarray, self._state))
        x, last_x, clean = (np.zeros(batch.patches.shape, np.float32) for _ in range(3))
        last_sigma = np.zeros(batch.condition_segment_ids.shape, np.float32)
        for seat, place in zip(self._seats, places, strict=True):
            before, entries_before = None if seat.place is None else seat.slots, seat.entries
            seat.place = place
            seat.entries = np.flatnonzero(batch.condition_segment_ids[seat.row] == place.segment)
            if before is None:
                begun, starts = _begin(seat, batch)
                x[seat.slots] = last_x[seat.slots] = clean[seat.slots] = begun
                last_sigma[seat.row, seat.entries] = starts
            else:
                assert old is not None
                x[seat.slots], last_x[seat.slots] = old.x[before], old.last_x[before]
                clean[seat.slots] = old.clean[before]
                last_sigma[seat.row, seat.entries] = old.last_sigma[seat.row, entries_before]
        self._state = State(*map(jnp.asarray, (x, last_x, clean, last_sigma)))
        self._starts = batch.condition_init_sigma
        self.passes = max([self.passes, *(seat.request.guidance.passes() for seat in self._seats)])
        self._avoids |= any(seat.request.size[2] for seat in self._seats)
        negative = self._negative(batch) if self._avoids and self.passes > 1 else None
        self._batch = jax.tree.map(jnp.asarray, (batch, negative, self._guidance(batch)))

    def _guidance(self, batch: PackedBatch) -> Guidance:
        """A table a setting."""
        tables = {}
        for field in dataclasses.fields(Guidance):
            table = np.full(batch.condition_segment_ids.shape, field.default, np.float32)
            for seat in self._seats:
                table[seat.row, seat.entries] = getattr(seat.request.guidance, field.name)
            tables[field.name] = table
        return Guidance(**tables)

    def _negative(self, batch: PackedBatch) -> PackedBatch:
        """The same rows with the words that are not to be seen."""
        text, ids = np.zeros_like(batch.text), np.zeros_like(batch.text_segment_ids)
        conditions, taken = np.zeros_like(ids), [0] * len(ids)
        for seat in self._seats:
            assert seat.place is not None
            if seat.request.negative is None:
                continue
            words = seat.row, slice(taken[seat.row], taken[seat.row] + len(seat.request.negative))
            taken[seat.row] = words[1].stop
            text[words], ids[words] = seat.request.negative, seat.place.segment
            conditions[words] = seat.entries[0] if len(seat.entries) else 0
        return dataclasses.replace(batch, text=text, text_segment_ids=ids, text_condition_ids=conditions)


def _begin(seat: _Seat, batch: PackedBatch) -> tuple[np.ndarray, np.ndarray]:
    """Where a run's tokens start from, float[n,P], and the levels of its entries there."""
    patches, ids = batch.patches[seat.slots], batch.condition_ids[seat.slots]
    starts = np.minimum(seat.request.levels[0], batch.condition_init_sigma[seat.row])
    level = np.where(ids > 0, starts[ids], 0.0)[:, None].astype(np.float32)
    noisy = np.asarray(flow.interpolate(patches, seat.request.noise, level))
    return np.where(level > 0, noisy, patches), starts[seat.entries]
