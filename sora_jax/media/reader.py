"""The one door through which abilities take what they are given: files of all kinds, videos, arrays, pictures."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NoReturn, TypeAlias

import numpy as np
from PIL import Image

from sora_jax.errors import UserError, user_path
from sora_jax.media.containers import Path
from sora_jax.media.decoding import Header, displayed_size
from sora_jax.media.pictures import picture_pixels
from sora_jax.media.video import Reader, Report, Video, frame_count, frame_size, open_reader, resample

MediaLike: TypeAlias = Path | Video | np.ndarray | Image.Image
# Frames in memory; a large picture size allows fewer than `most_frames`.
MAX_BYTES = 4 << 30


@dataclasses.dataclass(frozen=True, repr=False)
class Media:
    """What was read, and what had to be done for it.

    Attributes:
      video: frames upright and opaque, at an even rate.
      source_size: (height, width) of the first frame as stored, upright.
      source_fps: frames a second on the average; 1 for a picture.
      source_frames: how many frames the source has; None where its header doesn't tell.
      notes: what was changed or left out, a sentence each.
      path: the file, for its sound; None where the source was no file.
    """

    video: Video
    source_size: tuple[int, int]
    source_fps: float
    source_frames: int | None
    notes: tuple[str, ...]
    path: pathlib.Path | None

    def __repr__(self) -> str:
        source = "" if self.path is None else f", {str(self.path)!r}"
        return f"Media({self.video!r}{source}, {len(self.notes)} notes)"


def read_media(
    source: MediaLike,
    *,
    fps: float | None = None,
    start: float = 0.0,
    seconds: float | None = None,
    resolution: int | None = None,
    most_frames: int = 2000,
) -> Media:
    """Reads anything that abilities take, in memory that grows with the result, not with the source.

    Frames come as they are displayed (`video.read_video`), uneven times become even ones. Of a damaged video what
    can be decoded is used, the frame before standing in for a lost one, and the notes say how much that was; a
    damaged picture is refused.

    Args:
      source: a file (mp4, webm, mov, gif, apng, png, jpeg, webp, ...); a `Video`; a picture of Pillow's; or an
        array [Y,X], [Y,X,C], [T,Y,X] or [T,Y,X,C] of uint8, or of floats in 0..1, where C is 1 (grey),
        3 (RGB) or 4 (RGBA).
      fps: the rate of the result, in frames a second, and that at which an array's frames follow each other. None
        keeps the source's.
      start: seconds into the source; the result begins with the frame on show there.
      seconds: how many to read; None reads to the end. (A single picture stays one frame whatever these are.)
      resolution: the short side of the result in pixels, where the long side is the nearest even number. None
        keeps the source's size.
      most_frames: a source that gives more is refused, without decoding it where its header tells its duration.
        Of large frames fewer than these are allowed (`MAX_BYTES`).

    Raises:
      UserError: the source can't be read, ends before `start`, or is too long; or an argument makes no sense.
    """
    for name, value in {"fps": fps, "seconds": seconds}.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"{name} is a positive number, not {value}.")
    if not (math.isfinite(start) and start >= 0):
        raise UserError(f"start is a number of seconds from 0 on, not {start}.")
    if resolution is not None and resolution < 1:
        raise UserError(f"resolution is a number of pixels from 1 on, not {resolution}.")

    reader = _reader_of(source, fps, start)
    name, known = reader.report.name, reader.header
    single = known.frames == 1
    rate, first_second = fps or known.fps, 0.0 if known.still else start
    count = 1 if single else None if seconds is None else frame_count(seconds, rate)
    moments = itertools.islice(reader.evenly(rate, first_second), count)
    _, _, frame = next(moments, (0.0, 0.0, None))
    if frame is None:
        raise UserError(f"{name} has no frame at {start:g} seconds: it ends before; start earlier.")
    array = reader.pixels(frame)
    source_size = array.shape[:2]
    height, width = _result_size(source_size, reader.stretch, resolution)

    most = min(most_frames, MAX_BYTES // (3 * height * width))
    wanted = min((known.seconds - first_second) * rate, math.inf if count is None else count)

    def refuse(length: str) -> NoReturn:
        raise UserError(
            f"{name} {length} frames to read at {rate:.4g} a second, but {most} of {width}x{height} pixels "
            f"are the most: read a part with --start and --end."
        )

    if wanted >= most + 0.5:
        refuse(f"lasts {known.seconds:.6g} seconds, {wanted:.0f}")
    shown, result = frame, resample(array, height, width)
    del array  # a large frame is not held while the next one comes

    def finished() -> Iterator[np.ndarray]:
        nonlocal shown, result
        for number, following in enumerate(itertools.chain([frame], (frame for _, _, frame in moments))):
            if number == most:
                refuse(f"has more than {most}")
            if following is not shown:
                shown, result = following, resample(reader.pixels(following), height, width)
            yield result

    # It grows in place, where a list of frames would be in memory together with the array made of it.
    video = Video(np.fromiter(finished(), np.dtype((np.uint8, (height, width, 3)))), rate)
    wanted_end = math.inf if seconds is None or single else start + seconds
    notes = (*_changes(reader, video, source_size), *_losses(reader.report, first_second, wanted_end))
    path = user_path(source) if isinstance(source, str | os.PathLike) else None
    return Media(video, source_size, known.fps, known.frames, notes, path)


def _reader_of(source: Any, fps: float | None, start: float) -> Reader:
    if isinstance(source, str | os.PathLike):
        return open_reader(source, start)
    if isinstance(source, Video):
        return _array(source.frames, "The video", source.fps, start)
    if isinstance(source, Image.Image):
        return _array(picture_pixels(source)[None], "The picture", 1.0, start)
    if not hasattr(source, "__array__"):
        raise UserError(
            f"What is read is a path, a Video, an array or a picture of Pillow's, not {type(source).__name__}."
        )
    frames = _frames(np.asarray(source))
    if fps is None and len(frames) > 1:
        raise UserError("An array of frames doesn't tell its rate: say fps, or pass a Video.")
    return _array(frames, "The array", fps or 1.0, start)


def _array(frames: np.ndarray, name: str, fps: float, start: float) -> Reader:
    # A single picture has no time to start at.
    begin = 0 if len(frames) == 1 else int(start * fps + 1e-6)
    moments = ((i / fps, (i + 1) / fps, _array_pixels(frames[i])) for i in range(begin, len(frames)))
    size = frames.shape[1], frames.shape[2]
    known = Header(fps, len(frames) / fps, size, len(frames), still=len(frames) == 1)
    return Reader(known, moments, Report(name, fps, known.seconds))


def _frames(array: np.ndarray) -> np.ndarray:
    """uint8 or float [T,Y,X,C] of an array that leaves out axes."""
    shape = array.shape
    if array.ndim == 2 or (array.ndim == 3 and shape[-1] in (1, 3, 4)):
        array = array[None]
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or array.shape[-1] not in (1, 3, 4) or 0 in shape:
        raise UserError(
            f"An array is a picture [Y,X] or [Y,X,C] or a video [T,Y,X] or [T,Y,X,C] with 1, 3 or 4 channels C "
            f"and nothing empty, not {list(shape)}."
        )
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= -1e-3 and high <= 1 + 1e-3):
            raise UserError(f"An array of floats lies in 0..1, not in {low:.4g}..{high:.4g}: rescale it.")
    elif array.dtype != np.uint8:
        raise UserError(f"An array is of uint8, or of floats in 0..1, not of {array.dtype}: convert it.")
    return array


def _array_pixels(frame: np.ndarray) -> np.ndarray:
    """uint8[Y,X,3 or 4] of uint8 or float [Y,X,1, 3 or 4]."""
    if frame.dtype != np.uint8:
        frame = (frame.astype(np.float32).clip(0, 1) * 255 + 0.5).astype(np.uint8)
    return np.repeat(frame, 3, -1) if frame.shape[-1] == 1 else frame


def _result_size(size: tuple[int, int], stretch: float, resolution: int | None) -> tuple[int, int]:
    height, width = displayed_size(size, stretch)
    return (height, width) if resolution is None else frame_size(resolution, width / height)


def _changes(reader: Reader, video: Video, source_size: tuple[int, int]) -> Iterator[str]:
    name, report = reader.report.name, reader.report
    if video.size != source_size:
        (height, width), (new_height, new_width) = source_size, video.size
        square = "" if reader.header.stretch == 1 else ", its own not being square"
        yield f"{name} was resized from {width}x{height} to {new_width}x{new_height} pixels{square}."
    if reader.header.frames != 1 and not math.isclose(video.fps, report.fps, rel_tol=1e-6):
        yield f"{name} was taken from {report.fps:.4g} to {video.fps:.4g} frames a second."
    if report.uneven and not report.lost:
        yield f"{name} has frames at uneven times: {video.fps:.4g} even ones a second show what is on show then."
    yield from report.remarks()


def _losses(report: Report, start: float, end: float) -> Iterator[str]:
    yield from report.damage(start, end)
    grace = max(3 / report.fps, 0.25)
    if math.isfinite(end) and end - report.end > grace and not report.seconds - report.end > grace:
        yield f"{report.name} ends after {report.end:.4g} seconds, before the {end:.4g} asked for."
