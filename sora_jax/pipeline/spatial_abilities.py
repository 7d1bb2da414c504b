"""Abilities that change pictures: a part, the frame, the look, the resolution; see `temporal_abilities`."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from sora_jax.errors import UserError
from sora_jax.media.compositing import back_project, center_crop, edge_mask, paste
from sora_jax.media.video import Video, frame_size, resize
from sora_jax.pipeline import sketches
from sora_jax.pipeline.budget import check_pixels
from sora_jax.pipeline.checks import check_bool, check_number, short_repr
from sora_jax.pipeline.inputs import (
    MediaInput,
    as_part,
    nearest_supported,
    output_size,
    read_full_size,
    read_input,
    sound_of,
)
from sora_jax.pipeline.job import Job, ability, box_inside, captions_of, check_box, parse_options
from sora_jax.pipeline.keywords import option_name
from sora_jax.pipeline.model import VideoModel
from sora_jax.pipeline.shape import Shape

UPSCALE_STRENGTH = 0.3  # share of the sampler's steps


@ability
def inpaint(
    model: VideoModel,
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
    check_number("strength", strength, minimum=0, maximum=1)
    if (box is None) == (mask is None):
        raise UserError(
            f"The part to generate is named by {option_name('box')} or {option_name('mask')}: give one of the two."
        )
    if box is not None:
        check_box(box)
    media = read_input(model, video, shape)
    frames = media.video.frames
    T, Y, X, _ = frames.shape
    model.check_limits(T, (Y, X), media.video.fps, settings)
    inside = np.zeros((T, Y, X), bool)
    if box is not None:
        inside[:, *box_inside(box, media.source_size, (Y, X), cropped=shape.has_size)] = True
    else:
        assert mask is not None
        part = dataclasses.replace(as_part(mask), start=as_part(mask).start + as_part(video).start)
        media_mask = read_input(model, part, Shape(fps=media.video.fps, size=(Y, X)), T / media.video.fps)
        light = media_mask.video.frames.mean(-1) > 127
        inside |= light[np.minimum(np.arange(T), len(light) - 1)]
        if not inside.any():
            raise UserError("The mask is black everywhere: the part to generate must be light in it.")
    sketch = sketches.inpaint(frames, inside, media.video.fps, strength)
    finish = paste(frames, inside)
    return Job(sketch, captions_of(prompt), settings, finish=finish, notes=media.notes, sound=sound_of(video))


@ability
def outpaint(
    model: VideoModel, video: MediaInput, aspect: str | float | None = None, prompt: str = "", **options: Any
) -> Job:
    """The picture grows to another aspect ratio, or `size`; the input's own pixels stay in its middle."""
    shape, settings = parse_options(options | {"aspect": aspect})
    if aspect is None and shape.size is None:
        raise UserError(
            f"The larger frame's shape is missing: name it by {option_name('aspect')} (16:9) or {option_name('size')}."
        )
    Y, X = own = as_part(video).read(1e-6).video.size
    ratio = np.divide(*(shape.size or frame_size(1000, aspect or 1))[::-1])
    grown = lambda Y, X: (Y, 2 * round(Y * ratio / 2)) if ratio > X / Y else (2 * round(X / ratio / 2), X)
    size = grown(Y, X)
    if size[0] <= Y and size[1] <= X:
        what = f"{shape.size[1]}×{shape.size[0]}" if shape.size else short_repr(aspect).strip("'")
        raise UserError(f"The video has the aspect ratio {what} already: name another one.")
    if shape.resolution is None and shape.size is None:
        scale = min(1.0, *np.divide(nearest_supported(model, size), size))
    else:
        scale = min(np.divide(output_size(model, own, shape), size))
    if scale != 1:
        Y, X = (max(2 * int(side * scale / 2 + 1e-6), 2) for side in (Y, X))
        size = shape.size or grown(Y, X)
    media = read_input(model, video, dataclasses.replace(shape, resolution=None, aspect=None, size=(Y, X)))
    model.check_limits(len(media.video), size, media.video.fps, settings)
    sketch = sketches.outpaint(media.video.frames, size, media.video.fps)
    finish = paste(sketch.frames, sketch.strength > 0)
    return Job(sketch, captions_of(prompt), settings, finish=finish, notes=media.notes, sound=sound_of(video))


@ability
def edit(
    model: VideoModel,
    video: MediaInput,
    prompt: str,
    strength: float = 0.7,
    *,
    motion: bool = False,
    **options: Any,
) -> Job:
    """The video changed to match `prompt` (SDEdit), by a `strength` of 0 to 1; `motion` keeps motion, not looks."""
    shape, settings = parse_options(options)
    check_number("strength", strength, minimum=0, maximum=1)
    check_bool("motion", motion)
    if isinstance(prompt, str) and not prompt.strip():
        raise UserError(
            "The prompt is empty: say what is to be seen instead, for example 'a blue circle moves right'."
        )
    media = read_input(model, video, shape)
    model.check_limits(len(media.video), media.video.size, media.video.fps, settings)
    sketch = sketches.edit(media.video.frames, strength, media.video.fps, motion)
    return Job(sketch, captions_of(prompt), settings, notes=media.notes, sound=sound_of(video))


@ability
def upscale(
    model: VideoModel,
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
    check_number("strength", strength, minimum=0, maximum=1)
    if resolution is None and shape.size is None:
        raise UserError(
            f"The higher resolution is missing: name it by {option_name('resolution')}, the short side in pixels, or "
            f"{option_name('size')}."
        )
    small = as_part(video).read(1e-6, fps=shape.fps).video
    size = shape.resolve_size(small.size)
    if shape.size is None and shape.aspect is None:
        high, wide = (2 * round(side * min(size) / min(small.size) / 2) for side in small.size)
        size = high, wide
    if min(size) <= min(small.size):
        raise UserError(
            f"The video's short side has {min(small.size)} pixels already: ask for more than that."
        )
    check_pixels(model.cost(1, size, settings))
    media = read_full_size(video, shape)
    given = Video(center_crop(media.video.frames, size), media.video.fps)
    model.check_limits(len(given), size, given.fps, settings)
    larger = resize(given, *size).frames
    edges = edge_mask(larger)
    sketch = sketches.inpaint(larger, edges, media.video.fps, strength)
    composite = paste(larger, edges)
    finish = lambda decoded: back_project(composite(decoded), given.frames)
    return Job(sketch, captions_of(prompt), settings, finish=finish, notes=media.notes, sound=sound_of(video))
