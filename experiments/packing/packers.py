"""Ways to pack segments. Each takes sizes (tokens, text tokens) and yields sequences: lists of sizes that share one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import grain

from sora_jax.tokens.bins import BestFit

Size = tuple[int, int]
Sequences = list[list[Size]]


class Capacity:
    """What a sequence holds: tokens, text, segments."""

    def __init__(self, tokens: int, text: int, segments: int) -> None:
        self.tokens, self.text, self.segments = tokens, text, segments

    def holds(self, sequence: list[Size], size: Size) -> bool:
        taken, text = (sum(parts) for parts in zip(*sequence, strict=True)) if sequence else (0, 0)
        return (
            taken + size[0] <= self.tokens and text + size[1] <= self.text and len(sequence) < self.segments
        )


def first_fit(sizes: Iterable[Size], capacity: Capacity, num_bins: int) -> Iterator[list[Size]]:
    """`num_bins` sequences are open, a segment takes the first it fits; where it fits none, all close (Grain's)."""
    return _open_sequences(sizes, capacity, num_bins, choose=lambda fitting: fitting[0])


def best_fit(sizes: Iterable[Size], capacity: Capacity, num_bins: int) -> Iterator[list[Size]]:
    """The same, but a segment takes the fullest sequence it fits."""
    return _open_sequences(sizes, capacity, num_bins, choose=lambda fitting: max(fitting, key=_filled))


def best_fit_one_closes(sizes: Iterable[Size], capacity: Capacity, num_bins: int) -> Iterator[list[Size]]:
    """Best fit; where a segment fits nowhere the fullest sequence alone closes (ours: `sora_jax/tokens/bins.py`)."""
    stream = grain.MapDataset.source([*sizes]).to_iter_dataset(grain.ReadOptions(0, 0))
    yield from BestFit(
        stream, lambda size: (*size, 1), (capacity.tokens, capacity.text, capacity.segments), num_bins
    )


def first_fit_decreasing(sizes: Iterable[Size], capacity: Capacity, num_bins: int) -> Iterator[list[Size]]:
    """Segments of about `num_bins` sequences are collected, packed longest first, and all close (NeMo's)."""
    waiting: list[Size] = []
    for size in sizes:
        waiting.append(size)
        if sum(tokens for tokens, _ in waiting) >= num_bins * capacity.tokens:
            yield from _decreasing(waiting, capacity)
            waiting = []
    if waiting:
        yield from _decreasing(waiting, capacity)


PACKERS: dict[str, Callable[[Iterable[Size], Capacity, int], Iterator[list[Size]]]] = {
    "first fit": first_fit,
    "best fit": best_fit,
    "first fit decreasing": first_fit_decreasing,
    "best fit, one closes": best_fit_one_closes,
}


def _open_sequences(
    sizes: Iterable[Size], capacity: Capacity, num_bins: int, choose: Callable[[Sequences], list[Size]]
) -> Iterator[list[Size]]:
    sequences: Sequences = []
    for size in sizes:
        fitting = [sequence for sequence in sequences if capacity.holds(sequence, size)]
        if fitting:
            choose(fitting).append(size)
            continue
        if len(sequences) == num_bins:
            yield from sequences
            sequences = []
        sequences.append([size])
    yield from sequences


def _decreasing(sizes: list[Size], capacity: Capacity) -> Sequences:
    sequences: Sequences = []
    for size in sorted(sizes, reverse=True):
        sequence = next((sequence for sequence in sequences if capacity.holds(sequence, size)), None)
        if sequence is None:
            sequences.append(sequence := [])
        sequence.append(size)
    return sequences


def _filled(sequence: list[Size]) -> int:
    return sum(tokens for tokens, _ in sequence)
