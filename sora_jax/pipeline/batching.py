"""Continuous batching: segments of any shape and number of steps are packed together, and join and leave between steps.

Every segment has its own σ, so segments at different steps of their denoising may be packed together: a finished one
makes room at once, and a waiting one takes it, in the sampler's compiled step. When segments join or leave, all are
repacked, in the smallest batch shape that holds them. A server needs no more; a batch is the case where all are there
from the beginning.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.diffusion import flow
from sora_jax.diffusion.guidance import Guidance, VelocityFn
from sora_jax.diffusion.solvers import SOLVERS, State, step_of
from sora_jax.errors import UserError
from sora_jax.models.step_cache import StepCache
from sora_jax.tokens.packing import PackedBatch, Placement, Segment, check_fits, pack_batch

MAX_OVERTAKE_STEPS = 16  # steps that smaller segments may overtake the first in line


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The shape of a packed batch.

    Attributes:
      batch_size: B, packed sequences.
      seq_len: N, token positions of a sequence.
      text_len: M, text positions; as many again for negative prompts.
      max_segments: K, of a sequence.
      max_conditions: S - 1, pairs of initial sigma and active caption over a sequence's segments.
      picture_len: I, states of pictures.
    """

    batch_size: int
    seq_len: int
    text_len: int
    max_segments: int
    max_conditions: int
    picture_len: int = 0

    @property
    def limits(self) -> tuple[int, int, int, int]:
        """Of a sequence, as `packing.first_fit_decreasing` takes them: positions, text, segments, conditions."""
        return self.seq_len, self.text_len, self.max_segments, self.max_conditions

    def holds(self, row: Sequence[_BatchedSegment]) -> bool:
        """Whether they fit one of its sequences."""
        sums = np.sum([member.size for member in row], axis=0)
        most = self.seq_len, self.text_len, self.text_len, self.max_conditions, self.picture_len
        return len(row) <= self.max_segments and bool((sums <= most).all())


@dataclasses.dataclass(eq=False)
class _BatchedSegment:
    """A segment that waits or is being sampled: where it is packed, its conditions, and how far it has come."""

    uid: int
    segment: Segment
    noise: np.ndarray
    sigmas: np.ndarray
    guidance: Guidance
    negative_text: np.ndarray | None
    row: int = 0
    placement: Placement | None = None
    condition_ids: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, int))
    step: int = 0

    @functools.cached_property
    def size(self) -> tuple[int, ...]:
        """What it takes of a sequence: tokens, text tokens, negative text tokens, conditions, states of pictures."""
        negative = 0 if self.negative_text is None else len(self.negative_text)
        own = self.segment
        pictures = 0 if own.pictures is None else len(own.pictures)
        return len(own.patches), len(own.text), negative, own.num_conditions, pictures

    @property
    def positions(self) -> tuple[int, slice]:
        """Its tokens in the batch."""
        assert self.placement is not None
        return self.row, slice(self.placement.start, self.placement.start + self.placement.length)


class ContinuousBatcher:
    """Segments in, denoised latents out. `add` at any time; `step` until it isn't `busy`.

    Results are those of each segment alone, up to rounding. One model evaluation a step serves all active segments.
    What is compiled depends on the batch shape, the solver, and the most that any segment so far has asked for: how
    many passes its guidance takes, whether it has a negative prompt.

    Args:
      step_cache: see `models.step_cache.StepCache.threshold`; 0: nothing is cached. When segments join or leave, the
        next step evaluates every layer.
      batch_shapes: from small to large, of one batch size: a step costs what the smallest one costs that holds all
        active segments, and the largest says how many those may be.
    """

    def __init__(
        self,
        model: VelocityFn,
        batch_shapes: Sequence[BatchShape],
        solver: str = "euler",
        step_cache: float = 0.0,
    ) -> None:
        if solver not in SOLVERS:
            raise UserError(f"There is no solver {solver!r}: choose one of {', '.join(SOLVERS)}.")
        self.model, self.batch_shapes, self.solver = model, tuple(batch_shapes), solver
        self.step_cache = step_cache
        self.batch_shape = self.batch_shapes[0]
        self.passes = 1
        self.advanced = 0  # segments that the last step advanced
        self._has_negatives = False
        self._waiting: list[_BatchedSegment] = []
        self._waited = 0
        self._changed = False  # since the last packing: segments came or left
        self._active: list[_BatchedSegment] = []
        self._last_uid = 0
        self._batch: tuple[PackedBatch, PackedBatch | None, Guidance] | None = None
        self._init_sigmas: np.ndarray | None = None
        self._state: State | None = None

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._active)

    def add(
        self,
        segment: Segment,
        noise: np.ndarray,
        sigmas: np.ndarray,
        guidance: Guidance,
        negative_text: np.ndarray | None = None,
    ) -> int:
        """Adds a segment to be sampled; returns its uid.

        Args:
          segment: conditioning tokens, and the sigma from which each other one starts.
          noise: float[n,P], what σ = 1 looks like.
          sigmas: float[steps+1], falling to 0; tokens whose initial sigma is lower wait until it is reached.
          guidance: of numbers.
          negative_text: float[m,E], text states of a negative prompt.

        Raises:
          UserError: it is larger than a sequence.
        """
        largest = self.batch_shapes[-1]
        check_fits(segment, largest.seq_len, largest.text_len, largest.max_conditions)
        if negative_text is not None and len(negative_text) > largest.text_len:
            count = f"{len(negative_text)} tokens, but a sequence holds {largest.text_len}"
            raise UserError(f"The negative prompt has {count}: shorten it.")
        self._last_uid += 1
        self._waiting.append(_BatchedSegment(self._last_uid, segment, noise, sigmas, guidance, negative_text))
        self._changed = True
        return self._last_uid

    def step(self) -> dict[int, np.ndarray]:
        """Schedules what fits, takes one step of all, and returns what is finished: {uid: float32[n,P]}."""
        self._schedule()
        self.advanced = len(self._active)
        if not self._active:
            return {}
        assert self._batch is not None and self._init_sigmas is not None and self._state is not None
        sigma, next_sigma = np.zeros_like(self._init_sigmas), np.zeros_like(self._init_sigmas)
        for member in self._active:
            start = self._init_sigmas[member.row, member.condition_ids]
            for table, step in ((sigma, member.step), (next_sigma, member.step + 1)):
                table[member.row, member.condition_ids] = np.minimum(member.sigmas[step], start)
        fresh = self._fresh_noise() if self.solver == "sde" else None
        for member in self._active:
            member.step += 1
        batch, negative, guidance = self._batch
        self._state = step_of(self.model)(
            self.model,
            self._state,
            batch,
            sigma,
            next_sigma,
            guidance,
            negative,
            self.solver,
            self.passes,
            fresh,
        )
        finished = [member for member in self._active if member.step == len(member.sigmas) - 1]
        if not finished:
            return {}
        x = np.asarray(self._state.x)
        for member in finished:
            self._active.remove(member)
        self._changed = True
        return {member.uid: x[member.positions] for member in finished}

    def _fresh_noise(self) -> np.ndarray:
        """float32[B,N,P] of this step, of each segment by its first noise and its step: as it would be alone."""
        assert self._state is not None
        noise = np.zeros(self._state.x.shape, np.float32)
        for member in self._active:
            generator = np.random.default_rng([zlib.crc32(member.noise.tobytes()), member.step])
            noise[member.positions] = generator.standard_normal(member.noise.shape, np.float32)
        return noise

    def _schedule(self) -> None:
        """Schedules waiting segments in order; where the first doesn't fit, others may overtake it for a while."""
        first = self._waiting[0] if self._waiting else None
        if self._changed:
            for member in list(self._waiting):
                row = self._find_row(member)
                if row is not None:
                    self._waiting.remove(member)
                    self._active.append(member)
                    member.row = row
                elif self._waited >= MAX_OVERTAKE_STEPS:
                    break
            if self._active:
                self._repack()
            self._changed = False
        self._waited = self._waited + 1 if first is not None and first in self._waiting else 0

    def _find_row(self, member: _BatchedSegment) -> int | None:
        """The fullest sequence that has room."""
        rows = self._rows()
        fitting = [i for i, row in enumerate(rows) if self.batch_shapes[-1].holds([*row, member])]
        return max(fitting, key=lambda i: sum(one.size[0] for one in rows[i]), default=None)

    def _rows(self) -> list[list[_BatchedSegment]]:
        rows = range(self.batch_shapes[-1].batch_size)
        return [[member for member in self._active if member.row == row] for row in rows]

    def _repack(self) -> None:
        """Packs all active segments into the smallest batch shape that holds them, and their state with them."""
        rows = self._rows()
        self.batch_shape = shape = next(shape for shape in self.batch_shapes if all(map(shape.holds, rows)))
        segments = [[member.segment for member in row] for row in rows]
        sizes = shape.batch_size, shape.seq_len, shape.text_len, shape.max_conditions, shape.picture_len
        batch, placements = pack_batch(segments, *sizes)
        self._active.sort(key=lambda member: member.row)  # as they are packed
        old = None if self._state is None else State(*map(np.asarray, self._state[:6]))
        state = State(
            *(np.zeros(batch.patches.shape, np.float32) for _ in range(4)),
            *(np.zeros(batch.condition_segment_ids.shape, np.float32) for _ in range(2)),
        )
        for member, placement in zip(self._active, placements, strict=True):
            before, ids_before = member.placement and member.positions, member.condition_ids
            member.placement = placement
            own = batch.condition_segment_ids[member.row] == placement.segment_id
            member.condition_ids = np.flatnonzero(own)
            now, conditions = member.positions, (member.row, member.condition_ids)
            if before is None:
                carried = State.begin(*_initial_state(member, batch))
            else:
                assert old is not None
                tables = (table[member.row, ids_before] for table in old[4:6])
                carried = State(*(array[before] for array in old[:4]), *tables)
            for array, values in zip(state[:4], carried[:4], strict=True):
                array[now] = values
            for table, values in zip(state[4:6], carried[4:6], strict=True):
                table[conditions] = values
        self._init_sigmas = batch.condition_init_sigma
        self.passes = max([self.passes, *(member.guidance.passes() for member in self._active)])
        self._state = State(*map(jnp.asarray, state[:6]))._replace(cache=self._empty_cache())
        self._has_negatives |= any(member.size[2] for member in self._active)
        negative = self._pack_negatives(batch) if self._has_negatives and self.passes > 1 else None
        self._batch = jax.tree.map(jnp.asarray, (batch, negative, self._pack_guidance(batch)))

    def _empty_cache(self) -> StepCache | None:
        if not self.step_cache:
            return None
        shape, config = self.batch_shape, self.model.config  # type: ignore[attr-defined]
        sequences = self.passes * shape.batch_size
        return StepCache.begin(config, sequences, shape.seq_len, shape.text_len, self.step_cache)

    def _pack_guidance(self, batch: PackedBatch) -> Guidance:
        """A table [B,S] a setting."""
        tables = {}
        for field in dataclasses.fields(Guidance):
            table = np.full(batch.condition_segment_ids.shape, field.default, np.float32)
            for member in self._active:
                table[member.row, member.condition_ids] = getattr(member.guidance, field.name)
            tables[field.name] = table
        return Guidance(**tables)

    def _pack_negatives(self, batch: PackedBatch) -> PackedBatch:
        """The same batch with the negative prompts for text."""
        text, ids = np.zeros_like(batch.text), np.zeros_like(batch.text_segment_ids)
        conditions, taken = np.zeros_like(ids), [0] * len(ids)
        for member in self._active:
            assert member.placement is not None
            if member.negative_text is None:
                continue
            place = member.row, slice(taken[member.row], taken[member.row] + len(member.negative_text))
            taken[member.row] = place[1].stop
            text[place], ids[place] = member.negative_text, member.placement.segment_id
            conditions[place] = member.condition_ids[0] if len(member.condition_ids) else 0
        return dataclasses.replace(batch, text=text, text_segment_ids=ids, text_condition_ids=conditions)


def _initial_state(member: _BatchedSegment, batch: PackedBatch) -> tuple[np.ndarray, np.ndarray]:
    """A segment's tokens before its first step, float[n,P], and the sigmas of its conditions there."""
    patches, ids = batch.patches[member.positions], batch.condition_ids[member.positions]
    init_sigmas = batch.condition_init_sigma[member.row]
    sigmas = np.minimum(member.sigmas[0], init_sigmas)
    # What is generated is noise alone, even where a schedule begins a little below 1.
    shown = np.where(init_sigmas == 1, 1.0, sigmas)
    sigma = np.where(ids > 0, shown[ids], 0.0)[:, None].astype(np.float32)
    noisy = np.asarray(flow.interpolate(patches, member.noise, sigma))
    return np.where(sigma > 0, noisy, patches), sigmas[member.condition_ids]
