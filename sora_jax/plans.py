"""From what a person asks for to a plan: read what is given, paint the sketch, say what becomes of the result.

Where size, rate or duration is not named, the input's own is kept, or the nearest that the model can hold, which is
said aloud. One function an ability; `Studio` has a method for each, and makes any number of plans at once.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import PIL.Image

from sora_jax.compositing import agree, cover, detailed, paste
from sora_jax.diffusion import abilities
from sora_jax.diffusion.canvas import GROUP, Sketch
from sora_jax.engine import Engine
from sora_jax.errors import UserError
from sora_jax.filling import Settings, Words
from sora_jax.media import Media, read_media
from sora_jax.video import Video, frame_count, frame_size, resize

Source: TypeAlias = str | os.PathLike[str] | Video | np.ndarray | PIL.Image.Image | Media
CONTEXT = 1 + 2 * GROUP  # frames of a clip that what leads back to it sees

# Shares of the sampler's way (experiments/abilities).
CONNECT_STRENGTH = 0.9
BLEND_STRENGTH = 0.7
UPSCALE_STRENGTH = 0.3


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be made.

    Attributes:
      sketch: what is given, and what is to be painted.
      words: (seconds from which they hold, prompt).
      settings: of the sampler.
      keep: frames of the sketch that the result shows.
      finish: what becomes of the painted frames, float32[T,Y,X,3] in [-1, 1], all of the sketch's.
      notes: what was changed or left out of what was asked for, a sentence each.
    """

    sketch: Sketch
    words: Words = ()
    settings: Settings = dataclasses.field(default_factory=Settings)
    keep: slice = slice(None)
    finish: Callable[[np.ndarray], np.ndarray] | None = None
    notes: tuple[str, ...] = ()


def take(
    engine: Engine,
    source: Source,
    fps: float | None = None,
    start: float = 0.0,
    seconds: float | None = None,
    resolution: int | None = None,
) -> Media:
    """Reads what is given, at the size and rate that the model can hold."""
    if isinstance(source, Media):
        return source
    limits, notes = engine.bundle.limits, []
    first = read_media(source, fps=fps, start=start, seconds=1e-6)
    if resolution is None and limits.resolution and min(first.source_size) > limits.resolution:
        resolution = limits.resolution
    rate = first.source_fps if isinstance(source, (str, os.PathLike)) else first.video.fps
    if fps is None and limits.fps and rate > limits.fps + 1e-6:
        fps = limits.fps
        notes.append(
            f"The video is taken at {fps:g} frames a second, not its {rate:g}: the model holds no more."
        )
    media = read_media(source, fps=fps, start=start, seconds=seconds, resolution=resolution)
    if media.video.size != media.source_size:
        (high, wide), (y, x) = media.source_size, media.video.size
        notes.append(f"The picture of {wide}×{high} is taken at {x}×{y}, the nearest that the model holds.")
    return dataclasses.replace(media, notes=(*media.notes, *notes))


def animate(
    engine: Engine,
    picture: Source | Mapping[float, Source],
    prompt: str = "",
    *,
    at: float | str = 0.0,
    duration: float = 2.0,
    fps: float = 8.0,
    resolution: int | None = None,
    aspect: str | float | None = None,
    **settings: Any,
) -> Plan:
    """The picture is frame `at` (seconds, "first" or "last") of the video; or several are, by their seconds."""
    T = frame_count(duration, fps)
    places = {"first": 0, "last": T - 1}
    pictures = picture if isinstance(picture, Mapping) else {at: picture}
    if not pictures:
        raise UserError("There is no picture to animate: give at least one.")
    taken: dict[int, np.ndarray] = {}
    notes: list[str] = []
    size: tuple[int, int] | None = None
    for time, source in pictures.items():
        if isinstance(time, str) and time not in places:
            raise UserError(f"A picture can't be placed at {time!r}: say first, last or a number of seconds.")
        media = take(engine, source, seconds=1e-3, resolution=resolution)
        notes += media.notes
        frame = media.video.frames[0]
        if size is None:
            size = frame_size(min(frame.shape[:2]), aspect) if aspect else frame.shape[:2]
        taken[places[time] if isinstance(time, str) else round(time * fps)] = cover(frame[None], size)[0]
    assert size is not None
    sketch = abilities.animate(taken, (T, *size), fps)
    return Plan(sketch, _words(prompt), Settings(**settings), notes=tuple(notes))


def extend(
    engine: Engine,
    video: Source,
    seconds: float,
    prompt: str = "",
    *,
    backward: bool = False,
    fps: float | None = None,
    **settings: Any,
) -> Plan:
    """The video goes on for `seconds`; backward, it begins that much earlier."""
    media = take(engine, video, fps)
    rate = media.video.fps
    sketch = abilities.extend(media.video.frames, frame_count(seconds, rate), rate, backward)
    return Plan(sketch, _words(prompt), Settings(**settings), notes=media.notes)


def recut(
    engine: Engine, video: Source, start: float, end: float, seconds: float, prompt: str = "", **settings: Any
) -> Plan:
    """The video from `start` to `end`, and `seconds` more of it as the model continues it."""
    if not 0 <= start < end:
        raise UserError(f"A cut from {start:g} to {end:g} s leaves nothing: give a start before the end.")
    media = take(engine, video, start=start, seconds=end - start)
    return extend(engine, media, seconds, prompt, **settings)


def loop(
    engine: Engine,
    video: Source,
    seconds: float = 1.5,
    prompt: str = "",
    *,
    strength: float = 1.0,
    **settings: Any,
) -> Plan:
    """The video, and `seconds` that lead from its end back to its beginning."""
    media = take(engine, video)
    frames, fps = media.video.frames, media.video.fps
    new = frame_count(seconds, fps)
    again = min(len(frames), CONTEXT)
    sketch = abilities.loop(frames, new, again, fps, strength)
    return Plan(
        sketch, _words(prompt), Settings(**settings), keep=slice(len(frames) + new), notes=media.notes
    )


def fill(
    engine: Engine,
    video: Source,
    missing: Sequence[tuple[float, float]],
    prompt: str = "",
    *,
    fps: float | None = None,
    **settings: Any,
) -> Plan:
    """Frames from one time to another, in seconds, are missing and painted anew."""
    media = take(engine, video, fps)
    T, rate = len(media.video), media.video.fps
    gone = np.zeros(T, bool)
    for begin, end in missing:
        if not 0 <= begin <= end or round(begin * rate) >= T:
            raise UserError(
                f"Nothing is missing from {begin:g} to {end:g} s: the video lasts from 0 to {T / rate:g} s."
            )
        gone[round(begin * rate) : max(round(end * rate), round(begin * rate) + 1)] = True
    sketch = abilities.fill(media.video.frames, gone, rate)
    return Plan(sketch, _words(prompt), Settings(**settings), notes=media.notes)


def smooth(engine: Engine, video: Source, fps: float = 24.0, prompt: str = "", **settings: Any) -> Plan:
    """More frames a second: new ones between those that are given."""
    media = take(engine, video)
    rate, notes = media.video.fps, list(media.notes)
    factor = max(round(fps / rate), 2)
    if len(media.video) < 2:
        raise UserError("A single frame has nothing between: give a video of two frames or more.")
    if abs(factor * rate - fps) > 1e-3 * fps:
        notes.append(
            f"The video has {factor * rate:g} frames a second, {factor} times its {rate:g}, not {fps:g}."
        )
    sketch = abilities.smooth(media.video.frames, factor, factor * rate)
    return Plan(sketch, _words(prompt), Settings(**settings), notes=tuple(notes))


def connect(
    engine: Engine,
    a: Source,
    b: Source,
    seconds: float = 1.5,
    prompt: str = "",
    *,
    strength: float = CONNECT_STRENGTH,
    **settings: Any,
) -> Plan:
    """One video turns into the other over `seconds`."""
    first, second, notes = _pair(engine, a, b)
    fps = first.fps
    sketch = abilities.connect(first.frames, second.frames, frame_count(seconds, fps), fps, strength)
    return Plan(sketch, _words(prompt), Settings(**settings), notes=notes)


def blend(
    engine: Engine,
    a: Source,
    b: Source,
    curve: Sequence[tuple[float, float]] | None = None,
    prompt: str = "",
    *,
    strength: float = BLEND_STRENGTH,
    **settings: Any,
) -> Plan:
    """Both videos at once; `curve` has (seconds, weight of the second), by default from 0 to 1 all along."""
    first, second, notes = _pair(engine, a, b)
    T, fps = min(len(first), len(second)), first.fps
    if len(first) != len(second):
        notes += (f"Both videos are used as long as the shorter one lasts, {T / fps:g} s.",)
    weight = abilities.curve(curve or ((0.0, 0.0), (max(T - 1, 1) / fps, 1.0)), T, fps)
    sketch = abilities.blend(first.frames[:T], second.frames[:T], weight, fps, strength)
    return Plan(sketch, _words(prompt), Settings(**settings), notes=notes)


def inpaint(
    engine: Engine,
    video: Source,
    prompt: str = "",
    *,
    box: tuple[int, int, int, int] | None = None,
    mask: Source | None = None,
    strength: float = 1.0,
    **settings: Any,
) -> Plan:
    """What lies in `box` (left, top, width, height in the input's pixels), or where `mask` is light, is painted anew.

    A mask is a picture or a video. Outside, the input's own pixels are kept.
    """
    if (box is None) == (mask is None):
        raise UserError("What is to be painted anew is a box or a mask: give one of the two.")
    media = take(engine, video)
    frames = media.video.frames
    T, Y, X, _ = frames.shape
    inside = np.zeros((T, Y, X), bool)
    if box is not None:
        left, top, width, height = box
        high, wide = media.source_size
        if width < 1 or height < 1 or left < 0 or top < 0 or left + width > wide or top + height > high:
            raise UserError(
                f"The box {left},{top},{width},{height} (left, top, width, height) is not inside the picture of "
                f"{wide}×{high} pixels."
            )
        rows = slice(int(top * Y / high), -(-(top + height) * Y // high))
        columns = slice(int(left * X / wide), -(-(left + width) * X // wide))
        inside[:, rows, columns] = True
    else:
        light = cover(read_media(mask, fps=media.video.fps).video.frames, (Y, X)).mean(-1) > 127
        inside |= light[np.minimum(np.arange(T), len(light) - 1)]
        if not inside.any():
            raise UserError("The mask is black everywhere: what is to be painted anew must be light in it.")
    sketch = abilities.inpaint(frames, inside, media.video.fps, strength)
    return Plan(sketch, _words(prompt), Settings(**settings), finish=paste(frames, inside), notes=media.notes)


def outpaint(engine: Engine, video: Source, aspect: str | float, prompt: str = "", **settings: Any) -> Plan:
    """The picture grows to another aspect ratio; the input's own pixels stay in its middle."""
    media = take(engine, video)
    frames = media.video.frames
    Y, X = frames.shape[1:3]
    ratio = np.divide(*frame_size(1000, aspect)[::-1])
    size = (Y, 2 * round(Y * ratio / 2)) if ratio > X / Y else (2 * round(X / ratio / 2), X)
    if size == (Y, X):
        raise UserError(f"The video has the aspect ratio {aspect} already: name another one.")
    notes = list(media.notes)
    most = engine.bundle.limits.tokens // 2
    if engine.frame_tokens(*size) > most:  # room for two latent frames at least
        shrink = (most / engine.frame_tokens(*size)) ** 0.5
        Y, X = (max(2 * int(side * shrink / 2), 2) for side in (Y, X))
        frames = resize(media.video, Y, X).frames
        size = (Y, 2 * round(Y * ratio / 2)) if ratio > X / Y else (2 * round(X / ratio / 2), X)
        notes.append(f"The video is {size[1]}×{size[0]}, the nearest that the model can hold.")
    sketch = abilities.outpaint(frames, size, media.video.fps)
    outside = sketch.strength > 0
    return Plan(
        sketch,
        _words(prompt),
        Settings(**settings),
        finish=paste(sketch.frames, outside),
        notes=tuple(notes),
    )


def edit(
    engine: Engine,
    video: Source,
    prompt: str,
    strength: float = 0.7,
    *,
    motion: bool = False,
    **settings: Any,
) -> Plan:
    """What is seen changes to `prompt`; `strength`, 0 to 1, says how far; `motion` keeps motion and frees looks."""
    if not 0 <= strength <= 1:
        raise UserError(f"strength={strength:g} is not between 0 (all stays) and 1 (nothing does).")
    media = take(engine, video)
    sketch = abilities.edit(media.video.frames, strength, media.video.fps, motion)
    return Plan(sketch, _words(prompt), Settings(**settings), notes=media.notes)


def upscale(
    engine: Engine,
    video: Source,
    resolution: int,
    prompt: str = "",
    *,
    strength: float = UPSCALE_STRENGTH,
    start: float = 0.0,
    seconds: float | None = None,
    **settings: Any,
) -> Plan:
    """The video, or `seconds` of it from `start` on, at a higher resolution: scaled up, its edges repainted.

    Scaled down again, the result gives the input.
    """
    media = video if isinstance(video, Media) else read_media(video, start=start, seconds=seconds)
    Y, X = media.video.size
    if resolution <= min(Y, X):
        raise UserError(f"The video's short side has {min(Y, X)} pixels already: ask for more than that.")
    high, wide = (2 * round(side * resolution / min(Y, X) / 2) for side in (Y, X))
    larger = resize(media.video, high, wide).frames
    edges = detailed(larger)
    sketch = abilities.inpaint(larger, edges, media.video.fps, strength)
    over, small = paste(larger, edges), media.video.frames
    return Plan(
        sketch,
        _words(prompt),
        Settings(**settings),
        finish=lambda painted: agree(over(painted), small),
        notes=media.notes,
    )


def _words(prompt: str) -> Words:
    return ((0.0, prompt),) if prompt.strip() else ()


def _pair(engine: Engine, a: Source, b: Source) -> tuple[Video, Video, tuple[str, ...]]:
    """Both videos, the second at the first one's rate and size."""
    first = take(engine, a)
    second = take(engine, b, fps=first.video.fps)
    notes = first.notes + second.notes
    if second.video.size != first.video.size:
        notes += ("The second video is cropped to the first one's shape.",)
    frames = cover(second.video.frames, first.video.size)
    return first.video, Video(frames, first.video.fps), notes
