"""Three ways to make batches of a stream of runs, with the same budget of slots a step."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from sora_jax.tokens.packing import PackedBatch, Segment, pack_batch, stream_sequences

WAYS = ("padding", "buckets", "packing")
OPEN = 64  # rows that packing fills at a time


def batches(
    runs: Sequence[Segment],
    way: str,
    slots: int,
    longest: int,
    words: int,
    room: tuple[int, int],
    conditions: int = 1,
) -> Iterator[PackedBatch]:
    """Batches without end, of at most `slots` slots; only those of buckets differ in shape.

    Args:
      runs: any sequence, read in order and again from the beginning.
      way: of WAYS. Padding: rows as long as the longest run, one run each. Buckets: rows as long as the runs of one
        shape. Packing: one row.
      longest: tokens of the longest run.
      words: a caption's slots where it has a row of its own.
      room: words and runs that a packed row holds.
      conditions: that a run may have.
    """
    if way == "packing":
        stream = grain.MapDataset.source(_Runs(runs)).repeat().to_iter_dataset(grain.ReadOptions(0, 0))
        for row in stream_sequences(stream, slots, *room, num_bins=OPEN, segment_conditions=conditions):
            yield pack_batch([row], 1, slots, room[0], room[1] * conditions)[0]
        return
    if longest > slots:
        raise ValueError(f"A run of {longest} tokens is longer than a step of {slots} slots.")
    waiting: dict[Any, list[Segment]] = collections.defaultdict(list)
    number = 0
    while True:
        run = runs[number % len(runs)]
        number += 1
        key = shape_of(run) if way == "buckets" else ()
        length = len(run.patches) if way == "buckets" else longest
        group = waiting[key]
        group.append(run)
        if len(group) == slots // length:
            yield pack_batch([[run] for run in group], slots // length, length, words, conditions)[0]
            group.clear()


def shape_of(run: Segment) -> tuple[int, ...]:
    """Its tokens along time, height and width."""
    return tuple(len(np.unique(run.coords[:, axis])) for axis in range(3))


class _Runs:
    """What Grain takes for a source."""

    def __init__(self, runs: Sequence[Segment]) -> None:
        self.runs = runs

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, index: int) -> Segment:
        return self.runs[int(index)]
