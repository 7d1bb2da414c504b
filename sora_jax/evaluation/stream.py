"""Clips read and measured batch by batch, in memory that doesn't grow with their number, and kept as they are."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from sora_jax.evaluation.clips import ClipFile, ClipSettings, read_clip
from sora_jax.evaluation.measure import Batch, Measurer, Row
from sora_jax.evaluation.parts import Parts
from sora_jax.media.digests import value_digest

Progress = Callable[[int, int], None]  # (clips done, in all)

_PART = 16  # clips a part: what an interruption costs at most
_BATCH, _BATCH_BYTES = 8, 1 << 25
_READERS = 2


@dataclasses.dataclass(frozen=True)
class ClipJob:
    """A clip that is to be measured.

    Attributes:
      clip: it.
      other: the clip it is compared with, or None.
      of_reference: whether it belongs to a reference set, so that its features alone are wanted.
    """

    clip: ClipFile
    other: ClipFile | None = None
    of_reference: bool = False

    @property
    def key(self) -> str:
        """Names what its row is made of."""
        own, other = (
            None if c is None else [c.digest, c.start, c.size, c.fps] for c in (self.clip, self.other)
        )
        return value_digest([own, other, self.clip.caption, self.of_reference])


def measure_jobs(
    jobs: Sequence[ClipJob],
    rows: dict[str, Row],
    measurer: Measurer,
    settings: ClipSettings,
    store: Parts,
    progress: Progress,
) -> list[str]:
    """Measures what isn't in `rows` yet, adds it there and to the store; returns notes on the files."""
    waiting = list({job.key: job for job in jobs if job.key not in rows}.values())
    done, notes, unsaved = len(jobs) - len(waiting), dict[str, None](), dict[str, Row]()
    progress(done, len(jobs))
    try:
        for batch, pictures, references, remarks in _batches(waiting, settings):
            first = batch[0]
            measured = measurer.measure(
                Batch(pictures, references, [job.clip.caption for job in batch], first.clip.fps),
                first.of_reference,
            )
            unsaved |= {job.key: row for job, row in zip(batch, measured, strict=True)}
            notes |= dict.fromkeys(remarks)
            done += len(batch)
            progress(done, len(jobs))
            if len(unsaved) >= _PART:
                store.write(unsaved)
                rows |= unsaved
                unsaved = {}
    finally:  # where a file can't be read, or the user stops, what was measured stays
        if unsaved:
            store.write(unsaved)
            rows |= unsaved
    return list(notes)


def _batches(
    jobs: Sequence[ClipJob], settings: ClipSettings
) -> Iterator[tuple[list[ClipJob], np.ndarray, np.ndarray | None, list[str]]]:
    """Jobs of one kind and shape together, with their frames, which are read while those before are measured."""

    def alike(job: ClipJob) -> tuple[Any, ...]:
        return job.of_reference, job.clip.size, job.clip.fps

    def groups() -> Iterator[list[ClipJob]]:
        for (_, size, _), same in itertools.groupby(jobs, alike):
            most = max(1, min(_BATCH, _BATCH_BYTES // (settings.frames * size[0] * size[1] * 3)))
            while group := list(itertools.islice(same, most)):
                yield group

    def read(batch: list[ClipJob]) -> tuple[list[ClipJob], np.ndarray, np.ndarray | None, list[str]]:
        shown = [read_clip(job.clip, settings) for job in batch]
        others = [read_clip(job.other, settings) for job in batch if job.other]
        references = np.stack([frames for frames, _ in others]) if others else None
        return (
            batch,
            np.stack([frames for frames, _ in shown]),
            references,
            [n for _, ns in (*shown, *others) for n in ns],
        )

    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        ahead: list[concurrent.futures.Future] = []
        for group in groups():
            ahead.append(pool.submit(read, group))
            if len(ahead) > _READERS:
                yield ahead.pop(0).result()
        while ahead:
            yield ahead.pop(0).result()
