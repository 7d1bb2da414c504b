"""Windows of time for decoders that see later frames: they take no stream, so they decode parts that overlap."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from sora_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Windows:
    """How a clip's latent frames are cut.

    A window has `frames` of its own and `overlap` more on either side, of which nothing is kept; the first reaches
    from the clip's begin on, the last to its end. All have one length, so one compiled program serves them.

    Attributes:
      frames: latent frames, at least 1.
      overlap: with as many as the decoder sees, windows are the whole, up to rounding.

    Raises:
      UserError: a number is too small.
    """

    frames: int
    overlap: int

    def __post_init__(self) -> None:
        if self.frames < 1 or self.overlap < 0:
            raise UserError(
                f"A clip can't be decoded {self.frames} latent frames at a time with an overlap of {self.overlap}: at "
                "least 1 and 0."
            )

    @property
    def size(self) -> int:
        """Latent frames of a window: one more before, since a decoder gives its first frame alone."""
        return self.frames + 2 * self.overlap + 1


def split_windows(latents: Iterable[np.ndarray], windows: Windows) -> Iterator[tuple[np.ndarray, int, int]]:
    """Cuts a stream of latent frames, of any number.

    Memory is that of a window and of the frames that the next one adds, which are read ahead.

    Yields:
      A window [n,y,x,c], and which of its frames are its own: from the first number up to the second.
    """
    rest = iter(latents)
    held, start = list(itertools.islice(rest, windows.size)), 0
    while held:
        more = list(itertools.islice(rest, windows.frames))
        end = len(held) - (windows.overlap if more else 0)
        yield np.stack(held), start, end
        if not more:
            return
        held, start = (held + more)[-windows.size :], end - len(more)
