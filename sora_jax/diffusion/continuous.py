"""Continuous batching: requests of any shape and number of steps share rows, and join and leave between steps.

Every run has its own σ, so runs at different steps of their denoising may lie in one row: whoever is finished makes
room at once, and whoever waits takes it, all in the sampler's one compiled step. What a server stands on; a batch is
the case where all are there from the beginning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.data.packing import PackedBatch, Run, check_fits, pack_rows
from sora_jax.diffusion import flow
from sora_jax.diffusion.guidance import Guidance, Model
from sora_jax.diffusion.sampler import SOLVERS, State, solver_step
from sora_jax.errors import UserError

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


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A run to be filled.

    Attributes:
      run: what is given, and where σ starts.
      noise: float[n,P], what σ = 1 looks like.
      levels: float[steps+1], falling, from where the run starts to 0; tokens that start lower wait for their level.
      guidance: of numbers.
      negative: float[m,E], states of words that are not to be seen; None is none.
    """

    run: Run
    noise: np.ndarray
    levels: np.ndarray
    guidance: Guidance
    negative: np.ndarray | None = None


@dataclasses.dataclass(eq=False)
class _Seat:
    """Where a run lies: its row, id, slots, and entries of the row's table; and how far it has come."""

    ticket: int
    request: Request
    row: int
    segment: int
    slots: np.ndarray
    words: np.ndarray
    negative: np.ndarray
    entries: np.ndarray
    done: int = 0


class Queue:
    """Requests in, finished latents out. `add` at any time; `step` until it isn't `busy`.

    Results are those of each request alone, up to rounding. One model evaluation a step serves all that are seated.
    What is compiled depends on the room, the solver, and the most that any request so far has asked for: how many
    passes its guidance takes, whether it has negative words.
    """

    def __init__(self, model: Model, room: Room, solver: str = "euler") -> None:
        if solver not in SOLVERS:
            raise UserError(f"There is no solver {solver!r}: choose one of {', '.join(SOLVERS)}.")
        self.model, self.room, self.solver = model, room, solver
        self.passes = 1
        self.walked = 0  # runs that the last step took further
        self._line: list[tuple[int, Request]] = []
        self._waited = 0
        self._changed = True  # since the line was last looked through: somebody came or left
        self._seats: list[_Seat] = []
        self._tickets = 0
        self._columns: dict[str, np.ndarray] = {}
        self._negative: dict[str, np.ndarray] | None = None
        self._batch: tuple[PackedBatch, PackedBatch | None, Guidance] | None = None
        self._state: State | None = None

    @property
    def busy(self) -> bool:
        return bool(self._line or self._seats)

    @property
    def filled(self) -> float:
        """The share of slots that hold tokens now."""
        return sum(len(seat.slots) for seat in self._seats) / (self.room.rows * self.room.tokens)

    def add(self, request: Request) -> int:
        """Takes a request into the line; returns its ticket.

        Raises:
          UserError: it is larger than a row.
        """
        check_fits(request.run, self.room.tokens, self.room.text, self.room.conditions)
        if request.negative is not None and len(request.negative) > self.room.text:
            raise UserError(
                f"The negative prompt has {len(request.negative)} tokens, but a row holds {self.room.text}: shorten it."
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
        shape = (self.room.rows, self.room.conditions + 1)
        now, then = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        for seat in self._seats:
            starts = self._columns["condition_start"][seat.row, seat.entries]
            for table, place in ((now, seat.done), (then, seat.done + 1)):
                table[seat.row, seat.entries] = np.minimum(seat.request.levels[place], starts)
            seat.done += 1
        batch, negative, guidance = self._batch or self._tabulate()
        assert self._state is not None
        self._state = solver_step(
            self.model, self._state, batch, now, then, guidance, negative, self.solver, self.passes
        )
        finished = [seat for seat in self._seats if seat.done == len(seat.request.levels) - 1]
        if not finished:
            return {}
        x = np.asarray(self._state.x)
        out = {seat.ticket: x[seat.row, seat.slots] for seat in finished}
        for seat in finished:
            self._leave(seat)
        return out

    def _admit(self) -> None:
        """Seats the line in order; where the first doesn't fit, others may go before it for a while."""
        seated: list[_Seat] = []
        looked, self._changed = list(self._line) if self._changed else [], False
        for ticket, request in looked:
            seat = self._find(ticket, request)
            if seat is not None:
                self._line.remove((ticket, request))
                self._take(seat)
                seated.append(seat)
            elif self._waited >= PATIENCE:
                break
        first_waits = bool(self._line) and not (seated and seated[0].ticket < self._line[0][0])
        self._waited = self._waited + 1 if first_waits else 0
        if seated:
            self._begin(seated)

    def _find(self, ticket: int, request: Request) -> _Seat | None:
        """The fullest row that has room."""
        if not self._columns:
            self._lay_out(request.run)
        run, best = request.run, None
        n, m, k = len(run.patches), len(run.text), run.conditions
        unwanted = 0 if request.negative is None else len(request.negative)
        if unwanted and self._negative is None:
            self._lay_out_negative()
        for row in range(self.room.rows):
            slots = np.flatnonzero(self._columns["segment_ids"][row] == 0)
            words = np.flatnonzero(self._columns["text_segment_ids"][row] == 0)
            entries = 1 + np.flatnonzero(self._columns["condition_runs"][row, 1:] == 0)
            ids = {seat.segment for seat in self._seats if seat.row == row}
            avoided = words if self._negative is None else np.flatnonzero(self._negative["ids"][row] == 0)
            fits = len(slots) >= n and len(words) >= m and len(entries) >= k and len(avoided) >= unwanted
            if fits and len(ids) < self.room.runs and (best is None or len(slots) < best[0]):
                segment = next(number for number in range(1, self.room.runs + 1) if number not in ids)
                seat = _Seat(
                    ticket, request, row, segment, slots[:n], words[:m], avoided[:unwanted], entries[:k]
                )
                best = len(slots), seat
        return None if best is None else best[1]

    def _take(self, seat: _Seat) -> None:
        """Writes a run into the columns of the batch."""
        request, row = seat.request, seat.row
        run = request.run
        [alone, _] = pack_rows([run], len(run.patches), len(run.text), 1, 1, max(run.conditions, 1))
        table = np.concatenate(
            [[0], seat.entries, np.zeros(1, int)]
        )  # its entries here; none for what has none
        for name in ("patches", "coords", "start", "hints"):
            self._columns[name][row, seat.slots] = getattr(alone, name)[0]
        for name in ("text", "text_time"):
            self._columns[name][row, seat.words] = getattr(alone, name)[0]
        self._columns["segment_ids"][row, seat.slots] = seat.segment
        self._columns["text_segment_ids"][row, seat.words] = seat.segment
        self._columns["condition_ids"][row, seat.slots] = table[alone.condition_ids[0]]
        self._columns["text_condition_ids"][row, seat.words] = table[alone.text_condition_ids[0]]
        used = slice(1, 1 + len(seat.entries))
        self._columns["condition_runs"][row, seat.entries] = seat.segment
        self._columns["condition_time"][row, seat.entries] = alone.condition_time[0, used]
        self._columns["condition_start"][row, seat.entries] = alone.condition_start[0, used]
        if request.negative is not None and self._negative is not None:
            self._negative["text"][row, seat.negative] = request.negative
            self._negative["ids"][row, seat.negative] = seat.segment
            self._negative["conditions"][row, seat.negative] = seat.entries[0] if len(seat.entries) else 0
        self._seats.append(seat)
        self.passes = max(self.passes, request.guidance.passes())
        self._batch = None

    def _begin(self, seats: Sequence[_Seat]) -> None:
        """Where the tokens of those who join start from."""
        assert self._state is not None
        x, last_x, clean, last_sigma = (np.array(leaf) for leaf in self._state)
        # What somebody left behind may be no number, and 0 times that is none either.
        left = self._columns["segment_ids"] == 0
        x[left] = last_x[left] = clean[left] = 0.0
        for seat in seats:
            place = seat.row, seat.slots
            patches, ids = self._columns["patches"][place], self._columns["condition_ids"][place]
            start = np.minimum(seat.request.levels[0], self._columns["condition_start"][seat.row])
            level = np.where(ids > 0, start[ids], 0.0)[:, None].astype(np.float32)
            noisy = np.asarray(flow.interpolate(patches, seat.request.noise, level))
            x[place] = last_x[place] = clean[place] = np.where(level > 0, noisy, patches)
            last_sigma[seat.row, seat.entries] = start[seat.entries]
        self._state = State(*map(jnp.asarray, (x, last_x, clean, last_sigma)))

    def _leave(self, seat: _Seat) -> None:
        self._seats.remove(seat)
        self._changed = True
        for name, places in (
            ("segment_ids", seat.slots),
            ("condition_ids", seat.slots),
            ("start", seat.slots),
            ("text_segment_ids", seat.words),
            ("text_condition_ids", seat.words),
            ("condition_runs", seat.entries),
            ("condition_time", seat.entries),
            ("condition_start", seat.entries),
        ):
            self._columns[name][seat.row, places] = 0
        if self._negative is not None:
            self._negative["ids"][seat.row, seat.negative] = 0
        self._batch = None

    def _tabulate(self) -> tuple[PackedBatch, PackedBatch | None, Guidance]:
        """What the compiled step takes, as arrays of the device; made anew where somebody joined or left."""
        tables = {}
        for field in dataclasses.fields(Guidance):
            table = np.full((self.room.rows, self.room.conditions + 1), field.default, np.float32)
            for seat in self._seats:
                table[seat.row, seat.entries] = getattr(seat.request.guidance, field.name)
            tables[field.name] = table
        batch = PackedBatch(**self._columns)
        negative = None
        if self._negative is not None and self.passes > 1:
            negative = dataclasses.replace(
                batch,
                text=self._negative["text"],
                text_segment_ids=self._negative["ids"],
                text_condition_ids=self._negative["conditions"],
            )
        # A copy: what is written here for the next step must not reach one that is still under way.
        self._batch = jax.tree.map(lambda leaf: jnp.array(leaf), (batch, negative, Guidance(**tables)))
        return self._batch

    def _lay_out(self, like: Run) -> None:
        rows, N, M, S = self.room.rows, self.room.tokens, self.room.text, self.room.conditions + 1
        zeros = lambda *shape: np.zeros((rows, *shape), np.float32)
        ids = lambda size: np.zeros((rows, size), np.int32)
        P, E = like.patches.shape[1], like.text.shape[1]
        self._columns = {
            "patches": zeros(N, P),
            "coords": zeros(N, like.coords.shape[1]),
            "segment_ids": ids(N),
            "start": zeros(N),
            "condition_ids": ids(N),
            "text": zeros(M, E),
            "text_segment_ids": ids(M),
            "text_time": zeros(M),
            "text_condition_ids": ids(M),
            "condition_runs": ids(S),
            "condition_time": zeros(S),
            "condition_start": zeros(S),
            "hints": zeros(N, like.hints.shape[1]),
        }
        self._state = State(zeros(N, P), zeros(N, P), zeros(N, P), zeros(S))

    def _lay_out_negative(self) -> None:
        text, ids = self._columns["text"], self._columns["text_segment_ids"]
        self._negative = {
            "text": np.zeros_like(text),
            "ids": np.zeros_like(ids),
            "conditions": np.zeros_like(ids),
        }
