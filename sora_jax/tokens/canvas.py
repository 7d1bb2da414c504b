"""The canvas: latents, what of them is given, and where σ starts. Every ability is a short function that paints one.

It begins as a `Sketch`: frames of pixels, and for each pixel how far it is to be repainted: 0 is given, 1 is to be
painted from nothing. Encoded, it is a `Canvas`; and windows of that are the runs
which the sampler fills, knowing nothing of abilities.

The autoencoder codes the first frame of a clip alone and later ones in groups of four, each looking back at those
before. So a clip that is given in the middle or at the end is coded as a stream of its own: `lay_streams` cuts a
clip into streams such that what is given decodes to the autoencoder's own reconstruction of it, whatever is
painted around. A group that overlaps the stream after it shows a few frames twice; the later stream's are kept.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from sora_jax.errors import UserError
from sora_jax.tokens.packing import Segment, active_caption_time
from sora_jax.tokens.patches import CoordinateMode, Grid, coordinates, patchify, reference_patches

GROUP = 4  # video frames of a latent frame, but for a stream's first


@dataclasses.dataclass(frozen=True)
class Sketch:
    """A clip with gaps.

    Attributes:
      frames: uint8[T,Y,X,3]; what is to be painted from nothing may hold anything.
      strength: float32[T,Y,X], how far each pixel is repainted, as a share of the sampler's way: 0 is given, 1 is to
        be painted from nothing. (The σ that it means depends on how many tokens the model sees, `flow.shift`.)
      fps: frames a second.
    """

    frames: np.ndarray
    strength: np.ndarray
    fps: float

    @property
    def blank(self) -> bool:
        """Whether one number stands for all of `strength`, as `abilities.blank` has it: everything is open."""
        return not any(self.strength.strides) and bool(self.strength.flat[0] == 1)

    @property
    def fixed(self) -> np.ndarray:
        """bool[T]: frames that are given whole."""
        return np.zeros(len(self.frames), bool) if self.blank else (self.strength == 0).all((1, 2))


@dataclasses.dataclass(frozen=True)
class Stream:
    """Video frames begin … begin + frames − 1 as one stream of the autoencoder: 1 + 4k of them."""

    begin: int
    frames: int

    @property
    def ends(self) -> np.ndarray:
        """The last video frame of each latent frame."""
        return self.begin + np.arange(0, self.frames, GROUP)


def lay_streams(fixed: Sequence[bool] | np.ndarray) -> list[Stream]:
    """Cuts a clip into streams so that each frame of `fixed` lies in a latent frame that shows fixed ones alone.

    n given frames in a row are 1 + 4k, before them up to three single ones; what is to be painted behind them
    continues their stream. Streams cover every frame, and may run over the next one's begin or the clip's end.
    """
    fixed = np.asarray(fixed, bool)
    edges = np.flatnonzero(np.diff(fixed)) + 1
    streams: list[Stream] = []
    for begin, end in zip([0, *edges], [*edges, len(fixed)], strict=True):
        begin, length = int(begin), int(end - begin)
        if fixed[begin]:
            alone = (length - 1) % GROUP
            streams += [Stream(begin + i, 1) for i in range(alone)]
            streams.append(Stream(begin + alone, length - alone))
        elif streams:
            streams[-1] = Stream(streams[-1].begin, streams[-1].frames + _up(length))
        else:
            streams.append(Stream(0, 1 + _up(length - 1)))
    return streams


def check_groups(frames: int) -> None:
    """Raises UserError where an autoencoder's latent frame doesn't show `GROUP` video frames."""
    if frames != GROUP:
        raise UserError(
            f"The autoencoder's latent frames show {frames} video frames, and canvases are laid for {GROUP}: choose "
            "vae.strides whose first numbers multiply to that."
        )


def _up(frames: int) -> int:
    return -(-frames // GROUP) * GROUP


def frames_shown(streams: Sequence[Stream], frames: int) -> list[np.ndarray]:
    """Which of a clip's `frames` each latent frame shows; what lies beyond the clip's end shows its last."""
    return [
        np.minimum(np.arange(end if end == stream.begin else end - GROUP + 1, end + 1), frames - 1)
        for stream in streams
        for end in stream.ends
    ]


@dataclasses.dataclass(frozen=True)
class Canvas:
    """Latents to fill, and how they lie in the clip.

    Attributes:
      latent: float32[t,y,x,c]; what is to be painted from nothing may hold anything.
      init_sigma: float32[t,y,x], where σ starts, 0…1; 0 is given.
      ends: int[t], the last video frame of each latent frame.
      first: bool[t], whether it begins a stream: shows one video frame alone.
      fps: of the video.
      corner, frame: where it lies in a larger frame (top, left), and that one's (height, width), in cells; None is
        this frame itself.
    """

    latent: np.ndarray
    init_sigma: np.ndarray
    ends: np.ndarray
    first: np.ndarray
    fps: float
    corner: tuple[int, int] = (0, 0)
    frame: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.latent)

    @property
    def grid(self) -> Grid:
        t, y, x, _ = self.latent.shape
        return t, y, x

    @property
    def fixed(self) -> np.ndarray:
        """bool[t]: latent frames that are given whole."""
        return ~self.init_sigma.any((1, 2))

    def part(self, frames: slice | np.ndarray) -> Canvas:
        """Some of its latent frames."""
        own = {name: getattr(self, name)[frames] for name in ("latent", "init_sigma", "ends", "first")}
        return dataclasses.replace(self, **own)

    def crop(self, top: int, left: int, height: int, width: int) -> Canvas:
        """A window of the frame, which keeps its place in it; in cells."""
        window = np.s_[:, top : top + height, left : left + width]
        corner = (self.corner[0] + top, self.corner[1] + left)
        frame = self.frame or (self.grid[1], self.grid[2])
        return dataclasses.replace(
            self, latent=self.latent[window], init_sigma=self.init_sigma[window], corner=corner, frame=frame
        )

    def streams(self) -> list[slice]:
        """The latent frames of each stream; what precedes the first begin is a stream's end."""
        begins = sorted({0, *np.flatnonzero(self.first).tolist()})
        return [slice(a, b) for a, b in zip(begins, [*begins[1:], len(self)], strict=True)]


def make_canvas(
    streams: Sequence[Stream], latents: Sequence[np.ndarray], start: np.ndarray, fps: float, cells: Grid
) -> Canvas:
    """Puts encoded streams together.

    Args:
      streams: of `lay_streams`.
      latents: float32[t,y,x,c] of each.
      start: float32[T,Y,X] of the video's frames; a cell starts where the noisiest of its pixels does, so it is
        given only where all of them are.
      fps: of the video.
      cells: pixels of a latent cell (frames, height, width); `start`'s height and width are multiples.
    """
    _, high, wide = cells
    T, Y, X = start.shape
    blocks = start.reshape(T, Y // high, high, X // wide, wide).max((2, 4))
    ends = np.concatenate([stream.ends for stream in streams])
    first = np.concatenate([stream.ends == stream.begin for stream in streams])
    groups = [blocks[shown].max(0) for shown in frames_shown(streams, T)]
    return Canvas(np.concatenate(latents).astype(np.float32), np.stack(groups), ends, first, fps)


def blank_canvas(stream: Stream, cells: tuple[int, int], channels: int, fps: float) -> Canvas:
    """Nothing is given of one stream of frames, each of so many cells (y, x): holds one number for them all."""
    grid = (len(stream.ends), *cells)
    latent, start = (
        np.broadcast_to(np.float32(value), shape) for value, shape in ((0, (*grid, channels)), (1, grid))
    )
    return Canvas(latent, start, stream.ends, stream.ends == stream.begin, fps)


def to_segment(
    canvas: Canvas,
    patch: Grid,
    text: np.ndarray,
    text_time: np.ndarray,
    mode: CoordinateMode = "fractional",
    key: str = "",
) -> Segment:
    """The canvas as tokens. Time counts from its earliest latent frame, whatever part of a clip it is.

    Args:
      text: float[m,E], states of its words.
      text_time: float[m], seconds of the canvas's own clock (`ends` over `fps`) from which they hold; those that
        another has replaced before the canvas begins are left out.
    """
    if patch[0] > 1 and canvas.first[1:].any():
        raise UserError(
            f"A patch of {patch[0]} latent frames can't hold clips that are given in the middle: use dit.patch=(1, …)."
        )
    # The earliest, not the first: a stream's last frame may lie behind the next one's first, and two cards that
    # hold there must not both begin at 0.
    zero = int(canvas.ends.min())
    time = canvas.ends.reshape(-1, patch[0]).mean(1) / canvas.fps
    # Words are found by their time, so it is one type, whatever that of a record.
    text_time, begin = text_time.astype(np.float32), np.float32(zero / canvas.fps)
    in_force = active_caption_time(time, text_time)
    needed = text_time >= in_force.min() - 1e-3
    held, in_force = np.maximum(text_time[needed] - begin, 0), np.maximum(in_force - begin, 0)
    start = patchify(canvas.init_sigma[..., None], patch).max(1).astype(np.float32)
    patches = patchify(canvas.latent, patch).astype(np.float32)
    by_time = (len(time), -1)
    reference = reference_patches(patches.reshape(*by_time, patches.shape[1]), start.reshape(by_time), time)
    return Segment(
        patches=patches,
        coords=coordinates(
            canvas.grid,
            patch,
            canvas.fps,
            GROUP,
            mode,
            canvas.ends - zero,
            canvas.first,
            canvas.corner,
            canvas.frame,
        ),
        init_sigma=start,
        caption_time=np.repeat(in_force, len(start) // len(in_force)),
        text=text[needed].astype(np.float32),
        text_time=held,
        key=key,
        reference=reference.reshape(len(patches), -1),
    )


def space_window(grid: Grid, patch: Grid, frame_tokens: int) -> tuple[int, int]:
    """Height and width, in cells, of the window of a frame that takes at most `frame_tokens` tokens.

    The whole frame where that fits; else about square.
    """
    rows, columns = (size // by for size, by in zip(grid[1:], patch[1:], strict=True))
    if rows * columns > frame_tokens:
        side = math.isqrt(frame_tokens)
        if rows < columns:
            rows = min(rows, side)
            columns = min(columns, frame_tokens // rows)
        else:
            columns = min(columns, side)
            rows = min(rows, frame_tokens // columns)
    return rows * patch[1], columns * patch[2]


def space_windows(sides: tuple[int, int], patch: Grid, frame_tokens: int) -> list[tuple[int, int, int, int]]:
    """Windows (top, left, height, width) in cells that cover a frame and overlap by a third or more."""
    height, width = space_window((1, *sides), patch, frame_tokens)
    axes = []
    for full, own, by in zip(sides, (height, width), patch[1:], strict=True):
        step = max(2 * own // (3 * by), 1) * by
        count = 1 + math.ceil((full - own) / step)
        axes.append([round((full - own) * i / max(count - 1, 1) / by) * by for i in range(count)])
    return [(top, left, height, width) for top in axes[0] for left in axes[1]]


def blend_windows(
    latents: Sequence[np.ndarray], places: Sequence[tuple[int, int, int, int]], sides: Sequence[int]
) -> np.ndarray:
    """float32[t,y,x,c] of a frame of `sides` (y, x): windows fade into one another where they overlap."""
    total = np.zeros((len(latents[0]), *sides, latents[0].shape[3]), np.float32)
    weight = np.zeros((*sides, 1), np.float32)
    for latent, (top, left, height, width) in zip(latents, places, strict=True):
        ramps = [
            np.minimum(np.arange(n) + 1, np.arange(n, 0, -1)).astype(np.float32) for n in (height, width)
        ]
        own = (ramps[0][:, None] * ramps[1])[..., None]
        total[:, top : top + height, left : left + width] += own * latent
        weight[top : top + height, left : left + width] += own
    return total / weight


def windows(canvas: Canvas, most: int, context: int, by: int = 1) -> list[tuple[slice, slice]]:
    """Cuts a canvas that is longer than `most` latent frames into pieces that are filled one after another.

    Each is (window, new): the latent frames the model sees, and those of them that it fills then; those filled
    before, or given, are its context. From what is given first the windows walk forward to the end, then backward
    to the beginning.

    Args:
      most: latent frames of a window.
      context: of those, how many are to be known already; the rest is new.
      by: latent frames of a patch, whose multiples all of these are.
    """
    if canvas.fixed.all():
        return []
    if len(canvas) <= most:
        return [(slice(0, len(canvas)), slice(0, len(canvas)))]
    if not 0 < context < most:
        raise UserError(
            f"A window of {most} latent frames can't have {context} of context: less, at least one."
        )
    known = canvas.fixed.reshape(-1, by).all(1)
    most, context, last = most // by, context // by, len(known) - 1
    start = int(known.argmax())
    out: list[tuple[slice, slice]] = []
    for step, todo in ((1, start + np.flatnonzero(~known[start:])), (-1, np.arange(start)[::-1])):
        while todo.size:
            # Context behind what comes next, and as much beyond it as there is room for: given frames ahead are seen.
            near = max(todo[0] - context, start) if step > 0 else min(todo[0] + context, last)
            low, high = sorted((int(near), int(np.clip(near + step * (most - 1), 0, last))))
            count = np.count_nonzero((low <= todo) & (todo <= high))
            new, todo = todo[:count], todo[count:]
            out.append(
                (slice(low * by, (high + 1) * by), slice(int(new.min()) * by, (int(new.max()) + 1) * by))
            )
    return out
