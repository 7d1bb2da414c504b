"""From what a person asks for to a plan: read what is given, paint the sketch, say what becomes of the result.

Where size, rate or duration is not named, the input's own is kept, or the nearest that the model can hold, which is
said aloud. One function an ability; `Studio` has a method for each (`fill_frames` for `fill`), and makes any number
of plans at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sora_jax.compositing import agree, detailed, overrule, paste
from sora_jax.diffusion import abilities
from sora_jax.diffusion.canvas import GROUP, Sketch
from sora_jax.engine import Engine
from sora_jax.errors import UserError
from sora_jax.filling import Settings, Words
from sora_jax.inputs import Part, Sound, Source, Whole, as_part, held, sound_of, take, take_pair
from sora_jax.video import frame_count, frame_size, resize

CONTEXT = 1 + 2 * GROUP  # frames of a clip that what leads back to it sees

# Shares of the sampler's way.
BLEND_STRENGTH = 0.7
UPSCALE_STRENGTH = 0.3
# Between two given clips the neighbours say more than the words: not led away from them unless it is asked for.
BETWEEN: dict[str, Any] = {"guidance": 1.0}


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
      sound: (file, seconds into it, seconds into the result) whose sound goes along, where it has some.
    """

    sketch: Sketch
    words: Words = ()
    settings: Settings = dataclasses.field(default_factory=Settings)
    keep: slice = slice(None)
    finish: Callable[[np.ndarray], np.ndarray] | None = None
    notes: tuple[str, ...] = ()
    sound: Sound | None = None


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
        if size is None:
            own = as_part(source).read(1e-6).video.size
            size = held(engine, frame_size(min(own), aspect) if aspect else own)
            if resolution is not None:
                size = frame_size(resolution, size[1] / size[0])
        media = take(engine, source, fps, 1e-6, size)
        notes += media.notes
        taken[places[time] if isinstance(time, str) else round(time * fps)] = media.video.frames[0]
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
    new = frame_count(seconds, rate)
    sketch = abilities.extend(media.video.frames, new, rate, backward)
    sound = sound_of(video, at=new / rate if backward else 0.0)
    return Plan(sketch, _words(prompt), Settings(**settings), notes=media.notes, sound=sound)


def recut(
    engine: Engine, video: Whole, start: float, end: float, seconds: float, prompt: str = "", **settings: Any
) -> Plan:
    """The video from `start` to `end`, and `seconds` more of it as the model continues it."""
    return extend(engine, Part(video, start, end), seconds, prompt, **settings)


def loop(
    engine: Engine,
    video: Source,
    seconds: float = 1.5,
    prompt: str = "",
    *,
    strength: float = 1.0,
    **settings: Any,
) -> Plan:
    """The video, and about `seconds` that lead from its end back to its beginning."""
    media = take(engine, video)
    frames, fps = media.video.frames, media.video.fps
    new, said = _passage(seconds, fps)
    again = min(len(frames), CONTEXT)
    sketch = abilities.loop(frames, new, again, fps, strength)
    keep = slice(len(frames) + new)
    return Plan(sketch, _words(prompt), Settings(**BETWEEN | settings), keep, notes=media.notes + said)


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
    return Plan(sketch, _words(prompt), Settings(**settings), notes=media.notes, sound=sound_of(video))


def smooth(engine: Engine, video: Source, fps: float = 24.0, prompt: str = "", **settings: Any) -> Plan:
    """More frames a second: new ones between those that are given.

    Where what was painted hardly differs from a cross-fade of its neighbours, that is shown: there nothing moves.
    """
    media = take(engine, video)
    rate, notes = media.video.fps, list(media.notes)
    if len(media.video) < 2:
        raise UserError("A single frame has nothing between: give a video of two frames or more.")
    if fps < rate * (1 + 1e-3):
        raise UserError(f"The video is taken at {rate:g} frames a second already: ask for more than that.")
    factor = max(round(fps / rate), 2)
    if abs(factor * rate - fps) > 1e-3 * fps:
        notes.append(
            f"The video has {factor * rate:g} frames a second, {factor} times its {rate:g}, not {fps:g}."
        )
    sketch = abilities.smooth(media.video.frames, factor, factor * rate)

    def still(painted: np.ndarray) -> np.ndarray:
        return overrule(painted, abilities.between(painted[::factor], factor))

    return Plan(
        sketch,
        _words(prompt),
        Settings(**BETWEEN | settings),
        finish=still,
        notes=tuple(notes),
        sound=sound_of(video),
    )


def connect(
    engine: Engine,
    a: Source,
    b: Source,
    seconds: float = 2.0,
    prompt: str = "",
    *,
    strength: float = 1.0,
    **settings: Any,
) -> Plan:
    """One video turns into the other over about `seconds`, from a cross-fade where `strength` is below 1."""
    first, second, notes = take_pair(engine, a, b)
    fps = first.fps
    new, said = _passage(seconds, fps)
    sketch = abilities.connect(first.frames, second.frames, new, fps, strength)
    return Plan(sketch, _words(prompt), Settings(**BETWEEN | settings), notes=notes + said)


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
    first, second, notes = take_pair(engine, a, b)
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
    if box is not None and len(box) != 4:
        raise UserError(f"The box is four numbers, left, top, width and height, not {len(box)}.")
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
        assert mask is not None
        part = dataclasses.replace(as_part(mask), start=as_part(mask).start + as_part(video).start)
        shown = take(engine, part, media.video.fps, T / media.video.fps, (Y, X))
        light = shown.video.frames.mean(-1) > 127
        inside |= light[np.minimum(np.arange(T), len(light) - 1)]
        if not inside.any():
            raise UserError("The mask is black everywhere: what is to be painted anew must be light in it.")
    sketch = abilities.inpaint(frames, inside, media.video.fps, strength)
    return Plan(
        sketch,
        _words(prompt),
        Settings(**settings),
        finish=paste(frames, inside),
        notes=media.notes,
        sound=sound_of(video),
    )


def outpaint(engine: Engine, video: Source, aspect: str | float, prompt: str = "", **settings: Any) -> Plan:
    """The picture grows to another aspect ratio; the input's own pixels stay in its middle."""
    Y, X = as_part(video).read(1e-6).video.size
    ratio = np.divide(*frame_size(1000, aspect)[::-1])
    size = (Y, 2 * round(Y * ratio / 2)) if ratio > X / Y else (2 * round(X / ratio / 2), X)
    if size[0] <= Y and size[1] <= X:
        raise UserError(f"The video has the aspect ratio {aspect} already: name another one.")
    scale = min(np.divide(held(engine, size), size))
    if scale < 1:
        Y, X = (max(2 * int(side * scale / 2), 2) for side in (Y, X))
        size = (Y, 2 * round(Y * ratio / 2)) if ratio > X / Y else (2 * round(X / ratio / 2), X)
    media = take(engine, video, size=(Y, X))
    sketch = abilities.outpaint(media.video.frames, size, media.video.fps)
    return Plan(
        sketch,
        _words(prompt),
        Settings(**settings),
        finish=paste(sketch.frames, sketch.strength > 0),
        notes=media.notes,
        sound=sound_of(video),
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
    if not prompt.strip():
        raise UserError(
            "The prompt is empty: say what is to be seen instead, for example 'a blue circle moves right'."
        )
    media = take(engine, video)
    sketch = abilities.edit(media.video.frames, strength, media.video.fps, motion)
    return Plan(sketch, _words(prompt), Settings(**settings), notes=media.notes, sound=sound_of(video))


def upscale(
    engine: Engine,
    video: Source,
    resolution: int,
    prompt: str = "",
    *,
    strength: float = UPSCALE_STRENGTH,
    **settings: Any,
) -> Plan:
    """The video at a higher resolution: scaled up, its edges repainted.

    Scaled down again, the result gives the input.
    """
    media = as_part(video).read()
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
        sound=sound_of(video),
    )


def _words(prompt: str) -> Words:
    return ((0.0, prompt),) if prompt.strip() else ()


def _passage(seconds: float, fps: float) -> tuple[int, tuple[str, ...]]:
    """Frames that lead to a given clip, and what is to be said of them.

    The clip's first frame is painted once more, so that the seam can be taken up: 4k − 1 frames.
    """
    wanted = frame_count(seconds, fps)
    frames = max(GROUP * round((wanted + 1) / GROUP), GROUP) - 1
    note = f"The passage takes {frames} frames ({frames / fps:.3g} s), the nearest that the model paints to {wanted}."
    return frames, () if frames == wanted else (note,)
