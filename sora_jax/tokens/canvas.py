"""The canvas: latents and the σ that each cell of them starts from. Every ability is a short function that makes one.

It begins as a `Sketch`: frames of pixels, and for each pixel a strength as in SDEdit: 0 is conditioning, 1 is
generated from noise. Encoded, it is a `Canvas`; temporal windows of that are the segments which the sampler
generates, without knowing of abilities.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from sora_jax.errors import UserError
from sora_jax.tokens.packing import Segment, active_caption_time
from sora_jax.tokens.patches import CoordinateMode, Grid, coordinates, patchify, reference_patches
from sora_jax.tokens.spans import FRAMES_PER_LATENT, PREFIX, CausalSpan, frames_shown


@dataclasses.dataclass(frozen=True)
class Sketch:
    """A clip and a strength for each of its pixels.

    Attributes:
      frames: uint8[T,Y,X,3]; where the strength is 1 they have no effect.
      strength: float32[T,Y,X], the share of the sampler's steps that each pixel takes: 0 is conditioning, 1 is
        generated from noise. (The σ that it means depends on how many tokens the model sees, `flow.shift`.)
      fps: frames a second.
    """

    frames: np.ndarray
    strength: np.ndarray
    fps: float

    @property
    def all_noise(self) -> bool:
        """Whether everything is generated: `strength` is one broadcast 1, as `sketches.all_noise` makes it."""
        return not any(self.strength.strides) and bool(self.strength.flat[0] == 1)

    @property
    def from_noise(self) -> bool:
        """Whether any pixel is generated from noise alone; known without a look at each where all of them are."""
        return self.all_noise or bool(self.strength.max() == 1)

    @property
    def conditioning_frames(self) -> np.ndarray:
        """bool[T]: frames of which every pixel is conditioning."""
        return np.zeros(len(self.frames), bool) if self.all_noise else (self.strength == 0).all((1, 2))


@dataclasses.dataclass(frozen=True)
class Canvas:
    """Latents to generate, and where they are in the clip.

    Attributes:
      latent: float32[t,y,x,c]; where `init_sigma` is 1 it has no effect.
      init_sigma: float32[t,y,x], the σ a cell starts from, 0…1; 0 is conditioning.
      ends: int[t], the last video frame of each latent frame.
      first: bool[t], whether it begins a span: shows one video frame alone.
      fps: of the video.
      corner, frame: its position in a larger frame (top, left), and that one's (height, width), in cells; None is
        this frame itself.
      stride: video frames of a latent frame, but for a span's first.
      beside: conditioning frames that the model sees besides, and that are no part of the clip; None: there are none.
      extra_channels: float32[t,y,x,c'] beside the latent's, see `packing.Segment`.
    """

    latent: np.ndarray
    init_sigma: np.ndarray
    ends: np.ndarray
    first: np.ndarray
    fps: float
    corner: tuple[int, int] = (0, 0)
    frame: tuple[int, int] | None = None
    stride: int = FRAMES_PER_LATENT
    beside: Canvas | None = None
    extra_channels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.latent)

    @property
    def grid(self) -> Grid:
        t, y, x, _ = self.latent.shape
        return t, y, x

    @property
    def conditioning_frames(self) -> np.ndarray:
        """bool[t]: latent frames of which every cell is conditioning."""
        return ~self.init_sigma.any((1, 2))

    def part(self, frames: slice | np.ndarray) -> Canvas:
        """Some of its latent frames."""
        own = {name: getattr(self, name)[frames] for name in ("latent", "init_sigma", "ends", "first")}
        extra = None if self.extra_channels is None else self.extra_channels[frames]
        return dataclasses.replace(self, **own, extra_channels=extra)

    def crop(self, top: int, left: int, height: int, width: int) -> Canvas:
        """A crop of each frame, and of those beside them, which keeps its position in it; in cells."""
        crop = np.s_[:, top : top + height, left : left + width]
        corner = (self.corner[0] + top, self.corner[1] + left)
        frame = self.frame or (self.grid[1], self.grid[2])
        beside = self.beside and self.beside.crop(top, left, height, width)
        return dataclasses.replace(
            self,
            latent=self.latent[crop],
            init_sigma=self.init_sigma[crop],
            corner=corner,
            frame=frame,
            beside=beside,
        )

    def with_beside(self) -> Canvas:
        """As the model sees it: with the frames beside it that are in its time, after its own."""
        if self.beside is None:
            return self
        shown = (self.ends.min() <= self.beside.ends) & (self.beside.ends <= self.ends.max())
        return join(dataclasses.replace(self, beside=None), self.beside.part(np.flatnonzero(shown)))

    def spans(self) -> list[slice]:
        """The latent frames of each span; those before the first begin are the end of one."""
        begins = sorted({0, *np.flatnonzero(self.first).tolist()})
        return [slice(a, b) for a, b in zip(begins, [*begins[1:], len(self)], strict=True)]


def make_canvas(
    spans: Sequence[CausalSpan],
    latents: Sequence[np.ndarray],
    init_sigma: np.ndarray,
    fps: float,
    cells: Grid,
) -> Canvas:
    """Puts encoded spans together.

    Args:
      spans: of `split_into_spans`.
      latents: float32[t,y,x,c] of each.
      init_sigma: float32[T,Y,X] of the video's frames; a cell takes the largest of its pixels', so it is conditioning
        only where all of them are.
      fps: of the video.
      cells: pixels of a latent cell (frames, height, width); `init_sigma`'s height and width are multiples.
    """
    stride, high, wide = cells
    T, Y, X = init_sigma.shape
    blocks = init_sigma.reshape(T, Y // high, high, X // wide, wide).max((2, 4))
    ends = np.concatenate([span.ends for span in spans])
    first = np.concatenate([span.ends == span.begin for span in spans])
    groups = [blocks[shown].max(0) for shown in frames_shown(spans, T)]
    latent = np.concatenate(latents).astype(np.float32)
    return Canvas(latent, np.stack(groups), ends, first, fps, stride=stride)


def put_beside(canvas: Canvas, spans: Sequence[CausalSpan], latents: Sequence[np.ndarray]) -> Canvas:
    """A clip's canvas with conditioning frames, those of `split_beside`, beside it.

    Of a longer span the first two latent frames are beside it and the rest in it, where its groups are the clip's own:
    that spares tokens, as LTXConditionPipeline does.

    Args:
      latents: float32[t,y,x,c] of each span.
    """
    own, given, parts = canvas.latent.copy(), canvas.init_sigma.copy(), []
    for span, latent in zip(spans, latents, strict=True):
        kept = len(latent)
        if span.begin % canvas.stride == 0 and kept > PREFIX:
            place = slice(span.begin // canvas.stride + PREFIX, span.begin // canvas.stride + kept)
            own[place], given[place], kept = latent[PREFIX:], 0, PREFIX
        frames = latent[:kept], np.zeros(latent[:kept].shape[:3], np.float32), span.ends[:kept]
        parts.append(Canvas(*frames, (span.ends == span.begin)[:kept], canvas.fps, stride=canvas.stride))
    return dataclasses.replace(canvas, latent=own, init_sigma=given, beside=functools.reduce(join, parts))


def join(before: Canvas, after: Canvas) -> Canvas:
    """Two parts of one canvas as one."""
    own = {
        name: np.concatenate([getattr(before, name), getattr(after, name)])
        for name in ("latent", "init_sigma", "ends", "first")
    }
    return dataclasses.replace(after, **own)


def all_noise_canvas(span: CausalSpan, cells: tuple[int, int], channels: int, fps: float) -> Canvas:
    """A canvas of one span, each frame of so many cells (y, x), all to be generated: one number broadcast."""
    grid = (len(span.ends), *cells)
    latent, init_sigma = (
        np.broadcast_to(np.float32(value), shape) for value, shape in ((0, (*grid, channels)), (1, grid))
    )
    return Canvas(latent, init_sigma, span.ends, span.ends == span.begin, fps, stride=span.stride)


def to_segment(
    canvas: Canvas,
    patch: Grid,
    text: np.ndarray,
    text_time: np.ndarray,
    mode: CoordinateMode = "fractional",
    key: str = "",
    pictures: np.ndarray | None = None,
) -> Segment:
    """The canvas as tokens. Time counts from its earliest latent frame, not from the clip's start.

    Args:
      text: float[m,E], text-encoder states of its captions.
      text_time: float[m], seconds on the canvas's own clock (`ends` over `fps`) from which they are active; captions
        that another has replaced before the canvas begins are left out.
      pictures: float[i,V], see `packing.Segment`.
    """
    if patch[0] > 1 and canvas.first[1:].any():
        raise UserError(
            f"A patch of {patch[0]} latent frames can't hold conditioning frames in the middle of a clip: "
            "use dit.patch=(1, …)."
        )
    # The earliest, not the first: a span's last frame may be later than the next one's first, and two captions that
    # are active there must not both begin at 0.
    zero = int(canvas.ends.min())
    time = canvas.ends.reshape(-1, patch[0]).mean(1) / canvas.fps
    # Captions are found by their time, so it has one dtype, not a record's.
    text_time, begin = text_time.astype(np.float32), np.float32(zero / canvas.fps)
    active = active_caption_time(time, text_time)
    needed = text_time >= active.min() - 1e-3
    kept_time, active = np.maximum(text_time[needed] - begin, 0), np.maximum(active - begin, 0)
    init_sigma = patchify(canvas.init_sigma[..., None], patch).max(1).astype(np.float32)
    patches = patchify(canvas.latent, patch).astype(np.float32)
    by_time = (len(time), -1)
    reference = reference_patches(
        patches.reshape(*by_time, patches.shape[1]), init_sigma.reshape(by_time), time
    )
    return Segment(
        patches=patches,
        coords=coordinates(
            canvas.grid,
            patch,
            canvas.fps,
            canvas.stride,
            mode,
            canvas.ends - zero,
            canvas.first,
            canvas.corner,
            canvas.frame,
        ),
        init_sigma=init_sigma,
        caption_time=np.repeat(active, len(init_sigma) // len(active)),
        text=text[needed].astype(np.float32),
        text_time=kept_time,
        key=key,
        reference=reference.reshape(len(patches), -1),
        pictures=pictures,
        extra_channels=None if canvas.extra_channels is None else patchify(canvas.extra_channels, patch),
    )


def tile_size(grid: Grid, patch: Grid, frame_tokens: int) -> tuple[int, int]:
    """Height and width, in cells, of a frame's tile that has at most `frame_tokens` tokens.

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


def tile_boxes(sides: tuple[int, int], patch: Grid, frame_tokens: int) -> list[tuple[int, int, int, int]]:
    """Tiles (top, left, height, width) in cells that cover a frame and overlap by a third or more."""
    height, width = tile_size((1, *sides), patch, frame_tokens)
    axes = []
    for full, own, by in zip(sides, (height, width), patch[1:], strict=True):
        step = max(2 * own // (3 * by), 1) * by
        count = 1 + math.ceil((full - own) / step)
        axes.append([round((full - own) * i / max(count - 1, 1) / by) * by for i in range(count)])
    return [(top, left, height, width) for top in axes[0] for left in axes[1]]


def blend_tiles(
    latents: Sequence[np.ndarray], boxes: Sequence[tuple[int, int, int, int]], sides: Sequence[int]
) -> np.ndarray:
    """float32[t,y,x,c] of a frame of `sides` (y, x): tiles are blended linearly where they overlap."""
    total = np.zeros((len(latents[0]), *sides, latents[0].shape[3]), np.float32)
    weight = np.zeros((*sides, 1), np.float32)
    for latent, (top, left, height, width) in zip(latents, boxes, strict=True):
        ramps = [
            np.minimum(np.arange(n) + 1, np.arange(n, 0, -1)).astype(np.float32) for n in (height, width)
        ]
        own = (ramps[0][:, None] * ramps[1])[..., None]
        total[:, top : top + height, left : left + width] += own * latent
        weight[top : top + height, left : left + width] += own
    return total / weight


def temporal_windows(
    canvas: Canvas, max_frames: int, context: int, pt: int = 1, anchor: bool = False
) -> list[tuple[slice, slice]]:
    """Cuts a canvas that is longer than `max_frames` latent frames into windows that are generated one after another.

    Each is (window, new): the latent frames the model sees, and those of them that it generates; those generated
    before, or conditioning, are its context. From the first conditioning frame the windows advance to the end, then
    backward to the beginning.

    Args:
      max_frames: latent frames of a window.
      context: of those, how many are known already; the rest is new.
      pt: latent frames of a patch, whose multiples all of these are.
      anchor: leave room in later windows forward for one more patch of frames, from before the window.
    """
    if canvas.conditioning_frames.all():
        return []
    if len(canvas) <= max_frames:
        return [(slice(0, len(canvas)), slice(0, len(canvas)))]
    if not 0 < context < max_frames:
        raise UserError(
            f"A window of {max_frames} latent frames can't have {context} of context: give at least one, and fewer "
            "than the window has."
        )
    known = canvas.conditioning_frames.reshape(-1, pt).all(1)
    max_frames, context, last = max_frames // pt, context // pt, len(known) - 1
    start = int(known.argmax())
    out: list[tuple[slice, slice]] = []
    for step, todo in ((1, start + np.flatnonzero(~known[start:])), (-1, np.arange(start)[::-1])):
        while todo.size:
            # Context before the new frames, and as many frames after them as fit: conditioning frames ahead are seen.
            near = max(todo[0] - context, start) if step > 0 else min(todo[0] + context, last)
            room = max_frames - (anchor and step > 0 and near > 0)
            low, high = sorted((int(near), int(np.clip(near + step * (room - 1), 0, last))))
            count = np.count_nonzero((low <= todo) & (todo <= high))
            new, todo = todo[:count], todo[count:]
            out.append(
                (slice(low * pt, (high + 1) * pt), slice(int(new.min()) * pt, (int(new.max()) + 1) * pt))
            )
    return out
