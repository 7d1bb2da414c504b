"""A canvas that is denoised window by window, and what of it is in memory meanwhile.

Latent frames are ready as soon as no later window changes them, and are forgotten as soon as no later window sees
them: the memory for a canvas that is denoised from its beginning on doesn't grow with its length.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Sequence

import numpy as np

from sora_jax.tokens.canvas import Canvas, temporal_windows
from sora_jax.tokens.patches import Grid, unpatchify


class WindowedCanvas:
    """A canvas being denoised.

    Args:
      canvas: conditioning latents, and the sigma that the others start from.
      max_frames, context: as `canvas.temporal_windows` takes them.
      patch: latent cells of a token.
      seed: of the noise.

    Attributes:
      windows: those that are left.
      ready: float32[y,x,c] each, finished latent frames in order of time that were not taken yet.
    """

    def __init__(self, canvas: Canvas, max_frames: int, context: int, patch: Grid, seed: int) -> None:
        self.canvas, self.patch = canvas, patch
        self.windows = deque(temporal_windows(canvas, max_frames, context, patch[0]))
        self.ready: deque[np.ndarray] = deque()
        # Of each window the first latent frame that later ones see, and that they change.
        self._needed_from, self._final_until = (
            deque(_least_after([window[i].start for window in self.windows], len(canvas))) for i in (0, 1)
        )
        self._generated: dict[int, np.ndarray] = {}  # by latent frame
        self._noise: dict[int, np.ndarray] = {}  # by latent frame, as far as it is drawn
        self._drawn = self._final = 0
        self._generator = np.random.default_rng(seed)
        if not self.windows:
            self._release(len(canvas), len(canvas))

    @property
    def held(self) -> int:
        """Latent frames, of noise too, that take memory besides the canvas's own."""
        return len(self._generated) + len(self._noise) + len(self.ready)

    def next_window(self) -> tuple[Canvas, np.ndarray]:
        """The next window as far as it is generated, and its noise float32[t,y,x,c]."""
        window, _ = self.windows[0]
        self._draw(window.stop)
        return self._part(window), np.stack([self._noise[i] for i in range(window.start, window.stop)])

    def put(self, latent: np.ndarray) -> None:
        """Takes the next window denoised, float32[t,y,x,c]; conditioning, and what was generated before, stays."""
        window, new = self.windows.popleft()
        part = self._part(new)
        fresh = latent[new.start - window.start : new.stop - window.start]
        generated = np.where(part.init_sigma[..., None] > 0, fresh, part.latent)
        self._generated |= zip(range(new.start, new.stop), generated, strict=True)
        self._release(self._final_until.popleft(), self._needed_from.popleft())

    def _part(self, frames: slice) -> Canvas:
        part = self.canvas.part(frames)
        latent, start = part.latent.copy(), part.init_sigma.copy()
        for place, number in enumerate(range(frames.start, frames.stop)):
            if number in self._generated:
                latent[place], start[place] = self._generated[number], 0
        return dataclasses.replace(part, latent=latent, init_sigma=start)

    def _draw(self, until: int) -> None:
        """Noise in order of time, as one draw of all the canvas's patches: the cut into windows doesn't matter."""
        (_, y, x, c), pt = self.canvas.latent.shape, self.patch[0]
        size, width = pt * y * x // math.prod(self.patch), math.prod(self.patch) * c
        while self._drawn < until:
            draw = self._generator.standard_normal((size, width)).astype(np.float32)
            frames = range(self._drawn, self._drawn + pt)
            self._noise |= zip(frames, unpatchify(draw, (pt, y, x), self.patch), strict=True)
            self._drawn += pt

    def _release(self, final: int, needed_from: int) -> None:
        """Frames before `final` are ready; those before `needed_from` are needed no more."""
        for number in range(self._final, final):
            self.ready.append(self._generated.get(number, self.canvas.latent[number]))
        self._final = final
        for held in (self._generated, self._noise):
            for number in [number for number in held if number < needed_from]:
                del held[number]


def _least_after(numbers: Sequence[int], end: int) -> list[int]:
    """Of each number the least of those after it; `end` after the last."""
    return np.minimum.accumulate([end, *numbers[::-1]])[-2::-1].tolist()
