"""Abilities that make new frames: each function reads its inputs, makes the sketch and returns the job.

`registry.ABILITIES` has an entry for each, of which commands and the methods of `Pipeline` are made. Each takes the
fields of `shape.Shape` and `settings.Settings` as keywords. What of the result's shape is not named is the input's
own, or the nearest that the model can hold, which a note says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sora_jax.errors import UserError
from sora_jax.media.compositing import keep_static
from sora_jax.media.reader import Media, MediaLike
from sora_jax.media.video import Video
from sora_jax.pipeline import sketches
from sora_jax.pipeline.budget import frames_of
from sora_jax.pipeline.checks import check_bool, check_int, check_number, short_repr
from sora_jax.pipeline.inputs import (
    MediaInput,
    Part,
    as_part,
    output_size,
    read_input,
    read_pair,
    sound_of,
)
from sora_jax.pipeline.job import (
    Job,
    ability,
    captions_of,
    check_one,
    check_pairs,
    new_frames,
    parse_options,
    transition_frames,
)
from sora_jax.pipeline.keywords import explicit_keywords, option_name
from sora_jax.pipeline.model import VideoModel
from sora_jax.pipeline.request import Request, text_to_video
from sora_jax.pipeline.settings import Progress, Settings
from sora_jax.pipeline.shape import SHAPE_FIELDS, Shape

CONTEXT = 2  # latent frames of a clip, besides its first, that the transition back to it sees

MAX_FACTOR = 1000  # of slow motion
# Share of the sampler's steps.
BLEND_STRENGTH = 0.7
# Between two conditioning clips the neighbours matter more than the prompt: no guidance unless it is asked for.
NO_GUIDANCE: dict[str, Any] = {"guidance": 1.0}


@explicit_keywords(Request, leave_out=("duration", "fps", "frames"))
def image(model: VideoModel, prompt: str, **fields: Any) -> Job:
    """A picture of `prompt`: a video of one frame."""
    return text_to_video(model, Request(prompt, frames=1, **fields))


@ability
def animate(
    model: VideoModel,
    picture: MediaInput | Mapping[float, MediaInput],
    prompt: str = "",
    *,
    at: float | str = 0.0,
    duration: float | None = None,
    fps: float = 8.0,
    **options: Any,
) -> Job:
    """The picture is frame `at` (seconds, "first" or "last") of the video; or several are, by their seconds.

    The video lasts two seconds where neither `duration` nor `frames` is named.
    """
    if duration is None and options.get("frames") is None:
        duration = 2.0
    shape, settings = parse_options(options | {"duration": duration, "fps": fps})
    T = shape.num_frames(fps)
    places = {"first": 0, "last": T - 1}
    pictures = picture if isinstance(picture, Mapping) else {at: picture}
    if not pictures:
        raise UserError("There is no picture to animate: give at least one.")
    taken: dict[int, np.ndarray] = {}
    notes: list[str] = []
    size: tuple[int, int] | None = None
    for time, source in pictures.items():
        if isinstance(time, str) and time not in places:
            raise UserError(
                f"A picture can't be placed at {short_repr(time)}: say first, last or a number of seconds."
            )
        if not isinstance(time, str):
            check_number("at", time, minimum=0)
        if size is None:
            size = output_size(model, as_part(source).read(1e-6).video.size, shape)
            model.check_limits(T, size, fps, settings)
        media = read_input(model, source, Shape(fps=fps, size=size), 1e-6)
        notes += media.notes
        taken[places[time] if isinstance(time, str) else round(time * fps)] = media.video.frames[0]
    assert size is not None
    sketch = sketches.animate(taken, (T, *size), fps)
    return Job(sketch, captions_of(prompt), settings, notes=tuple(notes))


@ability
def extend(
    model: VideoModel,
    video: MediaInput,
    seconds: float | None = None,
    prompt: str = "",
    *,
    backward: bool = False,
    **options: Any,
) -> Job:
    """The video goes on for `seconds`, or until it lasts `duration`; backward, it begins that much earlier."""
    shape, settings = parse_options(options)
    check_bool("backward", backward)
    check_one(seconds, shape)
    media = read_input(model, video, shape.without_duration())
    rate, T = media.video.fps, len(media.video)
    new = shape.num_frames(rate) - T if seconds is None else frames_of(seconds, rate)
    if new < 1:
        raise UserError(f"The video lasts {T / rate:g} s already: ask for a longer duration.")
    model.check_limits(T + new, media.video.size, rate, settings)
    sketch = sketches.extend(media.video.frames, new, rate, backward)
    sound = sound_of(video, at=new / rate if backward else 0.0)
    return Job(sketch, captions_of(prompt), settings, notes=media.notes, sound=sound)


@ability
def recut(
    model: VideoModel,
    video: MediaLike,
    start: float,
    end: float,
    seconds: float | None = None,
    prompt: str = "",
    **options: Any,
) -> Job:
    """The video from `start` to `end`, and `seconds` more of it as the model continues it."""
    return extend(model, Part(video, start, end), seconds, prompt, **options)


@ability
def loop(
    model: VideoModel,
    video: MediaInput | None = None,
    prompt: str = "",
    seconds: float | None = None,
    *,
    strength: float = 1.0,
    progress: Progress | None = None,
    **options: Any,
) -> Job:
    """An endless loop of a video, or of a prompt alone: about `seconds` (1.5) lead from its end to its beginning.

    Of a prompt alone, the video is made first, here; it lasts 1.5 seconds, or what `duration` leaves besides
    the way back.
    """
    if video is None:
        video, seconds, options = _first_clip(model, prompt, seconds, progress, options)
    shape, settings = parse_options(NO_GUIDANCE | options)
    check_number("strength", strength, minimum=0, maximum=1)
    if seconds is not None or shape.has_duration:
        check_one(seconds, shape)
    media = read_input(model, video, shape.without_duration())
    frames, fps = media.video.frames, media.video.fps
    new, note = transition_frames(new_frames(seconds, shape, len(frames), fps, 1.5), fps, model.stride)
    repeated = min(len(frames), 1 + CONTEXT * model.stride)
    model.check_limits(len(frames) + new + repeated, media.video.size, fps, settings)
    sketch = sketches.loop(frames, new, repeated, fps, strength)
    keep = slice(len(frames) + new)
    return Job(sketch, captions_of(prompt), settings, keep, notes=media.notes + note)


def _first_clip(
    model: Any, prompt: str, seconds: float | None, progress: Progress | None, options: dict[str, Any]
) -> tuple[Video, float, dict[str, Any]]:
    """The video of a prompt that `loop` leads back to its beginning, made by a `Pipeline`; seconds; other options."""
    if not (isinstance(prompt, str) and prompt.strip()):
        raise UserError(f"There is nothing to loop: name a video, or give a {option_name('prompt')}.")
    shape, settings = parse_options(options)
    back = 1.5 if seconds is None else seconds
    check_number("seconds", back, above=0)
    fps = shape.fps or Request.fps
    first = shape.num_frames(fps) / fps - back if shape.has_duration else 1.5
    if first <= 0:
        raise UserError(f"The way back takes {back:g} s, which leaves no video: ask for a longer duration.")
    size = {name: getattr(shape, name) for name in ("resolution", "aspect", "size")}
    size = {name: value for name, value in size.items() if value is not None}
    request = Request(prompt, duration=first, fps=fps, **size, **dataclasses.asdict(settings))
    (video,) = model.make([text_to_video(model, request)], progress)
    return video, back, {name: value for name, value in options.items() if name not in SHAPE_FIELDS}


@ability
def fill(
    model: VideoModel,
    video: MediaInput,
    missing: Sequence[tuple[float, float]],
    prompt: str = "",
    **options: Any,
) -> Job:
    """Frames from one time to another, in seconds, are missing and generated."""
    shape, settings = parse_options(options)
    media = read_input(model, video, shape)
    T, rate = len(media.video), media.video.fps
    mask = np.zeros(T, bool)
    for begin, end in check_pairs("missing", missing):
        if not 0 <= begin <= end or round(begin * rate) >= T:
            raise UserError(
                f"Nothing is missing from {begin:g} to {end:g} s: the video lasts from 0 to {T / rate:g} s."
            )
        mask[round(begin * rate) : max(round(end * rate), round(begin * rate) + 1)] = True
    model.check_limits(T, media.video.size, rate, settings)
    sketch = sketches.fill(media.video.frames, mask, rate)
    return Job(sketch, captions_of(prompt), settings, notes=media.notes, sound=sound_of(video))


@ability
def smooth(model: VideoModel, video: MediaInput, fps: float = 24.0, prompt: str = "", **options: Any) -> Job:
    """More frames a second: generated ones between the video's own."""
    shape, settings = parse_options(options | {"fps": fps})
    # A duration holds for the input too; a number of frames is the result's.
    wanted = shape.num_frames(fps) if shape.frames else None
    if wanted is not None:
        shape = dataclasses.replace(shape, frames=None, duration=wanted / fps)
    media = read_input(model, video, dataclasses.replace(shape, fps=None))
    rate, notes = media.video.fps, list(media.notes)
    if fps < rate * (1 + 1e-3):
        raise UserError(f"The video is taken at {rate:g} frames a second already: ask for more than that.")
    factor = max(round(fps / rate), 2)
    if abs(factor * rate - fps) > 1e-3 * fps:
        notes.append(
            f"The video has {factor * rate:g} frames a second, {factor} times its {rate:g}, not {fps:g}."
        )
    job = _interpolate(model, media, factor, factor * rate, prompt, settings)
    return dataclasses.replace(job, notes=tuple(notes), sound=sound_of(video))


@ability
def slow(model: VideoModel, video: MediaInput, factor: int = 2, prompt: str = "", **options: Any) -> Job:
    """The video in slow motion: `factor` times as long, with generated frames between its own."""
    shape, settings = parse_options(NO_GUIDANCE | options)
    check_int("factor", factor, 2, MAX_FACTOR)
    if shape.has_duration:  # of the result
        rate = shape.fps or as_part(video).read(1e-6).video.fps
        shape = dataclasses.replace(shape, frames=None, duration=shape.num_frames(rate) / rate / factor)
    media = read_input(model, video, shape)
    return _interpolate(model, media, factor, media.video.fps, prompt, settings)


def _interpolate(
    model: VideoModel, media: Media, factor: int, fps: float, prompt: str, settings: Settings
) -> Job:
    """`factor` − 1 new frames between each two of the video; `fps` is the result's.

    Where they hardly differ from a cross-fade of their neighbours, that is shown: there nothing moves.
    """
    frames = media.video.frames
    if len(frames) < 2:
        raise UserError("A single frame has nothing between: give a video of two frames or more.")
    model.check_limits(1 + (len(frames) - 1) * factor, media.video.size, fps, settings)

    def keep_still(decoded: np.ndarray) -> np.ndarray:
        return keep_static(decoded, sketches.cross_fades(decoded[::factor], factor))

    sketch = sketches.smooth(frames, factor, fps)
    return Job(sketch, captions_of(prompt), settings, finish=keep_still, notes=media.notes)


@ability
def connect(
    model: VideoModel,
    a: MediaInput,
    b: MediaInput,
    seconds: float | None = None,
    prompt: str = "",
    *,
    strength: float = 1.0,
    **options: Any,
) -> Job:
    """One video turns into the other over about `seconds` (2 if not named), or so that both last `duration`.

    The transition starts from a cross-fade where `strength` is below 1.
    """
    shape, settings = parse_options(NO_GUIDANCE | options)
    check_number("strength", strength, minimum=0, maximum=1)
    if seconds is not None or shape.has_duration:
        check_one(seconds, shape)
    first, second, notes = read_pair(model, a, b, shape.without_duration())
    fps, T = first.fps, len(first) + len(second)
    new, note = transition_frames(new_frames(seconds, shape, T, fps, 2.0), fps, model.stride)
    model.check_limits(T + new, first.size, fps, settings)
    sketch = sketches.connect(first.frames, second.frames, new, fps, strength)
    return Job(sketch, captions_of(prompt), settings, notes=notes + note)


@ability
def blend(
    model: VideoModel,
    a: MediaInput,
    b: MediaInput,
    curve: Sequence[tuple[float, float]] | None = None,
    prompt: str = "",
    *,
    strength: float = BLEND_STRENGTH,
    **options: Any,
) -> Job:
    """Both videos at once; `curve` has (seconds, weight of the second), by default from 0 to 1 all along."""
    shape, settings = parse_options(options)
    check_number("strength", strength, minimum=0, maximum=1)
    first, second, notes = read_pair(model, a, b, shape)
    T, fps = min(len(first), len(second)), first.fps
    if len(first) != len(second):
        notes += (f"Both videos are used as long as the shorter one lasts, {T / fps:g} s.",)
    points = ((0.0, 0.0), (max(T - 1, 1) / fps, 1.0)) if curve is None else check_pairs("curve", curve)
    weight = sketches.curve(points, T, fps)
    model.check_limits(T, first.size, fps, settings)
    sketch = sketches.blend(first.frames[:T], second.frames[:T], weight, fps, strength)
    return Job(sketch, captions_of(prompt), settings, notes=notes)
