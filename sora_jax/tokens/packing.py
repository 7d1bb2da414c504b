"""Runs to rows and back: the packed batch (NaViT's patch n' pack)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from sora_jax.errors import UserError
from sora_jax.tokens.bins import BestFit


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """Rows of fixed length that hold many runs each. An array may be NumPy's or JAX's.

    A row's tokens share few conditions: a run, the level where σ starts, the words in force. They are a table of S
    entries, so that whatever depends on them alone is computed S times a row; entry 0 is that of given tokens.

    Attributes:
      patches: float[B,N,P], clean latent patches.
      coords: float[B,N,5], the box that a token covers: its centre (seconds, y, x) as it enters RoPE, and its
        extent (seconds, height); see `patches.coordinates`.
      segment_ids: int32[B,N], 1…K in order of place; 0 is an empty slot.
      init_sigma: float[B,N], where σ starts: 1 to be painted, 0 given (never noisy, no loss), between to be repainted.
      condition_ids: int32[B,N], a token's entry of the table; 0 where it is given, or the slot empty.
      text: float[B,M,E], states of the text encoder.
      text_segment_ids: int32[B,M], as above; a run without words has no slot here.
      text_time: float[B,M], seconds from which these words hold; 0 is the whole clip.
      text_condition_ids: int32[B,M], the entry whose σ a word shares.
      condition_segment_ids: int32[B,S], the run an entry belongs to; 0 = unused.
      condition_caption_time: float[B,S], seconds from which the words in force there hold.
      condition_init_sigma: float[B,S], where σ starts there.
      reference: float[B,N,2(P+1)], see `Segment`; None for a model that takes none.
    """

    patches: Any
    coords: Any
    segment_ids: Any
    init_sigma: Any
    condition_ids: Any
    text: Any
    text_segment_ids: Any
    text_time: Any
    text_condition_ids: Any
    condition_segment_ids: Any
    condition_caption_time: Any
    condition_init_sigma: Any
    reference: Any = None

    @classmethod
    def shapes(
        cls,
        rows: int,
        tokens: int,
        text: int,
        conditions: int,
        patch_width: int,
        text_width: int,
        reference: bool,
    ) -> PackedBatch:
        """One of `jax.ShapeDtypeStruct`s: B, N, M, S - 1, P, E, and whether there is `reference`."""
        of = lambda dtype, *shape: jax.ShapeDtypeStruct((rows, *shape), dtype)
        number, index = functools.partial(of, np.float32), functools.partial(of, np.int32)
        entries = 1 + conditions
        return cls(
            patches=number(tokens, patch_width),
            coords=number(tokens, 5),
            segment_ids=index(tokens),
            init_sigma=number(tokens),
            condition_ids=index(tokens),
            text=number(text, text_width),
            text_segment_ids=index(text),
            text_time=number(text),
            text_condition_ids=index(text),
            condition_segment_ids=index(entries),
            condition_caption_time=number(entries),
            condition_init_sigma=number(entries),
            reference=number(tokens, 2 * (patch_width + 1)) if reference else None,
        )

    @property
    def given(self) -> Any:
        """bool[B,N]: conditioning tokens; an empty slot is none."""
        return (self.segment_ids > 0) & (self.init_sigma == 0)


@dataclasses.dataclass(frozen=True)
class Segment:
    """One clip and its words, as tokens.

    Attributes:
      patches: float[n,P].
      coords: float32[n,5], see `patches.coordinates`.
      init_sigma: float[n], where σ starts, 0…1; 0 is given.
      caption_time: float[n], which words are in force: the `text_time` of those, see `active_caption_time`.
      text: float[m,E]; m may be 0.
      text_time: float[m], seconds.
      key: names the clip, in errors.
      reference: float[n,2(P+1)], what is given at a token's own place, latest before it and earliest after it: a patch
        and its nearness, see `patches.reference_patches`; None is none.
    """

    patches: np.ndarray
    coords: np.ndarray
    init_sigma: np.ndarray
    caption_time: np.ndarray
    text: np.ndarray
    text_time: np.ndarray
    key: str = ""
    reference: Any = None

    def __post_init__(self) -> None:
        if self.reference is None:
            n, width = self.patches.shape
            object.__setattr__(self, "reference", np.zeros((n, 2 * (width + 1)), np.float32))

    @property
    def conditions(self) -> int:
        """How many entries of a row's table it needs."""
        painted = self.init_sigma > 0
        return len(np.unique(np.stack([self.init_sigma, self.caption_time])[:, painted], axis=1).T)


_OF_TOKENS = ("patches", "coords", "init_sigma", "caption_time", "reference")
_OF_WORDS = ("text", "text_time")


class Placement(NamedTuple):
    """Where a run lies: slots start…start+length of `row`, under the id `segment` (1…K)."""

    row: int
    segment: int
    start: int
    length: int


def active_caption_time(time: np.ndarray, text_time: np.ndarray) -> np.ndarray:
    """The `text_time` of the words that hold at each of `time`: the latest that has come; float32, as `time`.

    Before the first, and where there are no words, it is the first's, or 0.
    """
    starts = np.unique(text_time) if len(text_time) else np.zeros(1)
    which = np.searchsorted(starts, np.asarray(time) + 1e-3, side="right") - 1
    return starts[np.maximum(which, 0)].astype(np.float32)


def pack_rows(
    runs: Sequence[Segment],
    seq_len: int,
    text_len: int,
    max_segments: int,
    rows: int | None = None,
    conditions: int | None = None,
) -> tuple[PackedBatch, list[Placement]]:
    """Packs a finite list of runs into few rows (first-fit decreasing), in NumPy.

    Args:
      runs: at least one; all with the same P and E.
      seq_len: N, token slots a row.
      text_len: M, text slots a row.
      max_segments: K, the most runs a row may hold.
      rows: pads with empty rows to exactly this many, for a shape that is known beforehand.
      conditions: S - 1, entries of a row's table; None is `max_segments`, one a run.

    Returns:
      The batch and one placement per run, in the order of `runs`, for `unpack`.

    Raises:
      UserError: there is no run, one is longer than a row, or `rows` are too few.
    """
    if not runs:
        raise UserError("There is nothing to pack: give at least one run.")
    conditions = max_segments if conditions is None else conditions
    for run in runs:
        check_fits(run, seq_len, text_len, conditions)
    laid = assign_rows(runs, seq_len, text_len, max_segments, conditions)
    if rows is not None and len(laid) > rows:
        raise UserError(
            f"{len(runs)} runs need {len(laid)} rows, but there are {rows}: give more or longer rows."
        )
    batch, placements = pack_batch(
        [[runs[i] for i in row] for row in laid], rows or len(laid), seq_len, text_len, conditions
    )
    placed = dict(zip((i for row in laid for i in row), placements, strict=True))
    return batch, [placed[i] for i in range(len(runs))]


def assign_rows(
    runs: Sequence[Segment], seq_len: int, text_len: int, max_segments: int, conditions: int
) -> list[list[int]]:
    """Which runs, by their places in `runs`, `pack_rows` lays into one row each."""
    sizes = [(len(run.patches), len(run.text), run.conditions) for run in runs]
    order = sorted(
        range(len(runs)), key=lambda i: -max(sizes[i][0] / seq_len, sizes[i][1] / max(text_len, 1))
    )
    laid: list[list[int]] = []
    used: list[list[int]] = []  # tokens, text, conditions and runs of each row
    for i in order:
        wanted, most = (*sizes[i], 1), (seq_len, text_len, conditions, max_segments)
        fitting = (
            row
            for row, taken in enumerate(used)
            if all(have + more <= limit for have, more, limit in zip(taken, wanted, most, strict=True))
        )
        row = next(fitting, len(used))
        if row == len(used):
            used.append([0, 0, 0, 0])
            laid.append([])
        used[row] = [have + more for have, more in zip(used[row], wanted, strict=True)]
        laid[row].append(i)
    return laid


def pack_batch(
    laid: Sequence[Sequence[Segment]], rows: int, seq_len: int, text_len: int, conditions: int
) -> tuple[PackedBatch, list[Placement]]:
    """The batch of `rows` rows that hold these runs, and where each lies, row after row.

    Args:
      laid: the runs of each row, which fit it; rows may be empty, but not all.
      rows, seq_len, text_len, conditions: as `pack_rows` takes them.
    """
    like = next(run for runs in laid for run in runs)
    columns = _empty_columns(like, rows, seq_len, text_len)
    placements = []
    for row, runs in enumerate(laid):
        start = told = 0
        for segment, run in enumerate(runs, 1):
            n, m = len(run.patches), len(run.text)
            slots, words = slice(start, start + n), slice(told, told + m)
            for name in _OF_TOKENS:
                columns[name][row, slots] = getattr(run, name)
            for name in _OF_WORDS:
                columns[name][row, words] = getattr(run, name)
            columns["segment_ids"][row, slots] = segment
            columns["text_segment_ids"][row, words] = segment
            placements.append(Placement(row, segment, start, n))
            start, told = start + n, told + m
    return _with_conditions(columns, conditions), placements


def unpack(array: Any, placements: Sequence[Placement]) -> list[np.ndarray]:
    """Takes each run's tokens out of array[B,N,...]: a list of [n,...], in the order given to `pack_rows`."""
    array = np.asarray(array)
    return [array[place.row, place.start : place.start + place.length] for place in placements]


def pack_stream(
    runs: grain.IterDataset,
    seq_len: int,
    text_len: int,
    max_segments: int,
    rows: int,
    window: int = 16,
    segment_conditions: int = 1,
) -> grain.IterDataset:
    """Packs a stream of `Segment`s into a stream of PackedBatch (NumPy).

    `window` rows are open at a time (see `bins`); more rows waste fewer slots (experiments/packing), but cost memory
    and, on resuming, the time to read their runs again. The iterator's state is exact. A finite stream ends with empty
    rows that complete its last batch. A run may have `segment_conditions` conditions.
    """
    packed = stream_rows(runs, seq_len, text_len, max_segments, window, segment_conditions)

    def collate(laid: Sequence[Sequence[Segment]]) -> PackedBatch:
        return pack_batch(laid, rows, seq_len, text_len, max_segments * segment_conditions)[0]

    return packed.batch(rows, batch_fn=collate)


def stream_rows(
    runs: grain.IterDataset,
    seq_len: int,
    text_len: int,
    max_segments: int,
    window: int = 16,
    segment_conditions: int = 1,
) -> grain.IterDataset:
    """Streams rows, each as the list of the runs that it holds; arguments as those of `pack_stream`."""

    def size_of(run: Segment) -> tuple[int, ...]:
        check_fits(run, seq_len, text_len, segment_conditions)
        return len(run.patches), len(run.text), 1

    return BestFit(runs, size_of, (seq_len, text_len, max_segments), window)


def check_fits(run: Segment, seq_len: int, text_len: int, conditions: int = 1) -> None:
    """Raises UserError if `run` is longer than a row, has no tokens or too many conditions."""
    n, m = len(run.patches), len(run.text)
    if n == 0:
        raise UserError(f"The run {run.key!r} has no tokens: leave it out.")
    if n > seq_len or m > text_len:
        raise UserError(
            f"The run {run.key!r} has {n} tokens and {m} text tokens, but a row holds {seq_len} and {text_len}: "
            "use longer rows or a shorter or smaller clip."
        )
    if run.conditions > conditions:
        raise UserError(
            f"The run {run.key!r} has {run.conditions} conditions (levels of noise, words in force), but it may have "
            f"{conditions}: use fewer, or fewer cards in a storyboard."
        )


def _with_conditions(columns: dict[str, np.ndarray], conditions: int) -> PackedBatch:
    """The batch of `columns`, with its table: an entry for each run's start levels and words in force."""
    segments, start, time = columns["segment_ids"], columns["init_sigma"], columns.pop("caption_time")
    rows = len(segments)
    runs = np.zeros((rows, conditions + 1), np.int32)
    times, starts = (np.zeros((rows, conditions + 1), np.float32) for _ in range(2))
    ids, text_ids = np.zeros_like(segments), np.zeros_like(columns["text_segment_ids"])
    for row in range(rows):
        painted = (segments[row] > 0) & (start[row] > 0)
        told = np.stack([segments[row], -start[row], time[row]], axis=-1)[painted]
        entries, inverse = np.unique(told, axis=0, return_inverse=True)
        used = slice(1, 1 + len(entries))
        ids[row, painted] = 1 + inverse.reshape(-1)
        runs[row, used], starts[row, used], times[row, used] = entries[:, 0], -entries[:, 1], entries[:, 2]
        of_run = columns["text_segment_ids"][row][:, None] == runs[row][None, 1:]
        own = of_run & (columns["text_time"][row][:, None] == times[row][None, 1:])
        # Words that are nowhere in force take their run's first entry; words of a run that is given take 0.
        found = np.concatenate([own, of_run], axis=1) & (np.tile(runs[row, 1:], 2) > 0)
        text_ids[row] = np.where(found.any(1), 1 + found.argmax(1) % conditions, 0)
    return PackedBatch(
        **columns,
        condition_ids=ids,
        text_condition_ids=text_ids,
        condition_segment_ids=runs,
        condition_caption_time=times,
        condition_init_sigma=starts,
    )


def _empty_columns(like: Segment, rows: int, seq_len: int, text_len: int) -> dict[str, np.ndarray]:
    lengths = dict.fromkeys(_OF_TOKENS, seq_len) | dict.fromkeys(_OF_WORDS, text_len)
    columns = {
        name: np.zeros((rows, length, *getattr(like, name).shape[1:]), getattr(like, name).dtype)
        for name, length in lengths.items()
    }
    ids = {"segment_ids": seq_len, "text_segment_ids": text_len}
    return columns | {name: np.zeros((rows, length), np.int32) for name, length in ids.items()}
