"""A canvas that is denoised window by window, and what of it is in memory meanwhile.

Latent frames are ready as soon as no later window changes them, and are forgotten as soon as no later window sees
them: the memory for a canvas that is denoised from its beginning on doesn't grow with its length.

What a window gets wrong is given to the next, and adds up. Against that the context of later windows may be shown
partially noised, so that the model repairs it (diffusion forcing, Chen et al. 2024); what has been generated stays as
it is. And an early frame, the anchor, may be shown with it.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from sora_jax.errors import UserError
from sora_jax.tokens.canvas import Canvas, join, temporal_windows
from sora_jax.tokens.patches import Grid, unpatchify

# Latent frames from the anchor to the context's first, as the model is told: as if one followed the other. Told that
# seconds are between, the bundled model paints a cut to another ground (experiments/long).
MAX_ANCHOR_GAP = 1


@dataclasses.dataclass(frozen=True)
class Context:
    """What later windows are shown of earlier ones.

    Attributes:
      frames: latent frames that are known already; the rest of a window is new.
      noise: the σ, 0…1, that those generated before start from; their result is discarded. 0: they are conditioning.
      anchor: whether one frame from before is shown too, see `WindowedCanvas.anchors`.
      shots: seconds from which captions hold, in order; an anchor is of the shot that the window begins in.
    """

    frames: int
    noise: float = 0.0
    anchor: bool = False
    shots: tuple[float, ...] = (0.0,)


class WindowedCanvas:
    """A canvas being denoised.

    Args:
      canvas: conditioning latents, and the sigma that the others start from.
      max_frames: latent frames of a window.
      context: what later windows see of earlier ones.
      patch: latent cells of a token.
      seed: of the noise.
      noise: float32[t,y,x,c] in place of what the seed draws.

    Raises:
      UserError: that is of another shape than the canvas.

    Attributes:
      windows: those that are left.
      ready: float32[y,x,c] each, finished latent frames in order of time that were not taken yet.
    """

    def __init__(
        self,
        canvas: Canvas,
        max_frames: int,
        context: Context,
        patch: Grid,
        seed: int,
        noise: np.ndarray | None = None,
    ) -> None:
        self.canvas, self.patch, self.context = canvas, patch, context
        anchor = context.anchor and context.frames < max_frames - patch[0]  # where there is room for it
        self.windows = deque(temporal_windows(canvas, max_frames, context.frames, patch[0], anchor))
        self.anchors = deque(self._find_anchors() if anchor else [None] * len(self.windows))
        self.ready: deque[np.ndarray] = deque()
        # Of each window the first latent frame that later ones see, and that they change.
        self._needed_from, self._final_until = (
            deque(_least_after([window[i].start for window in self.windows], len(canvas))) for i in (0, 1)
        )
        # Of each anchor how many windows are left after the last that sees it.
        self._anchor_until = {
            anchor: len(self.anchors) - 1 - number
            for number, anchor in enumerate(self.anchors)
            if anchor is not None
        }
        self._generated: dict[int, np.ndarray] = {}  # by latent frame
        self._noise: dict[int, np.ndarray] = {}  # by latent frame, as far as it is drawn
        self._drawn = self._final = 0
        if noise is not None:
            if noise.shape != canvas.latent.shape:
                wanted, given = (" x ".join(map(str, shape)) for shape in (canvas.latent.shape, noise.shape))
                raise UserError(
                    f"The noise is {given} and the video's latent {wanted} (time, height, width, channels): give noise "
                    "of that shape."
                )
            self._noise = dict(enumerate(noise.astype(np.float32)))
            self._drawn = len(noise)
        self._generator = np.random.default_rng(seed)
        if not self.windows:
            self._release(len(canvas), len(canvas))

    @property
    def held(self) -> int:
        """Latent frames, of noise too, that take memory besides the canvas's own."""
        return len(self._generated) + len(self._noise) + len(self.ready)

    @property
    def fresh(self) -> slice:
        """Those frames of `next_window` that are new."""
        (window, new), anchor = self.windows[0], self.anchors[0]
        before = window.start - (0 if anchor is None else self.patch[0])
        return slice(new.start - before, new.stop - before)

    def next_window(self) -> tuple[Canvas, np.ndarray]:
        """The next window as far as it is generated, its anchor first, and its noise float32[t,y,x,c]."""
        (window, _), anchor = self.windows[0], self.anchors[0]
        self._draw(window.stop)
        numbers = range(window.start, window.stop)
        part, noise = self._part(numbers), np.stack([self._noise[i] for i in numbers])
        for place, number in enumerate(numbers):
            if self.context.noise and number in self._generated:
                part.init_sigma[place] = np.minimum(self.context.noise, self.canvas.init_sigma[number])
        if anchor is None:
            return part, noise
        first = self._part(range(anchor, anchor + self.patch[0]))
        gap = int(part.ends[0] - first.ends[-1])
        first = dataclasses.replace(first, ends=first.ends + max(gap - MAX_ANCHOR_GAP * part.stride, 0))
        return join(first, part), np.concatenate([np.zeros_like(first.latent), noise])

    def put(self, latent: np.ndarray) -> None:
        """Takes the next window denoised, float32[t,y,x,c]; conditioning, and what was generated before, stays."""
        fresh = latent[self.fresh]
        _, new = self.windows.popleft()
        self.anchors.popleft()
        part = self._part(range(new.start, new.stop))
        generated = np.where(part.init_sigma[..., None] > 0, fresh, part.latent)
        self._generated |= zip(range(new.start, new.stop), generated, strict=True)
        self._release(self._final_until.popleft(), self._needed_from.popleft())

    def _find_anchors(self) -> Iterator[int | None]:
        """Of each window the first latent frame of its anchor, if it has one.

        That is the latest patch of frames before the window that is conditioning whole, else the first; of the shot
        that the window's new frames begin in. Windows that are generated backward have none.
        """
        pt, shots = self.patch[0], np.unique(self.context.shots)
        time = self.canvas.ends.reshape(-1, pt).mean(1) / self.canvas.fps
        begins = [int(np.argmax(time >= shot - 1e-3)) for shot in shots]
        known = self.canvas.conditioning_frames.reshape(-1, pt).all(1)
        latest = np.maximum.accumulate(np.where(known, np.arange(len(known)), -1))
        for window, new in self.windows:
            begin = begins[max(int(np.searchsorted(begins, new.start // pt, side="right")) - 1, 0)]
            before = window.start // pt - 1
            has = new.start > window.start and begin <= before
            yield int(max(latest[before], begin)) * pt if has else None

    def _part(self, numbers: range) -> Canvas:
        part = self.canvas.part(slice(numbers.start, numbers.stop))
        latent, start = part.latent.copy(), part.init_sigma.copy()
        for place, number in enumerate(numbers):
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
                until = self._anchor_until.get(number - number % self.patch[0], len(self.windows))
                if held is self._noise or until >= len(self.windows):
                    del held[number]


def _least_after(numbers: Sequence[int], end: int) -> list[int]:
    """Of each number the least of those after it; `end` after the last."""
    return np.minimum.accumulate([end, *numbers[::-1]])[-2::-1].tolist()
