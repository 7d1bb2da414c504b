"""A clip with its words: what every data set yields, and what the pipeline takes."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from sora_jax.video import Video


@dataclasses.dataclass(frozen=True)
class Clip:
    """A video and what is said of it.

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


class Source(Protocol):
    """A random-access data set: deterministic in (configuration, index), cheap to construct, picklable."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Clip: ...
