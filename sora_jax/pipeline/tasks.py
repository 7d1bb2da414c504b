"""The abilities: each function reads its inputs, makes the sketch and returns the job.

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
from sora_jax.media.compositing import agree, crop, detailed, overrule, paste
from sora_jax.media.containers import Path
from sora_jax.media.reader import Media, MediaLike
from sora_jax.media.video import Video, frame_size, resize
from sora_jax.pipeline import abilities
from sora_jax.pipeline.budget import check_pixels, frames_of
from sora_jax.pipeline.checks import check_number, check_switch, check_whole, shown
from sora_jax.pipeline.inputs import (
    AS_IT_IS,
    MediaInput,
    Part,
    as_part,
    nearest_supported,
    output_size,
    read_full_size,
    read_input,
    read_pair,
    sound_of,
)
from sora_jax.pipeline.job import (
    Job,
    box_inside,
    captions_of,
    check_box,
    check_one,
    check_pairs,
    new_frames,
    parse_options,
    transition_frames,
)
from sora_jax.pipeline.keywords import called, explicit_keywords
from sora_jax.pipeline.model import Model
from sora_jax.pipeline.request import Request, text_to_video
from sora_jax.pipeline.settings import Progress, Settings
from sora_jax.pipeline.shape import SHAPE_FIELDS, Shape
from sora_jax.pipeline.storyboard import Storyboard, read_storyboard
from sora_jax.tokens.canvas import FRAMES_PER_LATENT, Sketch

CONTEXT = 1 + 2 * FRAMES_PER_LATENT  # frames of a clip that the transition back to it sees

MOST_FACTOR = 1000  # of slow motion
# Shares of the sampler's steps.
BLEND_STRENGTH = 0.7
UPSCALE_STRENGTH = 0.3
# Between two conditioning clips the neighbours matter more than the prompt: no guidance unless it is asked for.
BETWEEN: dict[str, Any] = {"guidance": 1.0}

ability = explicit_keywords(Shape, Settings)


@explicit_keywords(Request, leave_out=("duration", "fps", "frames"))
def image(model: Model, prompt: str, **fields: Any) -> Job:
    """A picture of `prompt`: a video of one frame."""
    return text_to_video(model, Request(prompt, frames=1, **fields))


@ability
def animate(
    model: Model,
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
    T = shape.count(fps)
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
                f"A picture can't be placed at {shown(time)}: say first, last or a number of seconds."
            )
        if not isinstance(time, str):
            check_number("at", time, least=0)
        if size is None:
            size = output_size(model, as_part(source).read(1e-6).video.size, shape)
            model.admit(T, size, fps, settings)
        media = read_input(model, source, Shape(fps=fps, size=size), 1e-6)
        notes += media.notes
        taken[places[time] if isinstance(time, str) else round(time * fps)] = media.video.frames[0]
    assert size is not None
    sketch = abilities.animate(taken, (T, *size), fps)
    return Job(sketch, captions_of(prompt), settings, notes=tuple(notes))


@ability
def extend(
    model: Model,
    video: MediaInput,
    seconds: float | None = None,
    prompt: str = "",
    *,
    backward: bool = False,
    **options: Any,
) -> Job:
    """The video goes on for `seconds`, or until it lasts `duration`; backward, it begins that much earlier."""
    shape, settings = parse_options(options)
    check_switch("backward", backward)
    check_one(seconds, shape)
    media = read_input(model, video, shape.any_length())
    rate, T = media.video.fps, len(media.video)
    new = shape.count(rate) - T if seconds is None else frames_of(seconds, rate)
    if new < 1:
        raise UserError(f"The video lasts {T / rate:g} s already: ask for a longer duration.")
    model.admit(T + new, media.video.size, rate, settings)
    sketch = abilities.extend(media.video.frames, new, rate, backward)
    sound = sound_of(video, at=new / rate if backward else 0.0)
    return Job(sketch, captions_of(prompt), settings, notes=media.notes, sound=sound)


@ability
def recut(
    model: Model,
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
    model: Model,
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
    shape, settings = parse_options(BETWEEN | options)
    check_number("strength", strength, least=0, most=1)
    if seconds is not None or shape.long:
        check_one(seconds, shape)
    media = read_input(model, video, shape.any_length())
    frames, fps = media.video.frames, media.video.fps
    new, note = transition_frames(new_frames(seconds, shape, len(frames), fps, 1.5), fps)
    repeated = min(len(frames), CONTEXT)
    model.admit(len(frames) + new + repeated, media.video.size, fps, settings)
    sketch = abilities.loop(frames, new, repeated, fps, strength)
    keep = slice(len(frames) + new)
    return Job(sketch, captions_of(prompt), settings, keep, notes=media.notes + note)


def _first_clip(
    model: Any, prompt: str, seconds: float | None, progress: Progress | None, options: dict[str, Any]
) -> tuple[Video, float, dict[str, Any]]:
    """The video of a prompt that `loop` leads back to its beginning, made by a `Pipeline`; seconds; other options."""
    if not (isinstance(prompt, str) and prompt.strip()):
        raise UserError(f"There is nothing to loop: name a video, or give a {called('prompt')}.")
    shape, settings = parse_options(options)
    back = 1.5 if seconds is None else seconds
    check_number("seconds", back, above=0)
    fps = shape.fps or Request.fps
    first = shape.count(fps) / fps - back if shape.long else 1.5
    if first <= 0:
        raise UserError(f"The way back takes {back:g} s, which leaves no video: ask for a longer duration.")
    size = {name: getattr(shape, name) for name in ("resolution", "aspect", "size")}
    size = {name: value for name, value in size.items() if value is not None}
    request = Request(prompt, duration=first, fps=fps, **size, **dataclasses.asdict(settings))
    (video,) = model.make([text_to_video(model, request)], progress)
    return video, back, {name: value for name, value in options.items() if name not in SHAPE_FIELDS}


@ability
def fill(
    model: Model, video: MediaInput, missing: Sequence[tuple[float, float]], prompt: str = "", **options: Any
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
    model.admit(T, media.video.size, rate, settings)
    sketch = abilities.fill(media.video.frames, mask, rate)
    return Job(sketch, captions_of(prompt), settings, notes=media.notes, sound=sound_of(video))


@ability
def smooth(model: Model, video: MediaInput, fps: float = 24.0, prompt: str = "", **options: Any) -> Job:
    """More frames a second: generated ones between the video's own."""
    shape, settings = parse_options(options | {"fps": fps})
    # A duration holds for the input too; a number of frames is the result's.
    wanted = shape.count(fps) if shape.frames else None
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
    job = _with_frames_between(model, media, factor, factor * rate, prompt, settings)
    return dataclasses.replace(job, notes=tuple(notes), sound=sound_of(video))


@ability
def slow(model: Model, video: MediaInput, factor: int = 2, prompt: str = "", **options: Any) -> Job:
    """The video in slow motion: `factor` times as long, with generated frames between its own."""
    shape, settings = parse_options(BETWEEN | options)
    check_whole("factor", factor, 2, MOST_FACTOR)
    if shape.long:  # of the result
        rate = shape.fps or as_part(video).read(1e-6).video.fps
        shape = dataclasses.replace(shape, frames=None, duration=shape.count(rate) / rate / factor)
    media = read_input(model, video, shape)
    return _with_frames_between(model, media, factor, media.video.fps, prompt, settings)


def _with_frames_between(
    model: Model, media: Media, factor: int, fps: float, prompt: str, settings: Settings
) -> Job:
    """`factor` − 1 new frames between each two of the video; `fps` is the result's.

    Where they hardly differ from a cross-fade of their neighbours, that is shown: there nothing moves.
    """
    frames = media.video.frames
    if len(frames) < 2:
        raise UserError("A single frame has nothing between: give a video of two frames or more.")
    model.admit(1 + (len(frames) - 1) * factor, media.video.size, fps, settings)

    def keep_still(decoded: np.ndarray) -> np.ndarray:
        return overrule(decoded, abilities.between(decoded[::factor], factor))

    sketch = abilities.smooth(frames, factor, fps)
    return Job(sketch, captions_of(prompt), settings, finish=keep_still, notes=media.notes)


@ability
def connect(
    model: Model,
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
    shape, settings = parse_options(BETWEEN | options)
    check_number("strength", strength, least=0, most=1)
    if seconds is not None or shape.long:
        check_one(seconds, shape)
    first, second, notes = read_pair(model, a, b, shape.any_length())
    fps, T = first.fps, len(first) + len(second)
    new, note = transition_frames(new_frames(seconds, shape, T, fps, 2.0), fps)
    model.admit(T + new, first.size, fps, settings)
    sketch = abilities.connect(first.frames, second.frames, new, fps, strength)
    return Job(sketch, captions_of(prompt), settings, notes=notes + note)


@ability
def blend(
    model: Model,
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
    check_number("strength", strength, least=0, most=1)
    first, second, notes = read_pair(model, a, b, shape)
    T, fps = min(len(first), len(second)), first.fps
    if len(first) != len(second):
        notes += (f"Both videos are used as long as the shorter one lasts, {T / fps:g} s.",)
    points = ((0.0, 0.0), (max(T - 1, 1) / fps, 1.0)) if curve is None else check_pairs("curve", curve)
    weight = abilities.curve(points, T, fps)
    model.admit(T, first.size, fps, settings)
    sketch = abilities.blend(first.frames[:T], second.frames[:T], weight, fps, strength)
    return Job(sketch, captions_of(prompt), settings, notes=notes)


@ability
def inpaint(
    model: Model,
    video: MediaInput,
    prompt: str = "",
    *,
    box: tuple[int, int, int, int] | None = None,
    mask: MediaInput | None = None,
    strength: float = 1.0,
    **options: Any,
) -> Job:
    """What is in `box` (left, top, width, height in the input's pixels), or where `mask` is light, is generated.

    A mask is a picture or a video. Outside, the input's own pixels are kept.
    """
    shape, settings = parse_options(options)
    check_number("strength", strength, least=0, most=1)
    if (box is None) == (mask is None):
        raise UserError(
            f"The part to generate is named by {called('box')} or {called('mask')}: give one of the two."
        )
    if box is not None:
        check_box(box)
    media = read_input(model, video, shape)
    frames = media.video.frames
    T, Y, X, _ = frames.shape
    model.admit(T, (Y, X), media.video.fps, settings)
    inside = np.zeros((T, Y, X), bool)
    if box is not None:
        inside[:, *box_inside(box, media.source_size, (Y, X), cropped=shape.sized)] = True
    else:
        assert mask is not None
        part = dataclasses.replace(as_part(mask), start=as_part(mask).start + as_part(video).start)
        media_mask = read_input(model, part, Shape(fps=media.video.fps, size=(Y, X)), T / media.video.fps)
        light = media_mask.video.frames.mean(-1) > 127
        inside |= light[np.minimum(np.arange(T), len(light) - 1)]
        if not inside.any():
            raise UserError("The mask is black everywhere: the part to generate must be light in it.")
    sketch = abilities.inpaint(frames, inside, media.video.fps, strength)
    finish = paste(frames, inside)
    return Job(sketch, captions_of(prompt), settings, finish=finish, notes=media.notes, sound=sound_of(video))


@ability
def outpaint(
    model: Model, video: MediaInput, aspect: str | float | None = None, prompt: str = "", **options: Any
) -> Job:
    """The picture grows to another aspect ratio, or `size`; the input's own pixels stay in its middle."""
    shape, settings = parse_options(options | {"aspect": aspect})
    if aspect is None and shape.size is None:
        raise UserError(
            f"The larger frame's shape is missing: name it by {called('aspect')} (16:9) or {called('size')}."
        )
    Y, X = own = as_part(video).read(1e-6).video.size
    ratio = np.divide(*(shape.size or frame_size(1000, aspect or 1))[::-1])
    grown = lambda Y, X: (Y, 2 * round(Y * ratio / 2)) if ratio > X / Y else (2 * round(X / ratio / 2), X)
    size = grown(Y, X)
    if size[0] <= Y and size[1] <= X:
        what = f"{shape.size[1]}×{shape.size[0]}" if shape.size else shown(aspect).strip("'")
        raise UserError(f"The video has the aspect ratio {what} already: name another one.")
    if shape.resolution is None and shape.size is None:
        scale = min(1.0, *np.divide(nearest_supported(model, size), size))
    else:
        scale = min(np.divide(output_size(model, own, shape), size))
    if scale != 1:
        Y, X = (max(2 * int(side * scale / 2 + 1e-6), 2) for side in (Y, X))
        size = shape.size or grown(Y, X)
    media = read_input(model, video, dataclasses.replace(shape, resolution=None, aspect=None, size=(Y, X)))
    model.admit(len(media.video), size, media.video.fps, settings)
    sketch = abilities.outpaint(media.video.frames, size, media.video.fps)
    finish = paste(sketch.frames, sketch.strength > 0)
    return Job(sketch, captions_of(prompt), settings, finish=finish, notes=media.notes, sound=sound_of(video))


@ability
def edit(
    model: Model,
    video: MediaInput,
    prompt: str,
    strength: float = 0.7,
    *,
    motion: bool = False,
    **options: Any,
) -> Job:
    """The video changed to match `prompt` (SDEdit), by a `strength` of 0 to 1; `motion` keeps motion, not looks."""
    shape, settings = parse_options(options)
    check_number("strength", strength, least=0, most=1)
    check_switch("motion", motion)
    if isinstance(prompt, str) and not prompt.strip():
        raise UserError(
            "The prompt is empty: say what is to be seen instead, for example 'a blue circle moves right'."
        )
    media = read_input(model, video, shape)
    model.admit(len(media.video), media.video.size, media.video.fps, settings)
    sketch = abilities.edit(media.video.frames, strength, media.video.fps, motion)
    return Job(sketch, captions_of(prompt), settings, notes=media.notes, sound=sound_of(video))


@ability
def upscale(
    model: Model,
    video: MediaInput,
    resolution: int | None = None,
    prompt: str = "",
    *,
    strength: float = UPSCALE_STRENGTH,
    **options: Any,
) -> Job:
    """The video at a higher resolution: scaled up, its edges generated from partial noise.

    Scaled down again, the result gives the input.
    """
    shape, settings = parse_options(options | {"resolution": resolution})
    check_number("strength", strength, least=0, most=1)
    if resolution is None and shape.size is None:
        raise UserError(
            f"The higher resolution is missing: name it by {called('resolution')}, the short side in pixels, or "
            f"{called('size')}."
        )
    small = as_part(video).read(1e-6, fps=shape.fps).video
    size = shape.size_of(small.size)
    if shape.size is None and shape.aspect is None:
        high, wide = (2 * round(side * min(size) / min(small.size) / 2) for side in small.size)
        size = high, wide
    if min(size) <= min(small.size):
        raise UserError(
            f"The video's short side has {min(small.size)} pixels already: ask for more than that."
        )
    check_pixels(model.work(1, size, settings))
    media = read_full_size(video, shape)
    given = Video(crop(media.video.frames, size), media.video.fps)
    model.admit(len(given), size, given.fps, settings)
    larger = resize(given, *size).frames
    edges = detailed(larger)
    sketch = abilities.inpaint(larger, edges, media.video.fps, strength)
    over = paste(larger, edges)
    finish = lambda decoded: agree(over(decoded), given.frames)
    return Job(sketch, captions_of(prompt), settings, finish=finish, notes=media.notes, sound=sound_of(video))


@ability
def storyboard(model: Model, board: Storyboard | Path, **options: Any) -> Job:
    """The video that a storyboard, or its YAML file, describes; see `storyboard.Storyboard`.

    What is named of its shape replaces the storyboard's own.

    Raises:
      UserError: a picture or clip can't be read, or a clip lasts beyond the next card.
    """
    board = board if isinstance(board, Storyboard) else read_storyboard(board)
    shape, settings = parse_options(options)
    if shape != AS_IT_IS:
        fps = shape.fps or board.fps
        board = dataclasses.replace(
            board,
            duration=shape.count(fps) / fps if shape.frames else shape.duration or board.duration,
            fps=fps,
            resolution=shape.resolution or board.resolution,
            aspect=board.aspect if shape.aspect is None else shape.aspect,
            size=shape.size or (None if shape.sized else board.size),
        )
    size = frame_size(board.resolution, board.aspect) if board.size is None else board.size
    T = frames_of(board.duration, board.fps)
    new = frames_of(board.loop, board.fps) if board.loop else 0
    given = any(card.image is not None or card.clip is not None for card in board.cards)
    model.admit(T + new, size, board.fps, settings, held=given)
    sketch = abilities.blank((T, *size), board.fps, writable=given)
    notes: list[str] = []
    ends = [*(card.at for card in board.cards[1:]), board.duration]
    for number, (card, end) in enumerate(zip(board.cards, ends, strict=True), 1):
        source = card.image if card.clip is None else card.clip
        if source is None:
            continue
        seconds = 1e-6 if card.clip is None else None
        part = Part(source, card.start, card.end)
        media = read_input(model, part, Shape(fps=board.fps, size=size), seconds)
        notes += media.notes
        first = min(round(card.at * board.fps), T - 1)
        last = first + len(media.video)
        if last > round(end * board.fps):
            raise UserError(
                f"The clip of card {number} lasts {media.video.duration:g} s from {card.at:g} s on, beyond "
                f"{end:g} s, where {'the next card begins' if number < len(board.cards) else 'the video ends'}: "
                "give the card an end for its clip."
            )
        sketch.frames[first:last] = media.video.frames
        sketch.strength[first:last] = 0
    keep = slice(None)
    if board.loop:
        sketch, keep = _with_loop(sketch, new)
    captions = tuple((card.at, card.text) for card in board.cards if card.text.strip())
    return Job(sketch, captions, settings, keep, notes=tuple(notes))


def _with_loop(sketch: Sketch, new: int) -> tuple[Sketch, slice]:
    """The sketch and `new` frames that lead back to its first one, which must be conditioning."""
    if not sketch.conditioning_frames[0]:
        raise UserError(
            "A storyboard that loops begins with a picture to come back to: give its first card, at 0 s, an image."
        )
    T = len(sketch.frames)
    frames = np.concatenate([sketch.frames, np.repeat(sketch.frames[:1], new + 1, axis=0)])
    strength = np.concatenate([sketch.strength, np.ones((new + 1, *sketch.strength.shape[1:]), np.float32)])
    strength[-1] = 0
    return Sketch(frames, strength, sketch.fps), slice(T + new)
