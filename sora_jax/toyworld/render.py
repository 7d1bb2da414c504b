"""Toyworld: captioned clips whose truth is known, rendered analytically at any rate, resolution and aspect ratio.

A shape is a signed distance (negative inside); a pixel's cover is half a pixel minus the distance, clipped to
[0, 1], which softens every edge over one pixel. Each thing is drawn for many frames at once, and only in the
square that holds it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sora_jax.errors import UserError
from sora_jax.media.clip import Clip
from sora_jax.media.video import Video, letterbox
from sora_jax.toyworld import captions
from sora_jax.toyworld import scene as world
from sora_jax.toyworld.sampling import sample_scene
from sora_jax.toyworld.scene import Background, Scene, Shot, Thing, WorldConfig, check_split

_CHUNK = 1 << 17  # pixels drawn at once: their arrays stay in the cache


def render(scene: Scene, frames: int, height: int, width: int, fps: float) -> np.ndarray:
    """Draws the scene at times k / fps: uint8[T,Y,X,3], the same on every call."""
    times = np.arange(frames) / fps
    video = np.empty((frames, height, width, 3), np.uint8)
    ends = [shot.start for shot in scene.shots[1:]] + [math.inf]
    for shot, end in zip(scene.shots, ends, strict=True):
        on = (times >= shot.start - 1e-9) & (times < end - 1e-9)
        if on.any():
            _render_shot(shot, times[on] - shot.start, scene.aspect, video[on.argmax() :][: on.sum()])
    for before, shot in zip(scene.shots, scene.shots[1:]):
        on = np.abs(times - shot.start) < shot.fade / 2
        if on.any():
            _dissolve(before, shot, times[on], scene.aspect, video[on.argmax() :][: on.sum()])
    return video


def _dissolve(before: Shot, after: Shot, times: np.ndarray, aspect: float, out: np.ndarray) -> None:
    mixed = np.zeros(out.shape, np.float32)
    weight = (0.5 + (times - after.start) / after.fade)[:, None, None, None].astype(np.float32)
    for shot, share in ((before, 1 - weight), (after, weight)):
        _render_shot(shot, times - shot.start, aspect, out)
        mixed += share * out
    out[:] = mixed + np.float32(0.5)


def _render_shot(shot: Shot, times: np.ndarray, aspect: float, out: np.ndarray) -> None:
    _, height, width, _ = out.shape
    unit = min(height, width)
    y = (np.arange(height, dtype=np.float32) + 0.5 - height / 2) / unit
    x = (np.arange(width, dtype=np.float32) + 0.5 - width / 2) / unit
    if shot.camera.kind == "still" or shot.background.kind == "plain":
        out[:] = _background(shot.background, y, x, aspect)
    else:
        for frame, centre, scale in zip(out, *world.view(shot.camera, times), strict=True):
            frame[:] = _background(shot.background, y / scale + centre[0], x / scale + centre[1], aspect)
    for thing in shot.things:
        _draw(thing, shot, times, aspect, unit, out)
    if shot.occluder is not None:
        left, right = ((shot.occluder.x + s * shot.occluder.half_width) * unit + width / 2 for s in (-1, 1))
        pixel = np.arange(width) + 0.5
        cover = np.clip(np.minimum(pixel - left, right - pixel) + 0.5, 0, 1).astype(np.float32)
        hidden = np.flatnonzero(cover)
        if hidden.size:
            strip = slice(hidden[0], hidden[-1] + 1)
            _blend(out[:, :, strip], cover[strip], shot.occluder.colour)


def _blend(patch: np.ndarray, cover: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Lays `colour` over uint8[..., 3] in place, as opaque as `cover` f32[...] says."""
    below = patch.astype(np.float32)
    patch[:] = below + cover[..., None] * (np.array(colour, np.float32) - below) + np.float32(0.5)


def _background(background: Background, y: np.ndarray, x: np.ndarray, aspect: float) -> np.ndarray:
    """Colours uint8[Y,X,3] (or one colour uint8[3]) of the plane at heights y and places x."""
    first, second = np.array(background.colours, np.float32)
    if background.kind == "plain":
        return first.astype(np.uint8)
    sin, cos = math.sin(background.angle), math.cos(background.angle)
    if background.kind == "gradient":
        half_y, half_x = world.half_frame(aspect)
        along = (y[:, None] * sin + x * cos) / (abs(sin) * half_y + abs(cos) * half_x)
        mix = np.clip(0.5 + 0.5 * along, 0, 1)
    else:
        turns = 2 * math.pi / background.period
        u = np.sin(turns * (y[:, None] * sin + x * cos))
        if background.texture == "stripes":
            mix = 0.5 + 0.5 * u
        else:
            v = np.sin(turns * (y[:, None] * cos - x * sin))
            mix = 0.5 + 0.5 * u * v if background.texture == "checks" else np.clip(u + v - 0.6, 0, 1)
    return (first + mix[..., None] * (second - first) + np.float32(0.5)).astype(np.uint8)


def _draw(thing: Thing, shot: Shot, times: np.ndarray, aspect: float, unit: int, out: np.ndarray) -> None:
    frames, height, width, _ = out.shape
    centre, radius = world.seen(thing, shot.camera, times, aspect)
    centre = centre * unit + (height / 2, width / 2)
    radius = radius * unit
    angle = world.angle(thing, times)
    reach = world.EXTENTS[thing.shape][3] * radius.max() + 1
    size = min(2 * math.ceil(reach) + 1, height), min(2 * math.ceil(reach) + 1, width)
    corner = np.clip(np.floor(centre - reach).astype(int), 0, np.array([height, width]) - size)
    chunk = max(1, _CHUNK // (size[0] * size[1]))
    for begin in range(0, frames, chunk):
        part = slice(begin, begin + chunk)
        offset = (corner[part] + 0.5 - centre[part]).astype(np.float32)
        y = (offset[:, :1] + np.arange(size[0], dtype=np.float32))[:, :, None]
        x = (offset[:, 1:] + np.arange(size[1], dtype=np.float32))[:, None, :]
        distance = signed_distance(thing.shape, y, x, radius[part], angle[part])
        cover = np.clip(0.5 - distance, 0, 1)
        for frame, (top, left), alpha in zip(out[part], corner[part], cover, strict=True):
            _blend(frame[top : top + size[0], left : left + size[1]], alpha, world.COLOURS[thing.colour])


def signed_distance(
    shape: str, y: np.ndarray, x: np.ndarray, radius: np.ndarray, angle: np.ndarray
) -> np.ndarray:
    """Signed distance in pixels, negative inside: y f32[T,Y,1], x f32[T,1,X], radius and angle f64[T]."""
    r = radius.astype(np.float32)[:, None, None]
    if shape == "circle":
        return np.sqrt(y * y + x * x) - r
    if shape == "ring":
        return np.abs(np.sqrt(y * y + x * x) - 0.82 * r) - 0.26 * r
    if angle.any():
        sin, cos = (f(angle).astype(np.float32)[:, None, None] for f in (np.sin, np.cos))
        y, x = cos * y - sin * x, cos * x + sin * y
    if shape == "square":
        return np.maximum(np.abs(y), np.abs(x)) - 0.88 * r
    if shape == "triangle":
        slope = np.float32(math.sqrt(0.75))
        return np.maximum(y, slope * np.abs(x) - 0.5 * y) - 0.65 * r
    return _star(y, x, r)


def _star(y: np.ndarray, x: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Five points: by its mirrors the plane folds onto the half of one ray, where the edge is a line."""
    step = math.pi / 5
    sin, cos = np.float32(math.sin(step)), np.float32(math.cos(step))
    x, y = np.abs(x), -y
    for _ in range(2):
        beyond = 2 * np.maximum(x * cos - y * sin, 0)
        x, y = np.abs(x - beyond * cos), y + beyond * sin
    outer, inner = 1.3, 0.6
    edge_y, edge_x = outer - inner * math.cos(step), inner * math.sin(step)
    length = math.hypot(edge_y, edge_x)
    normal_x, normal_y = np.float32(edge_y / length), np.float32(edge_x / length)
    return (normal_x * x + normal_y * (y - outer * r)).astype(np.float32)


class Toyworld:
    """A source of captioned clips (see `clip.ClipSource`), rendered when they are asked for.

    Args:
      config: how often what is drawn.
      split: "train", "validation" (as train, other scenes), "heldout" (combinations that train never shows) or
        "paraphrase" (scenes as in train, words that train never saw).
      seed: another seed, another world of clips.
      clips: how many; clip i does not depend on it.
      shapes: (frames, height, width, fps) options, of which each clip draws one.
      crop: "square": only the middle square of each clip is shown. Its scene and captions stay those of the whole
        frame, so what they speak of may be cut off, as it is where videos are cropped. "letterbox": all of it is shown
        in a square of that size, between black bars.

    Raises:
      UserError: there is no such split, or no shape, or one that isn't positive.
    """

    def __init__(
        self,
        config: WorldConfig | None = None,
        split: str = "train",
        seed: int = 0,
        clips: int = 1_000_000,
        shapes: Sequence[tuple[int, int, int, float]] = ((17, 64, 64, 8.0),),
        crop: str = "none",
    ):
        check_split(split)
        if not shapes or any(min(shape) <= 0 for shape in shapes):
            raise UserError(
                f"Toyworld's shapes are (frames, height, width, fps), at least one and all positive, not {shapes}."
            )
        self.config = config or WorldConfig()
        self.split, self.seed, self.clips, self.crop = split, seed, clips, crop
        self.shapes = tuple((int(t), int(y), int(x), float(fps)) for t, y, x, fps in shapes)

    def __len__(self) -> int:
        return self.clips

    def shape(self, index: int) -> tuple[int, int, int, float]:
        """(frames, height, width, fps) of clip `index`."""
        return self.shapes[self._rng(index, 1).integers(len(self.shapes))]

    def scene(self, index: int) -> Scene:
        """The truth about clip `index`."""
        if not 0 <= index < self.clips:
            raise IndexError(f"clip {index} of {self.clips}")
        frames, height, width, fps = self.shape(index)
        return sample_scene(self.seed, index, self.split, (frames - 1) / fps, width / height, self.config)

    def __getitem__(self, index: int) -> Clip:
        frames, height, width, fps = self.shape(index)
        scene, rng = self.scene(index), self._rng(index, 2)
        paraphrase = self.split == "paraphrase"
        return Clip(
            video=Video(self._cropped(render(scene, frames, height, width, fps)), fps),
            captions={
                "short": captions.short_caption(scene, rng, paraphrase),
                "detailed": captions.detailed_caption(scene, rng, paraphrase),
            },
            timed=captions.timed_captions(scene, rng, paraphrase),
            key=f"toyworld-{self.split}-{self.seed}-{index}",
        )

    def _cropped(self, video: np.ndarray) -> np.ndarray:
        if self.crop == "letterbox":
            return letterbox(video)
        height, width = video.shape[1:3]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return video[:, top : top + side, left : left + side] if self.crop == "square" else video

    def _rng(self, index: int, purpose: int) -> np.random.Generator:
        """A generator of its own, so that changed captions leave the scenes as they were."""
        return np.random.default_rng((self.seed, check_split(self.split), index, purpose))
