"""Lists and streams of segments as packed batches."""

from collections.abc import Sequence

import grain

from sora_jax.errors import UserError
from sora_jax.tokens.packing import (
    PackedBatch,
    Placement,
    Segment,
    check_fits,
    first_fit_decreasing,
    pack_batch,
    stream_sequences,
)


def pack_segments(
    segments: Sequence[Segment],
    seq_len: int,
    text_len: int,
    max_segments: int,
    batch_size: int | None = None,
    conditions: int | None = None,
) -> tuple[PackedBatch, list[Placement]]:
    """Packs a finite list of segments into few sequences (first-fit decreasing), in NumPy.

    Args:
      segments: at least one; all with the same P and E.
      seq_len: N, token positions per sequence.
      text_len: M, text positions per sequence.
      max_segments: K, the most segments a sequence may hold.
      batch_size: pads with empty sequences to exactly this many, for a shape that is known beforehand.
      conditions: S - 1, entries of a sequence's table; None is `max_segments`, one a segment.

    Returns:
      The batch and one placement per segment, in the order of `segments`, for `unpack`.

    Raises:
      UserError: there is no segment, one is longer than a sequence, or `batch_size` is too small.
    """
    if not segments:
        raise UserError("There is nothing to pack: give at least one segment.")
    conditions = max_segments if conditions is None else conditions
    for segment in segments:
        check_fits(segment, seq_len, text_len, conditions)
    packed = first_fit_decreasing(segments, seq_len, text_len, max_segments, conditions)
    if batch_size is not None and len(packed) > batch_size:
        raise UserError(
            f"{len(segments)} segments need {len(packed)} sequences, but the batch has {batch_size}: give more or "
            "longer sequences."
        )
    batch, placements = pack_batch(
        [[segments[i] for i in row] for row in packed],
        batch_size or len(packed),
        seq_len,
        text_len,
        conditions,
    )
    by_index = dict(zip((i for row in packed for i in row), placements, strict=True))
    return batch, [by_index[i] for i in range(len(segments))]


def pack_stream(
    segments: grain.IterDataset,
    seq_len: int,
    text_len: int,
    max_segments: int,
    batch_size: int,
    num_bins: int = 16,
    segment_conditions: int = 1,
) -> grain.IterDataset:
    """Packs a stream of `Segment`s into a stream of PackedBatch (NumPy).

    `num_bins` sequences are open at a time (see `bins`); more of them waste fewer positions (experiments/packing), but
    cost memory and, on resuming, the time to read their segments again. The iterator's state is exact. A finite stream
    ends with empty sequences that complete its last batch. A segment may have `segment_conditions` conditions.
    """
    packed = stream_sequences(segments, seq_len, text_len, max_segments, num_bins, segment_conditions)

    def collate(sequences: Sequence[Sequence[Segment]]) -> PackedBatch:
        return pack_batch(sequences, batch_size, seq_len, text_len, max_segments * segment_conditions)[0]

    return packed.batch(batch_size, batch_fn=collate)
