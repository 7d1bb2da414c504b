"""Pictures and video files as upright frames at their times: every oddity that files have is met here."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import Interpolation
from PIL import Image, ImageOps

from sora_jax.errors import UserError

Path = str | os.PathLike[str]

# What transparent pixels lie on: the page on which most pictures with alpha are drawn to be seen.
BACKDROP = (255, 255, 255)

# Their usual decoders know nothing of transparency.
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}

# Without these the conversion between RGB and YUV rounds down: a bias of one level in 256.
EXACT = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
)


def read_picture(path: Path) -> np.ndarray | None:
    """The pixels of a picture as `picture_pixels` gives them; None where the file is none, or one that moves.

    Raises:
      UserError: there is no such file, it is empty, or the picture in it is damaged.
    """
    if not os.path.exists(path):
        raise UserError(f"There is no file {path}: check the name.")
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder, not a video: name a file in it.")
    if os.path.isfile(path) and not os.path.getsize(path):
        raise UserError(f"{path} is empty: its writing or its download failed; do that again.")
    try:
        with Image.open(path) as image:
            if image.format in ("GIF", "PNG", "WEBP") and _moves(image):
                return None
            return picture_pixels(image)
    except Image.UnidentifiedImageError:
        return None
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} has too many pixels for a picture: make it smaller first.") from error
    except Exception as error:  # a damaged file makes Pillow's plugins stumble in ways of their own
        raise UserError(f"{path} can't be read as a picture: {error}; is the file whole?") from error


def _moves(image: Image.Image) -> bool:
    try:
        return getattr(image, "is_animated", False)
    except Exception:  # a GIF that is cut off between frames
        return True


def picture_pixels(image: Image.Image) -> np.ndarray:
    """uint8[Y,X,3], or uint8[Y,X,4] where something may be transparent; upright, as its EXIF tells."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # Pillow clips 16-bit greys where it converts them.
        image = Image.fromarray((np.asarray(image, np.int64) // 256).clip(0, 255).astype(np.uint8))
    return np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))


def pixels(frame: Any) -> np.ndarray:
    """A decoded frame as uint8[Y,X,3], or uint8[Y,X,4] where something may be transparent; upright."""
    alpha = any(component.is_alpha for component in frame.format.components) or frame.format.name == "pal8"
    array = frame.to_ndarray(format="rgba" if alpha else "rgb24", interpolation=EXACT)
    return np.ascontiguousarray(np.rot90(array, round(frame.rotation / 90))) if frame.rotation else array


def opaque(array: np.ndarray) -> np.ndarray:
    """uint8[...,3] of uint8[...,3 or 4]: what is transparent lies on `BACKDROP`."""
    if array.shape[-1] == 3:
        return array
    alpha = array[..., 3:].astype(np.uint16)
    return ((array[..., :3] * alpha + np.uint16(BACKDROP) * (255 - alpha) + 127) // 255).astype(np.uint8)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """PyAV's (container, stream of pictures) of a video file.

    Raises:
      UserError: it is no video.
    """
    try:
        container = av.open(os.fspath(path))
    except (av.FFmpegError, OSError) as error:
        raise UserError(
            f"{path} can't be read as a video: it is damaged, cut off or of another kind ({error.strerror})."
        ) from error
    with container:
        if container.format.name == "tty":  # FFmpeg films the scrolling text of any .txt
            raise UserError(f"{path} is a text, not a video: name a video or a picture.")
        if container.metadata.get("major_brand") in ("heic", "heix"):  # FFmpeg gives one tile of many
            raise UserError(f"{path} is a HEIC picture, which can't be read here: save it as JPEG or PNG.")
        films = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if films and films[0].codec_context is None:  # FFmpeg has no such codec
            raise UserError(f"{path} is coded in a way that is not known here: save it as H.264 in an mp4.")
        if not films:
            raise UserError(f"{path} has no pictures in it, only sound or data: choose a video file.")
        films[0].thread_type = "AUTO"
        yield container, films[0]


def rate_of(stream: Any) -> float:
    """Frames a second on the average, as the header tells."""
    seconds = float((stream.duration or 0) * stream.time_base)
    # GIF only estimates its average rate, yet knows what it is made of.
    if stream.codec_context.name == "gif" and stream.frames and seconds > 0:
        return stream.frames / seconds
    return float(stream.average_rate or stream.guessed_rate or 25)


def seconds_of(container: Any, stream: Any) -> float:
    """The duration of the pictures as the header tells, NaN where it doesn't."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    with contextlib.suppress(KeyError, ValueError):  # Matroska: "00:01:02.500000000"
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    return container.duration / av.time_base if container.duration else math.nan


def decoded(path: Path, start: float, lost: list[float] | None = None) -> Iterator[tuple[float, float, Any]]:
    """Yields (start, end, frame) in seconds from the first frame, from the frame on show at `start` on.

    Args:
      path: a video.
      start: seconds.
      lost: takes the seconds of each frame that could not be decoded whole.
    """
    lost = [] if lost is None else lost
    # Some containers jump too far, to a keyframe after the place: then from further back, then from the start.
    for origin in (start, start - 5, 0.0):
        lost.clear()
        with opened(path) as (container, stream):
            tick = float(stream.time_base)
            offset = (stream.start_time or 0) * tick
            length = 1 / rate_of(stream)
            # Containers round times, and `start` may be the exact time of a frame.
            grace = min(tick, length / 4)
            if origin > 0:
                with contextlib.suppress(av.FFmpegError):
                    container.seek(int((origin + offset) / tick), stream=stream)
            end, shown = 0.0, None
            for frame in _readable(container, stream, lost):
                begin = end if frame.pts is None else frame.pts * tick - offset
                end = begin + (frame.duration * tick or length)
                if begin <= start + grace:
                    shown = begin, end, frame
                elif shown is None and origin > 0:
                    break
                else:
                    if shown is not None:
                        yield shown
                    shown = begin, end, frame
            else:
                if shown is not None or origin <= 0:
                    break
    if shown is None:
        raise UserError(f"{path} has no readable frame: it is damaged, cut off or no video.")
    if end > start + grace:
        yield shown


def packets(container: Any, stream: Any) -> Iterator[Any]:
    """A stream's packets; a cut-off file ends where it is cut."""
    stream_packets = container.demux(stream)
    while True:
        try:
            yield next(stream_packets)
        except (StopIteration, av.FFmpegError):
            return


def evenly(
    moments: Iterator[tuple[float, float, Any]], fps: float, source_fps: float, start: float = 0.0
) -> Iterator[tuple[float, float, Any]]:
    """(start, end, frame) at the even rate `fps`: at each instant the frame that is then on show.

    The first instant is that of the frame on show at `start`, and `start` itself where that frame has been on
    show for longer than one of `source_fps` frames a second.
    """
    # Against rounded times.
    late = 0.5 / max(fps, source_fps)
    base, shown, count, end = 0.0, None, 0, 0.0
    for begin, until, frame in moments:
        if shown is None:
            base = begin if start - begin < 1 / source_fps else start
        while shown is not None and (at := base + count / fps) + late < begin:
            yield at, at + 1 / fps, shown
            count += 1
        shown, end = frame, until
    while (at := base + count / fps) + late < end:
        yield at, at + 1 / fps, shown
        count += 1


def _readable(container: Any, stream: Any, lost: list[float]) -> Iterator[Any]:
    """Decodes what can be decoded: bad packets are passed over."""
    context, tick = stream.codec_context, float(stream.time_base)
    if stream.metadata.get("alpha_mode") == "1" and context.name in ALPHA_DECODERS:
        context = av.CodecContext.create(ALPHA_DECODERS[context.name], "r")
    for packet in packets(container, stream):
        try:
            frames = context.decode(packet)
        except av.FFmpegError:
            frames = []
            lost.append(((packet.pts or 0) - (stream.start_time or 0)) * tick)
        for frame in frames:
            if frame.is_corrupt:
                lost.append(((frame.pts or 0) - (stream.start_time or 0)) * tick)
            yield frame
