"""A clip with its captions: what every data set yields, and what the pipeline takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Protocol

from sora_jax.media.video import Video


@dataclasses.dataclass(frozen=True)
class Clip:
    """A video and its captions.

    Attributes:
      video: frames and rate.
      captions: by kind; `"short"` always exists (empty where nothing is known), `"detailed"` where the set has it.
      timed: (start in seconds, text) for each shot, in order.
      key: names the clip within its data set.
    """

    video: Video
    captions: dict[str, str]
    timed: tuple[tuple[float, str], ...]
    key: str


class ClipSource(Protocol):
    """A random-access data set: deterministic in (configuration, index), cheap to construct, picklable."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Clip: ...


def read_clips(source: ClipSource, indices: Iterable[int]) -> Iterator[tuple[int, Clip]]:
    """Each index with its clip, in the order that costs the source least: its own `read`, or as they come."""
    if hasattr(source, "read"):
        yield from source.read(indices)
    else:
        yield from ((index, source[index]) for index in indices)
