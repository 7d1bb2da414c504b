"""Ways to lay runs into rows. Each takes sizes (tokens, words) and yields rows: lists of sizes that lie together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import grain

from sora_jax.tokens.bins import BestFit

Size = tuple[int, int]
Rows = list[list[Size]]


class Room:
    """What a row holds: tokens, words, runs."""

    def __init__(self, tokens: int, words: int, runs: int) -> None:
        self.tokens, self.words, self.runs = tokens, words, runs

    def has(self, row: list[Size], size: Size) -> bool:
        taken, told = (sum(parts) for parts in zip(*row, strict=True)) if row else (0, 0)
        return taken + size[0] <= self.tokens and told + size[1] <= self.words and len(row) < self.runs


def first_fit(sizes: Iterable[Size], room: Room, window: int) -> Iterator[list[Size]]:
    """`window` rows are open, a run takes the first it fits; where it fits none, all close (Grain's)."""
    return _open_rows(sizes, room, window, choose=lambda fitting: fitting[0])


def best_fit(sizes: Iterable[Size], room: Room, window: int) -> Iterator[list[Size]]:
    """The same, but a run takes the fullest row it fits."""
    return _open_rows(sizes, room, window, choose=lambda fitting: max(fitting, key=_filled))


def best_fit_one_closes(sizes: Iterable[Size], room: Room, window: int) -> Iterator[list[Size]]:
    """Best fit, and where a run fits nowhere the fullest row alone closes (ours: `sora_jax/tokens/bins.py`)."""
    stream = grain.MapDataset.source([*sizes]).to_iter_dataset(grain.ReadOptions(0, 0))
    yield from BestFit(stream, lambda size: (*size, 1), (room.tokens, room.words, room.runs), window)


def first_fit_decreasing(sizes: Iterable[Size], room: Room, window: int) -> Iterator[list[Size]]:
    """Runs of about `window` rows are collected, packed longest first, and their rows close (NeMo's)."""
    waiting: list[Size] = []
    for size in sizes:
        waiting.append(size)
        if sum(tokens for tokens, _ in waiting) >= window * room.tokens:
            yield from _decreasing(waiting, room)
            waiting = []
    if waiting:
        yield from _decreasing(waiting, room)


PACKERS: dict[str, Callable[[Iterable[Size], Room, int], Iterator[list[Size]]]] = {
    "first fit": first_fit,
    "best fit": best_fit,
    "first fit decreasing": first_fit_decreasing,
    "best fit, one closes": best_fit_one_closes,
}


def _open_rows(
    sizes: Iterable[Size], room: Room, window: int, choose: Callable[[Rows], list[Size]]
) -> Iterator[list[Size]]:
    rows: Rows = []
    for size in sizes:
        fitting = [row for row in rows if room.has(row, size)]
        if fitting:
            choose(fitting).append(size)
            continue
        if len(rows) == window:
            yield from rows
            rows = []
        rows.append([size])
    yield from rows


def _decreasing(sizes: list[Size], room: Room) -> Rows:
    rows: Rows = []
    for size in sorted(sizes, reverse=True):
        row = next((row for row in rows if room.has(row, size)), None)
        if row is None:
            rows.append(row := [])
        row.append(size)
    return rows


def _filled(row: list[Size]) -> int:
    return sum(tokens for tokens, _ in row)
