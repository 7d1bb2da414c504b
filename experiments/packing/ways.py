"""Three ways to make batches of a stream of segments, with the same budget of slots a step."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from typing import Any

import grain

from sora_jax.tokens.packing import PackedBatch, Segment, pack_batch, stream_sequences

WAYS = ("padding", "buckets", "packing")
OPEN = 64  # sequences that packing fills at a time


def batches(
    segments: Sequence[Segment],
    way: str,
    slots: int,
    longest: int,
    text_len: int,
    capacity: tuple[int, int],
    conditions: int = 1,
) -> Iterator[PackedBatch]:
    """Batches without end, of at most `slots` slots; only those of buckets differ in shape.

    Args:
      segments: any sequence, read in order and again from the beginning.
      way: of WAYS. Padding: sequences as long as the longest segment, one segment each. Buckets: as long as the
        segments of one shape. Packing: one sequence.
      longest: tokens of the longest segment.
      text_len: a caption's slots where it has a sequence of its own.
      capacity: text tokens and segments that a packed sequence holds.
      conditions: that a segment may have.
    """
    if way == "packing":
        stream = (
            grain.MapDataset.source(_Segments(segments)).repeat().to_iter_dataset(grain.ReadOptions(0, 0))
        )
        for sequence in stream_sequences(
            stream, slots, *capacity, num_bins=OPEN, segment_conditions=conditions
        ):
            yield pack_batch([sequence], 1, slots, capacity[0], capacity[1] * conditions)[0]
        return
    if longest > slots:
        raise ValueError(f"A segment of {longest} tokens is longer than a step of {slots} slots.")
    waiting: dict[Any, list[Segment]] = collections.defaultdict(list)
    number = 0
    while True:
        segment = segments[number % len(segments)]
        number += 1
        key = segment.shape if way == "buckets" else ()
        length = len(segment.patches) if way == "buckets" else longest
        group = waiting[key]
        group.append(segment)
        if len(group) == slots // length:
            yield pack_batch([[segment] for segment in group], slots // length, length, text_len, conditions)[
                0
            ]
            group.clear()


class _Segments:
    """What Grain takes for a source."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = segments

    def __len__(self) -> int:
        return len(self.segments)

    def __getitem__(self, index: int) -> Segment:
        return self.segments[int(index)]
